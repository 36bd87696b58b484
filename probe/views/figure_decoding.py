"""Figures of the answer as it forms: how sure the model is, and what is written when."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from probe.trace_reader import Trace
from probe.views.figure_data import StepAxis, Wanted, rows_of, sample_words, step_axis, values_of
from probe.views.figure_style import (
    AMOUNTS,
    NOTHING,
    ROLE_COLOURS,
    head,
    new_figure,
    run_words,
    small_print,
    whole_numbers,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

QUANTILES = (0.1, 0.5, 0.9)
_GROUPS = {"committed": "committed at this step", "masked": "still masked after it"}
_LOGIT_SIGNALS = {
    "confidence": "confidence\n(probability)",
    "entropy": "entropy (nat)",
    "margin": "margin\n(probability)",
}


def _groups(values: Sequence[np.ndarray], commits: Sequence[np.ndarray], axis: StepAxis) -> dict[str, list[np.ndarray]]:
    """Per place of the axis, the known values of all samples' tokens: those committed there, and the other ones."""
    out: dict[str, list[list[np.ndarray]]] = {name: [[] for _ in range(axis.length)] for name in _GROUPS}
    for signal, commit in zip(values, commits, strict=True):
        if not len(signal):
            continue
        for where, step in enumerate(axis.at(len(signal))):
            known = ~np.isnan(signal[step])
            now = commit == step
            out["committed"][where].append(signal[step][known & now])
            out["masked"][where].append(signal[step][known & ~now])
    return {name: [np.concatenate([np.zeros(0), *parts]) for parts in places] for name, places in out.items()}


def confidence(trace: Trace, wanted: Wanted) -> Figure:
    """Median and 10 to 90 % band over tokens, per step, of `confidence`, and of `entropy` and `margin` if recorded."""
    rows = rows_of(trace, "confidence", wanted.sample)
    axis = step_axis(trace, rows)
    commits = list(values_of(trace, "commit_step", rows))
    shown = [n for n in _LOGIT_SIGNALS if n in trace.variables and trace.variables[n].dims == ("step", "position")]
    shown = [n for n in shown if n == "confidence" or set(rows) <= set(rows_of(trace, n, None))]
    counts_at = len(shown)
    figure = new_figure(3.4 + 1.45 * len(shown))
    panels = figure.subplots(len(shown) + 1, 1, sharex=True, height_ratios=[2.2, *[1] * (len(shown) - 1), 0.85])
    for axes, name in zip(panels, shown, strict=False):
        axes.set_label(name)
        groups = _groups(list(values_of(trace, name, rows)), commits, axis)
        for group, words in _GROUPS.items():
            _band(axes, axis, groups[group], ROLE_COLOURS[group], words, dashed=group == "masked")
        axes.set_ylabel(_LOGIT_SIGNALS[name])
        axes.grid(axis="y")
        if name == "entropy":
            axes.set_ylim(0, None)
        else:
            axes.set_ylim(-0.03, 1.03)
        if name == "confidence":
            total = {group: [len(tokens) for tokens in places] for group, places in groups.items()}
    panels[0].legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.2)
    panels[0].set_title("median over tokens, band: 10 % to 90 % of them")
    _stacked_counts(panels[counts_at], axis, total)
    axis.dress(panels[counts_at])
    figure.align_ylabels()
    about = f"{run_words(trace)} · {sample_words(trace, rows, axis)}"
    head(figure, "How sure the model is of the tokens it writes", about)
    places = "; samples of different length share one axis by relative progress" if axis.relative else ""
    small_print(
        figure,
        [
            f"variables {', '.join(f'`{n}`' for n in shown)} of every slot that could be committed, "
            f"`commit_step`{places}.",
            *(["Each token counts once, so long answers weigh more than short ones."] if len(rows) > 1 else []),
        ],
    )
    return figure


def _band(axes: Axes, axis: StepAxis, places: list[np.ndarray], colour: str, label: str, *, dashed: bool) -> None:
    low, middle, high = np.array([np.quantile(p, QUANTILES) if len(p) else [np.nan] * 3 for p in places]).T
    axes.fill_between(axis.centres, low, high, color=colour, alpha=0.2, linewidth=0)
    marker = "o" if axis.length <= 48 else None
    axes.plot(axis.centres, middle, color=colour, label=label, marker=marker, linestyle="--" if dashed else "-")


def _stacked_counts(axes: Axes, axis: StepAxis, total: dict[str, list[int]]) -> None:
    """How many tokens the curves speak of."""
    axes.set_label("tokens")
    width = (axis.extent[1] - axis.extent[0]) / axis.length
    below = np.zeros(axis.length)
    for group in _GROUPS:
        axes.bar(axis.centres, total[group], width * 0.92, below, color=ROLE_COLOURS[group], alpha=0.85)
        below += total[group]
    axes.set_ylabel("tokens")
    whole_numbers(axes.yaxis, 3)


