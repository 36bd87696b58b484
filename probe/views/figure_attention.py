"""The figure of what the answer attends to: picture, text, itself, per layer and step (arXiv 2511.15098, figure 2)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from probe.errors import ProbeError
from probe.trace_reader import Trace
from probe.trace_schema import Variable
from probe.views.figure_data import (
    StepAxis,
    Wanted,
    known_mean,
    known_quantiles,
    place,
    rows_of,
    sample_words,
    step_axis,
    values_of,
    variables_like,
)
from probe.views.figure_style import ROLE_COLOURS, head, heat_map, new_figure, run_words, small_print, whole_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

GROUPS: dict[str, tuple[str, ...]] = {
    "visual": ("visual", "newline"),
    "text": ("system", "question"),
    "answer": ("answer",),
}
"""The study's division of the sequence, by key segments."""

_LOOKERS = {
    "answer": "answer tokens", "masked": "masked answer tokens", "filled": "filled answer tokens",
    "last": "the last position", "last_prompt": "the last prompt position", "question": "question tokens",
    "system": "system tokens", "visual": "visual tokens", "all": "all tokens",
}  # fmt: skip
_FORMS = {
    "softmax": "softmax in every head, then mean over heads",
    "head_mean_logits": "mean of the heads' logits, then softmax, as in the study's release",
}


def _masses(trace: Trace) -> tuple[Variable, Variable | None]:
    """The variable of the main panels, and one with an axis of heads."""
    named = variables_like(trace, "attention_mass")
    wide = [v for v in named if v.dims[:2] == ("step", "layer") and "segment_key" in v.dims]
    if not wide:
        raise ProbeError(f"{trace.path.name}: `attention_mass` has no axes step, layer and segment_key")
    return wide[0], next((v for v in wide if "head" in v.dims), None)


def grouped(values: np.ndarray, keys: tuple[str, ...]) -> np.ndarray:
    """`(..., segment_key)` to `(..., group)`: sums over the segments of a group."""
    places = [[i for i, key in enumerate(keys) if key in members] for members in GROUPS.values()]
    return np.stack([values[..., p].sum(-1) if p else np.full(values.shape[:-1], np.nan) for p in places], -1)


def _segment_of(trace: Trace, variable: Variable) -> int:
    """The query segment that the variable was recorded for: other variables may fill the others."""
    segments = list(trace.coords.get("segment", ("answer",)))
    said = re.search(r"queries=(\w+)", variable.long_name)
    wanted = said[1] if said else "answer"
    return segments.index(wanted) if wanted in segments else 0


def _read(trace: Trace, variable: Variable, rows: list[int]) -> list[np.ndarray]:
    """Per sample `(step, layer, group)`, or `(step, layer, head, group)`."""
    segment = _segment_of(trace, variable)
    keys = trace.coords.get("segment_key", ())
    pick = "segment" in variable.dims
    return [
        grouped(v[..., segment, :] if pick else v, keys).astype(float) for v in values_of(trace, variable.name, rows)
    ]


