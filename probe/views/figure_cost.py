"""Figures of what a run costs: by phase and step, and several runs against their score."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from probe.compare import dials_of, recipe_of
from probe.errors import ProbeError
from probe.summary import Row, summarise
from probe.trace_reader import Trace
from probe.views.figure_data import Wanted, rows_of, sample_words, step_axis, values_of
from probe.views.figure_style import (
    FAINT,
    INK,
    ROLE_COLOURS,
    SERIES,
    backbone_name,
    head,
    new_figure,
    run_words,
    small_print,
    whole_numbers,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKERS = "osD^vPX*<>ph"


def cost(trace: Trace, wanted: Wanted) -> Figure:
    """Shares of the total by phase; then seconds and FLOPs of every step, stacked by phase."""
    from matplotlib.ticker import EngFormatter, PercentFormatter

    rows = rows_of(trace, "seconds", wanted.sample)
    axis = step_axis(trace, rows)
    phases = list(trace.coords["phase"])
    units = {"seconds": "s", "flops": "FLOP"}
    reached = np.array([sum(s > k for s in axis.steps) for k in range(axis.length)])
    totals, per_step = {}, {}
    for name in units:
        values = [np.nan_to_num(v) for v in values_of(trace, name, rows)]
        totals[name] = np.mean([v.sum(0) for v in values], axis=0)
        per_step[name] = np.zeros((axis.length, len(phases)))
        for v in values:
            per_step[name][: len(v)] += v
        per_step[name] /= np.maximum(reached, 1)[:, None]
    shown = [k for k in range(len(phases)) if any(t[k] > 0 for t in totals.values())]

    ragged = len(set(axis.steps)) > 1
    figure = new_figure(7.2 if ragged else 6.6)
    panels = figure.subplots(3 + ragged, 1, height_ratios=[0.85, 1.2, 1.2, *[0.55] * ragged])
    top, seconds, flops = panels[:3]
    seconds.sharex(flops)
    top.set_label("total")
    names = [_total("time", totals["seconds"], "s"), _total("compute", totals["flops"], "FLOP")]
    left = np.zeros(2)
    for k in shown:
        share = np.array([100 * t[k] / t.sum() if t.sum() else 0.0 for t in (totals["seconds"], totals["flops"])])
        bars = top.barh(names, share, 0.72, left, color=ROLE_COLOURS.get(phases[k], FAINT), label=phases[k])
        dark = phases[k] in ("backbone", "sampler")
        labels = [f"{s:.0f}%" if s >= 4 else "" for s in share]
        top.bar_label(bars, labels, label_type="center", color="white" if dark else INK, fontsize=9)
        left += share
    top.invert_yaxis()
    top.set_xlim(0, 100)
    top.xaxis.set_major_formatter(PercentFormatter())
    top.set_title("mean per sample, by phase")
    place = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0.2}
    top.legend(**place, ncols=len(shown), handlelength=1, columnspacing=1.1)
    top.spines["left"].set_visible(False)
    top.tick_params(axis="y", length=0)
    for axes, name in ((seconds, "seconds"), (flops, "flops")):
        axes.set_label(name)
        below = np.zeros(axis.length)
        for k in shown:
            axes.bar(
                np.arange(axis.length), per_step[name][:, k], 0.92 if axis.length <= 48 else 1.0, below,
                color=ROLE_COLOURS.get(phases[k], FAINT), label=phases[k],
            )  # fmt: skip
            below += per_step[name][:, k]
        axes.locator_params(axis="y", nbins=4)
        axes.yaxis.set_major_formatter(EngFormatter(unit=units[name]))
        axes.grid(axis="y")
        axes.set_xlim(-0.6, axis.length - 0.4)
    seconds.set_title("each step: mean of the samples that reach it")
    seconds.set_ylabel("time per step")
    flops.set_ylabel("compute per step")
    seconds.tick_params(labelbottom=False)
    if ragged:
        many = panels[3]
        many.sharex(flops)
        many.set_label("samples")
        many.bar(np.arange(axis.length), reached, 0.92, color="#BBBBBB")
        many.set_ylabel("samples\nat this step")
        many.set_ylim(0, None)
        whole_numbers(many.yaxis, 3)
        flops.tick_params(labelbottom=False)
    panels[-1].set_xlabel("denoising step")
    whole_numbers(panels[-1].xaxis)
    figure.align_ylabels(panels[1:])
    head(figure, "What a sample costs", f"{run_words(trace)} · {sample_words(trace, rows, axis)}{_device(trace)}")
    first = "variables `seconds`, `flops`. Encoding the picture stands at step 0."
    small_print(figure, [first, _recording(trace, rows)])
    return figure


def _total(word: str, values: np.ndarray, unit: str) -> str:
    from matplotlib.ticker import EngFormatter

    return f"{word}\n{EngFormatter(unit=unit, places=2)(float(values.sum()))}"


def _device(trace: Trace) -> str:
    return f" · {trace.header.device}" if trace.header.device else ""


def _recording(trace: Trace, rows: Sequence[int]) -> str:
    """Phase `probe` is time that only recording and choosing takes; how long a sample takes without recording."""
    words = "Phase `probe`: scoring, choosing and recording"
    if "seconds_unrecorded" in trace.variables:
        clean = trace.array("seconds_unrecorded")[list(rows)]
        clean = clean[~np.isnan(clean)]
        if len(clean):
            return f"{words}; with nothing recorded a sample takes {clean.mean():.3g} s (`seconds_unrecorded`)."
    return f"{words}."


# -------------------------------------------------------------------- several runs


def labels_of(traces: Sequence[Trace]) -> list[tuple[str, str]]:
    """Recipe and, where runs of one recipe differ in dials, those dials. Never twice the same."""
    names = [t.header.recipe_name or t.path.name for t in traces]
    dials = [dials_of(recipe_of(t)) for t in traces]
    out: list[tuple[str, str]] = []
    for i, name in enumerate(names):
        same = [dials[j] for j in range(len(traces)) if names[j] == name]
        differ = [k for k in dials[i] if any(d.get(k) != dials[i][k] for d in same)]
        words = ", ".join(f"{k} {dials[i][k]}" for k in differ)
        if (name, words) in out or (len(same) > 1 and not words):
            words = f"{words} ({traces[i].path.name.removesuffix('.trace.h5')})".strip()
        if (name, words) in out:
            words = f"{words} #{i + 1}"
        out.append((name, words))
    return out


def pareto(cost_: Sequence[float], score: Sequence[float]) -> list[int]:
    """Runs that no other beats (as cheap and as good, and better in one), from cheap to dear."""
    front = [
        i
        for i, (c, s) in enumerate(zip(cost_, score, strict=True))
        if np.isfinite(c) and np.isfinite(s)
        and not any(
            (d <= c and t >= s) and (d < c or t > s) for d, t in zip(cost_, score, strict=True)
        )
    ]  # fmt: skip
    return sorted(front, key=lambda i: (cost_[i], score[i]))


def tradeoff(traces: Sequence[Trace], wanted: Wanted) -> Figure:
    """Mean score with its 95 % interval against three costs; the Pareto front of each."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter, StrMethodFormatter

    labels = labels_of(traces)
    rows = summarise([Path(t.path) for t in traces], [f"{a} {b}".strip() for a, b in labels])
    if all(np.isnan(r.score) for r in rows):
        raise ProbeError("nothing to draw: no sample of these traces has a score (a reference is needed)")
    costs: dict[str, tuple[str, Any]] = {
        "flops": ("compute per sample (recording off)", EngFormatter(unit="FLOP")),
        "seconds": ("time per sample (recording off)", EngFormatter(unit="s")),
        "visual_tokens": ("visual tokens (mean of steps, layers)", StrMethodFormatter("{x:.0f}")),
    }
    costs = {k: v for k, v in costs.items() if any(np.isfinite(getattr(r, k)) for r in rows)}
    families = list(dict.fromkeys(name for name, _ in labels))
    looks = [_look(labels, families, i) for i in range(len(labels))]
    legend_rows = -(-(len(rows) + 1) // 3)
    figure = new_figure(4.9 + 0.21 * legend_rows)
    # the legend has a row of its own, where it can hide nothing
    grid = figure.add_gridspec(2, len(costs), height_ratios=[3.6, 0.21 * legend_rows])
    panels = [figure.add_subplot(grid[0, 0])]
    panels += [figure.add_subplot(grid[0, k], sharey=panels[0]) for k in range(1, len(costs))]
    below = figure.add_subplot(grid[1, :])
    below.set_axis_off()
    for axes, (name, (words, ticks)) in zip(panels, costs.items(), strict=True):
        axes.set_label(name)
        x = [getattr(r, name) for r in rows]
        front = pareto(x, [r.score for r in rows])
        axes.plot(
            [x[i] for i in front], [rows[i].score for i in front], color="#999999", linewidth=5, alpha=0.45,
            solid_capstyle="round", zorder=1, drawstyle="steps-post", label="Pareto front",
            marker="o", markersize=15, markeredgewidth=0,
        )  # fmt: skip
        for i, row in enumerate(rows):
            _point(axes, x[i], row, *looks[i], row.label)
        axes.grid()
        axes.set_xlabel(words)
        axes.xaxis.set_major_formatter(ticks)
        axes.locator_params(axis="x", nbins=3, steps=[1, 2, 5, 10])  # ticks are as wide as "12.5 GFLOP"
        axes.margins(x=0.12)
        axes.tick_params(axis="y", labelleft=axes is panels[0])
    panels[0].set_ylabel("score (mean; 1 is best)")
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="none", markersize=7, label=f"{a}  {b}".strip())
        for (a, b), (colour, marker) in zip(labels, looks, strict=True)
    ]
    front_words = "Pareto front: best score at this cost"
    handles.append(Line2D([], [], color="#999999", alpha=0.45, linewidth=5, label=front_words))
    below.legend(handles=handles, loc="upper left", borderaxespad=0, ncols=3, columnspacing=1.6, handletextpad=0.5)
    sizes = sorted({r.n for r in rows})
    n = f"n = {sizes[0]}" if len(sizes) == 1 else f"n = {sizes[0]} to {sizes[-1]}"
    models = ", ".join(dict.fromkeys(backbone_name(t.header.backbone) for t in traces))
    head(figure, "Score against cost", f"{models} · {len(rows)} runs · {n} samples each")
    used = {"flops": "`flops_unrecorded`", "seconds": "`seconds_unrecorded`", "visual_tokens": "`visual_tokens`"}
    small_print(figure, [f"variables `score` (bars: 95 % interval of the mean), {', '.join(used[k] for k in costs)}."])
    return figure


def _look(labels: Sequence[tuple[str, str]], families: Sequence[str], i: int) -> tuple[str, str]:
    """Colour of the recipe, marker of the run within it: no two runs look alike."""
    family = families.index(labels[i][0])
    member = sum(name == labels[i][0] for name, _ in labels[:i])
    shift = family // len(SERIES)  # more recipes than colours: start at another marker
    return SERIES[family % len(SERIES)], _MARKERS[(member + 4 * shift) % len(_MARKERS)]


def _point(axes: Any, x: float, row: Row, colour: str, marker: str, label: str) -> None:
    spread = None if np.isnan(row.score_half_width) else row.score_half_width
    axes.errorbar(
        [x], [row.score], yerr=spread, color=colour, marker=marker, markersize=7, linestyle="none", elinewidth=1,
        capsize=2.5, markeredgecolor="white", markeredgewidth=0.8, label=label, zorder=3,
    )  # fmt: skip
