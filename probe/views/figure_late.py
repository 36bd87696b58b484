"""The study's figure 1: the score that is left when pruning begins with the first step, and when it begins later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from probe.errors import ProbeError
from probe.intervals import Estimate
from probe.study.finished import finished
from probe.study.relative import Series, printed_series, series_of
from probe.trace_reader import Trace
from probe.views.figure_data import Wanted
from probe.views.figure_style import (
    BLUE,
    FAINT,
    SERIES,
    VERMILION,
    backbone_name,
    head,
    new_figure,
    small_print,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST = 6
"""Pruners in one figure: each has a row of panels."""
_OF_STUDY = {"LLaDA-V": BLUE, "LaViDa-Dream": VERMILION}
_LINES: Mapping[str, Any] = {"long": "-", "short": (0, (1.2, 1.2))}
_NO_RESTORATION: Any = {"linewidth": 0.9, "linestyle": (0, (5, 3))}
_MARKERS = {"long": "o", "short": "s"}


def late_pruning(traces: Sequence[Trace], wanted: Wanted) -> Figure:
    """A row for each pruner: by retention from the first step on, by start, and both of the study's printed numbers."""
    found = series_of([finished(trace) for trace in traces])
    if not found:
        raise ProbeError(
            "nothing to draw: no pruned run has an unpruned one of the same questions beside it; "
            "`probe sweep study/figure1` makes such runs"
        )
    methods = list(dict.fromkeys(one.method for one in found))
    if len(methods) > MOST:
        raise ProbeError(f"{len(methods)} pruners do not fit one figure ({', '.join(methods)}); give fewer traces")
    printed = {method: printed_series(method.partition(" (")[0]) for method in methods}
    wide = any(printed.values())
    colours = _colours(found)
    every = [*found, *(one for some in printed.values() for one in some)]
    places = sorted({keep for one in every for keep in one.by_keep}, reverse=True)
    figure = new_figure(1.75 + 2.5 * len(methods))
    grid = figure.add_gridspec(
        len(methods) + 1, 4 if wide else 2, height_ratios=[*[2.5] * len(methods), 0.62 if wide else 0.45]
    )
    first: Axes | None = None
    for i, method in enumerate(methods):
        own = [one for one in found if one.method == method]
        blocks = [(own, "these runs:"), *([(printed[method], "study, as printed:")] if wide else [])]
        for k, (some, whose) in enumerate(blocks):
            for side in (0, 1):
                axes = figure.add_subplot(grid[i, 2 * k + side], sharey=first)
                first = first or axes
                axes.set_label(f"{method}: {'start' if side else 'keep'}, {whose}")
                _panel(axes, some, () if side else places, colours | _OF_STUDY if k else colours, bool(k))
                _label(axes, i, len(methods), 2 * k + side, method, whose)
    assert first is not None
    first.set_ylim(0, 112)
    below = figure.add_subplot(grid[-1, :])
    below.set_axis_off()
    below.legend(
        handles=_handles(colours, found, wide), loc="upper left", ncols=4 if wide else 3, borderaxespad=0,
        columnspacing=1.6,
    )  # fmt: skip
    sizes = sorted({one.samples for one in found})
    n = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    names = ", ".join(dict.fromkeys(backbone_name(one.backbone) for one in found))
    head(
        figure,
        "Score left, of the unpruned run's: pruned from the first step, and later",
        f"{names} · {len(traces)} runs · n = {n} samples each",
    )
    small_print(figure, _notes(found, wide))
    return figure


def _colours(found: Sequence[Series]) -> dict[str, str]:
    """Of our backbones: the first beside each of the study's has that one's colour."""
    out: dict[str, str] = {}
    for one in found:
        wished = _OF_STUDY.get(one.study, "")
        free = [colour for colour in SERIES if colour not in (*out.values(), *_OF_STUDY.values())]
        out.setdefault(one.backbone, wished if wished and wished not in out.values() else (free or list(SERIES))[0])
    return out