def attention_mass(trace: Trace, wanted: Wanted) -> Figure:
    """Heat maps (layer, step) of the three shares; their curves over steps and over layers; heads if recorded."""
    from matplotlib.ticker import PercentFormatter

    main, by_head = _masses(trace)
    rows = rows_of(trace, main.name, wanted.sample)
    axis = step_axis(trace, rows)
    samples = _read(trace, main, rows)
    if "head" in main.dims:
        samples = [known_mean(v, 2) for v in samples]
    layers = samples[0].shape[1]
    layer = place(wanted.layer, layers, "layer", trace.path.name)
    step = place(wanted.step, axis.length, "step", trace.path.name)
    along = np.stack([axis.spread(v) for v in samples])  # (sample, place, layer, group)
    maps = 100 * known_mean(along)

    figure = new_figure(8.9 if by_head else 6.8)
    mosaic: Any = [["map0", "map1", "map2"], ["key"] * 3, ["steps", "steps", "layers"]]
    mosaic += [["head0", "head1", "head2"]] * bool(by_head)
    panels: dict[str, Axes] = figure.subplot_mosaic(mosaic, height_ratios=[1, 0.08, 1.05, 1][: len(mosaic)])
    segments = trace.coords.get("segment", ("answer",))
    looking = _LOOKERS.get(segments[_segment_of(trace, main)], segments[_segment_of(trace, main)])
    top = float(np.nanmax(maps)) if not np.isnan(maps).all() else 100.0
    names = {"visual": "visual tokens", "text": "text (system, question)", "answer": "the answer itself"}
    for g, group in enumerate(GROUPS):
        axes = panels[f"map{g}"]
        axes.set_label(group)
        image = heat_map(axes, maps[..., g].T, (*axis.extent, -0.5, layers - 0.5), 0, top)
        axes.set_title(f"to {names[group]}", color=_dark(group))
        axis.dress(axes, label=g == 1)
        whole_numbers(axes.yaxis)
        if g == 0:
            axes.set_ylabel("layer (0: first)")
    _scale(figure, image, [panels[f"map{g}"] for g in range(3)])

    over_steps = 100 * (along[:, :, layer] if layer is not None else known_mean(along, 2))  # (sample, place, group)
    over_layers = 100 * np.stack([_at_step(v, step) for v in samples])  # (sample, layer, group)
    title = {"steps": "mean over layers" if layer is None else f"layer {layer}"}
    title["layers"] = "mean over steps" if step is None else f"step {step}"
    for key, values in (("steps", over_steps), ("layers", over_layers)):
        axes = panels[key]
        axes.set_label(key)
        where = axis.centres if key == "steps" else np.arange(layers, dtype=float)
        for g, group in enumerate(GROUPS):
            low, high = known_quantiles(values[..., g], (0.25, 0.75))
            colour = ROLE_COLOURS[group]
            axes.fill_between(where, low, high, color=colour, alpha=0.2, linewidth=0)
            marker = "o" if len(where) <= 32 else None
            axes.plot(where, known_mean(values[..., g]), color=colour, marker=marker, label=f"to {names[group]}")
        axes.grid(axis="y")
        axes.yaxis.set_major_formatter(PercentFormatter(decimals=0))
        axes.set_ylim(0, None)
        axes.set_title(f"over {key}: {title[key]}")
    panels["steps"].set_ylabel("share of attention")
    axis.dress(panels["steps"])
    panels["layers"].set_xlabel("layer (0: first)")
    whole_numbers(panels["layers"].xaxis)
    both = max(panels[k].get_ylim()[1] for k in ("steps", "layers"))
    for key in ("steps", "layers"):
        panels[key].set_ylim(0, both)

    print_ = _main_print(main, axis, len(rows))
    if by_head:
        print_.append(_draw_heads(figure, panels, trace, by_head, rows, step))
    handles, labels = panels["steps"].get_legend_handles_labels()
    panels["key"].set_axis_off()  # a row of its own, where it hides nothing
    panels["key"].legend(handles, labels, loc="center left", ncols=3, borderaxespad=0)
    head(figure, f"Where the attention of {looking} goes", f"{run_words(trace)} · {sample_words(trace, rows, axis)}")
    small_print(figure, print_)
    return figure


def _at_step(values: np.ndarray, step: int | None) -> np.ndarray:
    """`(step, layer, ...)` at one step (NaN if the sample is shorter) or averaged over its steps."""
    if step is None:
        return known_mean(values)
    return values[step] if step < len(values) else np.full(values.shape[1:], np.nan)


def _dark(group: str) -> str:
    from matplotlib.colors import to_hex, to_rgb

    red, green, blue = to_rgb(ROLE_COLOURS[group])
    return to_hex((0.72 * red, 0.72 * green, 0.72 * blue))


def _main_print(variable: Variable, axis: StepAxis, n: int) -> list[str]:
    form = re.search(r"form=(\w+)", variable.long_name)
    told = f" ({_FORMS.get(form[1], form[1])})" if form else ""
    spread = "; lines: mean over samples, bands: middle half of the samples" if n > 1 else ""
    places = "; samples of different length share one axis by relative progress" if axis.relative else ""
    return [
        f"variable `{variable.name}`{told}{spread}{places}.",
        "visual = segments visual + newline, text = system + question. "
        "A segment's size counts: even attention would give each its share of the sequence.",
    ]


def _draw_heads(
    figure: Figure, panels: dict[str, Axes], trace: Trace, variable: Variable, rows: list[int], step: int | None
) -> str:
    rows = [i for i in rows if i in rows_of(trace, variable.name, None)]
    values = 100 * known_mean(np.stack([_at_step(v, step) for v in _read(trace, variable, rows)]))
    layers, heads = values.shape[:2]
    top = float(np.nanmax(values)) if not np.isnan(values).all() else 100.0
    for g, group in enumerate(GROUPS):
        axes = panels[f"head{g}"]
        axes.set_label(f"{group} by head")
        image = heat_map(axes, values[..., g], (-0.5, heads - 0.5, -0.5, layers - 0.5), 0, top)
        axes.set_title(f"to {'visual tokens' if group == 'visual' else group}, by head", color=_dark(group))
        whole_numbers(axes.xaxis)
        whole_numbers(axes.yaxis)
        axes.set_xlabel("head")
        if g == 0:
            axes.set_ylabel("layer (0: first)")
    _scale(figure, image, [panels[f"head{g}"] for g in range(3)])
    return f"By head: variable `{variable.name}`, {'mean over steps' if step is None else f'step {step}'} and samples."


def _scale(figure: Figure, image: AxesImage, axes: list[Axes]) -> None:
    """The colour scale of a row of maps."""
    from matplotlib.ticker import PercentFormatter

    share = PercentFormatter(decimals=0)
    figure.colorbar(image, ax=axes, label="share of attention", format=share, pad=0.015, fraction=0.03)