def commit_order(trace: Trace, wanted: Wanted) -> Figure:
    """For one sample, when each position was written; for several, the same per sample, and counts over them."""
    rows = rows_of(trace, "commit_step", wanted.sample)
    axis = step_axis(trace, rows)
    commits = list(values_of(trace, "commit_step", rows))
    longest = max((len(c) for c in commits), default=0)
    steps = axis.length
    about = f"{run_words(trace)} · {sample_words(trace, rows, axis)}"
    if len(rows) == 1:
        figure = _one_answer(trace, rows[0], commits[0], steps)
    else:
        figure = _many_answers(trace, rows, commits, longest, steps)
    head(figure, "In which order the answer is written", about)
    return figure


def _one_answer(trace: Trace, row: int, commit: np.ndarray, steps: int) -> Figure:
    from matplotlib.ticker import PercentFormatter

    known = "confidence" in trace.variables and trace.checksums(row).get("confidence", 0) >= 0
    figure = new_figure(5.4)
    axes = figure.subplots()
    axes.set_label("positions")
    axes.set_facecolor(NOTHING)
    extent = (-0.5, len(commit) - 0.5, steps - 0.5, -0.5)
    if known:
        sure = 100 * next(values_of(trace, "confidence", [row])).astype(float)
        image = axes.imshow(
            np.ma.masked_invalid(sure), extent=extent, aspect="auto", interpolation="nearest", cmap=AMOUNTS, vmin=0,
            vmax=100,
        )  # fmt: skip
        figure.colorbar(image, label="confidence", format=PercentFormatter(), pad=0.015)
    written = commit >= 0
    size = float(np.clip(2600 / max(len(commit), 1.6 * steps), 12, 130))
    axes.scatter(
        np.flatnonzero(written), commit[written], size, color=ROLE_COLOURS["committed"], edgecolor="white",
        linewidth=1.2, label="committed here", zorder=3, clip_on=False,
    )  # fmt: skip
    axes.set_xlim(extent[:2])
    axes.set_ylim(extent[2:])
    axes.set_xlabel("position in the answer")
    axes.set_ylabel("denoising step")
    whole_numbers(axes.xaxis)
    whole_numbers(axes.yaxis)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2, markerscale=min(1, (60 / size) ** 0.5))
    never = int((~written).sum())
    small_print(
        figure,
        [
            f"variables `commit_step`{', `confidence` (colour; grey: the slot was not open)' if known else ''}.",
            *([f"{never} of {len(commit)} positions were never committed: the run ended before."] if never else []),
        ],
    )
    return figure


def _many_answers(trace: Trace, rows: Sequence[int], commits: list[np.ndarray], longest: int, steps: int) -> Figure:
    from matplotlib.colors import BoundaryNorm, LogNorm

    n = len(rows)
    figure = new_figure(float(np.clip(3.4 + 0.14 * n, 5.2, 8.5)))
    panels = figure.subplots(1, 2, width_ratios=[1.15, 1])
    table = np.full((n, longest), np.nan)
    for i, commit in enumerate(commits):
        table[i, : len(commit)] = np.where(commit >= 0, commit, np.nan)
    left, right = panels
    left.set_label("samples")
    extent = (-0.5, longest - 0.5, n - 0.5, -0.5)
    left.barh(range(n), [len(c) for c in commits], 1.0, -0.5, color=NOTHING, zorder=0)  # positions that there are
    image = left.imshow(
        np.ma.masked_invalid(table), extent=extent, aspect="auto", interpolation="nearest", cmap=AMOUNTS, vmin=0,
        vmax=max(steps - 1, 1),
    )  # fmt: skip
    figure.colorbar(image, ax=left, label="denoising step of the commit", location="bottom", pad=0.02, fraction=0.05)
    left.set_title("every sample, every position")
    left.set_xlabel("position in the answer")
    if n <= 30:
        numbers, tasks = trace.samples, trace.array("task")
        words = [f"{tasks[i].rsplit('/', 1)[-1]} {numbers[i]}".strip() for i in rows]
        left.set_yticks(range(n), [w if len(w) <= 22 else f"{w[:10]}…{w[-10:]}" for w in words])
        left.set_ylabel("task and number of the sample")
    else:
        left.set_ylabel("sample")
    right.set_label("counts")
    right.set_facecolor(NOTHING)
    counts = np.zeros((steps, longest))
    for commit in commits:
        written = np.flatnonzero(commit >= 0)
        np.add.at(counts, (commit[written], written), 1)
    most = int(counts.max(initial=1))
    norm: Any = BoundaryNorm(np.arange(0.5, most + 1), 256) if most <= 10 else LogNorm(1, most)
    image = right.imshow(
        np.ma.masked_equal(counts, 0), extent=(-0.5, longest - 0.5, -0.5, steps - 0.5), origin="lower", aspect="auto",
        interpolation="nearest", cmap=AMOUNTS, norm=norm,
    )  # fmt: skip
    ticks = np.arange(1, most + 1) if most <= 10 else None
    figure.colorbar(image, ax=right, label="samples", location="bottom", pad=0.02, fraction=0.05, ticks=ticks)
    right.set_title("all samples together")
    right.set_xlabel("position in the answer")
    right.set_ylabel("denoising step")
    for axes in panels:
        whole_numbers(axes.xaxis)
        axes.spines[:].set_visible(False)
    whole_numbers(right.yaxis)
    small_print(figure, ["variable `commit_step`; left, grey: never committed; right, grey: by no sample."])
    return figure