def _panel(
    axes: Axes, some: Sequence[Series], places: Sequence[float], colours: Mapping[str, str], hollow: bool
) -> None:
    """One panel: by retention, whose values stand at `places`; by start, if there are no places."""
    from matplotlib.ticker import PercentFormatter

    late = not places
    shown = [one for one in some if (one.by_start if late else one.by_keep)]
    for i, one in enumerate(shown):
        values, colour = one.by_start if late else one.by_keep, colours[one.backbone]
        aside = (i - (len(shown) - 1) / 2) * (1.6 if late else 0.07)  # equal values stay visible side by side
        if late and 0.0 in values:
            axes.plot([0, 100], [values[0.0].value, 100], color=colour, alpha=0.6, **_NO_RESTORATION)
        x = [aside + (100 * place if late else places.index(place)) for place in values]
        _points(axes, x, list(values.values()), colour, one, hollow)
    if late:
        axes.set_xlim(-7, 107)
        axes.set_xticks([0, 25, 50, 75, 100])
        axes.xaxis.set_major_formatter(PercentFormatter(decimals=0))
    else:
        axes.set_xticks(range(len(places)), [f"{keep:.0%}" for keep in places])
        axes.set_xlim(-0.4, len(places) - 0.6)
    axes.axhline(100, color=FAINT, linewidth=0.8, zorder=0)
    axes.set_yticks([0, 25, 50, 75, 100])
    axes.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    axes.grid(axis="y")
    if not shown:
        axes.text(0.5, 0.5, "not run" if not hollow else "not printed", transform=axes.transAxes, ha="center",
                  va="center", color=FAINT)  # fmt: skip


def _points(axes: Axes, x: Sequence[float], values: Sequence[Estimate], colour: str, one: Series, hollow: bool) -> None:
    y = np.array([value.value for value in values])
    bars = np.array([[v.value - v.low, v.high - v.value] if v.low == v.low else [0.0, 0.0] for v in values]).T
    axes.errorbar(
        x, y, yerr=None if hollow else bars, color=colour, linestyle=_LINES[one.length], marker=_MARKERS[one.length],
        markersize=5, markerfacecolor="white" if hollow else colour, markeredgecolor=colour if hollow else "white",
        markeredgewidth=1.2 if hollow else 0.6, elinewidth=0.9, capsize=2, linewidth=1.7, zorder=3,
        label=f"{one.backbone}, {one.length}",
    )  # fmt: skip


def _label(axes: Axes, row: int, rows: int, column: int, method: str, whose: str) -> None:
    axes.tick_params(axis="y", labelleft=column == 0)
    if column == 0:
        axes.set_ylabel(method, fontweight="bold")
    if row == 0:
        axes.set_title(whose + ("\npruned from the first step" if column % 2 == 0 else "\npruned later"))
    if row == rows - 1:
        axes.set_xlabel("visual tokens kept" if column % 2 == 0 else "steps before pruning")


def _handles(colours: Mapping[str, str], found: Sequence[Series], wide: bool) -> list[Any]:
    from matplotlib.lines import Line2D

    look: dict[str, Any] = {"linewidth": 1.7, "markersize": 5}
    out = [
        Line2D([], [], color=c, marker="o", markeredgecolor="white", label=backbone_name(b), **look)
        for b, c in colours.items()
    ]
    if wide:
        out += [
            Line2D([], [], color=c, marker="o", markerfacecolor="white", label=f"{b} (study)", **look)
            for b, c in _OF_STUDY.items()
        ]
    words = {"long": "long answers", "short": "short answers"}
    out += [
        Line2D([], [], color=FAINT, linestyle=_LINES[k], marker=_MARKERS[k], label=words[k], **look)
        for k in words
        if any(one.length == k for one in found) or wide
    ]
    out.append(Line2D([], [], color=FAINT, label="without restoration (see below)", **_NO_RESTORATION))
    return out


def _notes(found: Sequence[Series], wide: bool) -> list[str]:
    keeps = {one.method: one.keep for one in found if one.by_start}
    kept = ", ".join(f"{method} {keep:.0%}" for method, keep in keeps.items())
    lines = [
        "variable `score`: mean over tasks of score / unpruned score; bars: 95 % interval of the pruned scores. "
        "Answers of up to 8 slots are short.",
    ]
    if kept:
        lines.append(
            f"Pruned later: kept are {kept}. Without restoration: what is committed before is as right as unpruned, "
            "the rest as if pruned from the first step; only what lies above that line is restored."
        )
    if wide:
        lines.append(
            "The study (arXiv 2511.15098, tables 1 to 3; VTW withdraws in the middle layer) prints no start of 0 % for "
            "its long answers."
        )
    return lines
