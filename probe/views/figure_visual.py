"""Figures of visual tokens: how many are left where, and which the answer looks at."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from probe.errors import ProbeError
from probe.site import Fate, Role
from probe.trace_reader import Trace
from probe.views.figure_data import (
    StepAxis,
    Wanted,
    known_mean,
    place,
    rows_of,
    sample_words,
    step_axis,
    values_of,
    variables_like,
)
from probe.views.figure_style import (
    AMOUNTS,
    FAINT,
    NOTHING,
    ROLE_COLOURS,
    head,
    heat_map,
    new_figure,
    run_words,
    small_print,
    whole_numbers,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_READ = 64
"""Samples of which the fate of every single token is read; `visual_tokens` is read of all."""


def retention(trace: Trace, wanted: Wanted) -> Figure:
    """A heat map (layer, step) of the share that is left; what became of the others over steps, and over layers."""
    from matplotlib.ticker import PercentFormatter

    rows = rows_of(trace, "visual_tokens", wanted.sample)
    lengths = trace.array("n_visual") if "visual" in trace.axes else None
    counts = {i: v.astype(float) for i, v in zip(rows, values_of(trace, "visual_tokens", rows), strict=True)}
    before = {i: int(lengths[i]) if lengths is not None else int(counts[i].max(initial=0)) for i in rows}
    seen = [i for i in rows if before[i]]
    if not seen:
        raise ProbeError(f"{trace.path.name}: nothing to draw: no sample has visual tokens")
    axis = step_axis(trace, seen)
    shares = [100 * counts[i] / before[i] for i in seen]
    along = np.stack([axis.spread(v) for v in shares])
    layers = along.shape[2]
    layer = place(wanted.layer, layers, "layer", trace.path.name)
    step = place(wanted.step, axis.length, "step", trace.path.name)

    has_fates = "visual_kept" in trace.variables
    figure = new_figure(6.4 if has_fates else 3.9)
    parts: Any = figure.subfigures(2, 1, height_ratios=[1, 1.05]) if has_fates else (figure, None)
    top, bottom = parts
    axes = top.subplots()
    axes.set_label("left")
    image = heat_map(axes, known_mean(along).T, (*axis.extent, -0.5, layers - 0.5), 0, 100)
    top.colorbar(image, ax=axes, label="visual tokens left", format=PercentFormatter(), pad=0.015, fraction=0.03)
    axes.set_title("visual tokens in the layer's attention, share of those at the start")
    axes.set_ylabel("layer (0: first)")
    whole_numbers(axes.yaxis)
    axis.dress(axes)
    upper = "upper panel: " if bottom is not None else ""
    lines = [f"{upper}variable `visual_tokens` over `n_visual`{', mean over samples' if len(seen) > 1 else ''}."]
    if bottom is not None:
        lines.append(_draw_fates(bottom, trace, seen, axis, layer, step))
    first = sorted({before[i] for i in seen})
    words = f"{first[0]}" if len(first) == 1 else f"{first[0]} to {first[-1]}"
    kept = float(np.mean([v.mean() for v in shares]))
    about = f"{run_words(trace)} · {sample_words(trace, seen, axis)}"
    about += f" · {words} visual tokens, {kept:.3g} % left on average"
    head(figure, "How many visual tokens are left", about)
    small_print(figure, lines)
    return figure


def _draw_fates(
    figure: Any, trace: Trace, rows: Sequence[int], axis: StepAxis, layer: int | None, step: int | None
) -> str:
    """Stacked shares of every fate, over steps and over layers; says what was drawn."""
    from matplotlib.ticker import PercentFormatter

    rows = [i for i in rows if i in set(rows_of(trace, "visual_kept", None))]
    read = rows if len(rows) <= MOST_READ else [rows[k] for k in np.linspace(0, len(rows) - 1, MOST_READ).astype(int)]
    fates = list(Fate)
    over_steps, over_layers = [], []
    for values in values_of(trace, "visual_kept", read):
        share = 100 * np.stack([(values == f).mean(-1) for f in fates], -1)  # (step, layer, fate)
        over_steps.append(axis.spread(share[:, layer] if layer is not None else share.mean(1)))
        over_layers.append(
            share.mean(0) if step is None else share[step] if step < len(share) else np.full(share.shape[1:], np.nan)
        )
    drawn = {"steps": known_mean(np.stack(over_steps)), "layers": known_mean(np.stack(over_layers))}
    panels = figure.subplots(1, 2, width_ratios=[1.6, 1], sharey=True)
    some = [k for k in range(len(fates)) if max(np.nanmax(v[:, k]) for v in drawn.values()) > 0]
    for axes, (key, values) in zip(panels, drawn.items(), strict=True):
        axes.set_label(f"fates over {key}")
        where = axis.centres if key == "steps" else np.arange(len(values), dtype=float)
        width = (axis.extent[1] - axis.extent[0]) / axis.length if key == "steps" else 1.0
        below = np.zeros(len(values))
        for k in some:
            name = fates[k].name.lower()
            axes.bar(
                where, values[:, k], width * (0.92 if len(where) <= 48 else 1.0), below, label=name,
                color=ROLE_COLOURS[name],
            )  # fmt: skip
            below = below + values[:, k]
        axes.set_ylim(0, 100)
        axes.yaxis.set_major_formatter(PercentFormatter())
    panels[0].set_ylabel("share of visual tokens")
    panels[0].set_title(f"over steps: {'mean over layers' if layer is None else f'layer {layer}'}")
    panels[1].set_title(f"over layers: {'mean over steps' if step is None else f'step {step}'}")
    axis.dress(panels[0])
    panels[1].set_xlabel("layer (0: first)")
    whole_numbers(panels[1].xaxis)
    beside = {"loc": "upper left", "bbox_to_anchor": (1, 1)}
    panels[1].legend(**beside, title="what became\nof them", alignment="left", reverse=True)
    few = f" of {len(read)} of the {len(rows)} samples" if len(read) < len(rows) else ""
    return f"lower panels: variable `visual_kept`{few}{', mean over samples' if len(read) > 1 else ''}."


# -------------------------------------------------------------------- on the picture


def importance(trace: Trace, wanted: Wanted) -> Figure:
    """One row per step (by default the first and the last): what was kept, and each view's tokens in colour."""
    from PIL import Image

    variable = variables_like(trace, "visual_importance")[0]
    row = _row_with_picture(trace, variable.name, wanted.sample)
    axis = step_axis(trace, [row])
    values = trace.row(variable.name, row).astype(float)  # (step, layer, visual)
    if variable.dims != ("step", "layer", "visual"):
        raise ProbeError(f"{trace.path.name}: `{variable.name}` has axes {variable.dims}, not step, layer, visual")
    layer = place(wanted.layer, values.shape[1], "layer", trace.path.name)
    step = place(wanted.step, axis.length, "step", trace.path.name)
    recorded = [s for s in range(len(values)) if not np.isnan(values[s]).all()]
    ends = sorted({recorded[0], recorded[-1]}) if recorded else [0]
    steps = ends if step is None else [step]
    picture = Image.open(io.BytesIO(trace.picture(row) or b"")).convert("RGB")
    box = trace.row("visual_box", row).astype(float).copy()
    if "visual_role" in trace.variables:
        box[trace.row("visual_role", row) == Role.NEWLINE] = np.nan  # a row separator sees nothing
    view = trace.row("visual_view", row) if "visual_view" in trace.variables else np.zeros(len(box), int)
    seen = ~np.isnan(box).any(1)
    views = {"whole picture": seen & (view == 0), "tiles (finer)": seen & (view > 0)}
    views = {name: mask for name, mask in views.items() if mask.any()}
    shown = np.stack([known_mean(values[s]) if layer is None else values[s, layer] for s in steps])
    painted = np.any(list(views.values()), axis=0) if views else seen
    known = shown[:, painted][~np.isnan(shown[:, painted])]
    fates = trace.row("visual_kept", row) if "visual_kept" in trace.variables else None

    columns = 1 + len(views)
    figure = new_figure(1.75 + len(steps) * 9.2 / max(columns, 3) * picture.height / picture.width)
    panels = figure.subplots(len(steps), columns, squeeze=False)
    norm = _norm(known)
    where = "mean over layers" if layer is None else f"layer {layer}"
    # low in contrast and light, so that the colours above it stay what the scale says
    grey = picture.convert("L").point(lambda v: round(0.45 * v + 140)).convert("RGB")
    collection: Any = None
    for r, s in enumerate(steps):
        last = -1 if layer is None else layer
        kept = fates[s, last] == Fate.KEPT if fates is not None else np.ones(len(box), bool)
        axes = panels[r][0]
        axes.set_label(f"kept at step {s}")
        _paint_kept(axes, picture, box, kept, list(views.values()))
        axes.set_ylabel(f"step {s}{_which(s, axis.length)}", fontweight="bold")
        left = f"{int(kept.sum())} of {len(kept)} visual tokens left"
        axes.set_title(left if fates is not None else "the picture", fontweight="normal", fontsize=9.5)
        for axes, (name, mask) in zip(panels[r][1:], views.items(), strict=True):
            axes.set_label(f"{name} at step {s}")
            collection = _paint_amounts(axes, grey, box[mask], shown[r][mask], norm)
            axes.set_title(f"tokens of the {name}", fontweight="normal", fontsize=9.5)
    if collection is not None:
        figure.colorbar(
            collection, ax=panels[:, 1:], label="attention received per token", extend="min", pad=0.015,
            fraction=0.045, format=_percent(),
        )  # fmt: skip
    legend = []
    if fates is not None and any("gone" in c.get_label() for p in panels[:, 0] for c in p.collections):
        legend = [
            f"Left: veiled where tokens of the {list(views)[-1]} are gone"
            + ("; orange frames: tokens of the whole picture that are left." if len(views) > 1 else ".")
        ]
    question = " ".join(str(trace.array("question")[row]).split())
    asked = f" · asked: {question if len(question) <= 56 else question[:54] + '…'}" if question else ""
    number = int(trace.samples[row])
    head(figure, "Which visual tokens the answer looks at", f"{run_words(trace)} · sample {number} (n = 1){asked}")
    small_print(
        figure,
        [
            f"variable `{variable.name}` ({where}), `visual_kept` ({'last layer' if layer is None else where}), "
            "`visual_box`; one logarithmic colour scale. Grey squares: the token is gone, nothing can look at it.",
            *legend,
        ],
    )
    return figure


def _row_with_picture(trace: Trace, name: str, sample: int | None) -> int:
    rows = rows_of(trace, name, sample)
    pictured = [i for i in rows if trace.picture(i) is not None and trace.extents(i).get("visual", 0)]
    if not pictured:
        which = "no sample" if sample is None else f"not sample {sample}, which"
        raise ProbeError(
            f"{trace.path.name}: nothing to paint on: {which} has visual tokens and a stored picture "
            "(in the recipe, `trace: {pictures: true}`)"
        )
    return pictured[0]


def _norm(known: np.ndarray) -> Any:
    """Logarithmic, since a few tokens take most of the attention; three orders of magnitude at most."""
    from matplotlib.colors import LogNorm

    high = float(known.max(initial=0)) or 1.0
    positive = known[known > 0]
    low = max(float(np.quantile(positive, 0.02)) if len(positive) else high / 10, high / 1000)
    return LogNorm(min(low, high / 1.5), high)


def _percent() -> Any:
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: f"{100 * value:.3g}%")


def _which(step: int, steps: int) -> str:
    """` (first)`, ` (last)`, or nothing."""
    if steps == 1:
        return " (the only one)"
    return " (first)" if step == 0 else " (last)" if step == steps - 1 else ""


def _frame(axes: Axes) -> None:
    axes.set_xlim(0, 1)
    axes.set_ylim(1, 0)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _show(axes: Axes, picture: Any) -> None:
    axes.imshow(np.asarray(picture), extent=(0, 1, 1, 0), aspect=picture.height / picture.width)
    _frame(axes)


def _squares(box: np.ndarray) -> list[Any]:
    return [[(x0, y0), (x1, y0), (x1, y1), (x0, y1)] for x0, y0, x1, y1 in box]


def _paint_kept(axes: Axes, picture: Any, box: np.ndarray, kept: np.ndarray, views: list[np.ndarray]) -> None:
    """The picture; squares of the finest view that are gone are veiled, kept ones of the whole picture are framed."""
    from matplotlib.collections import PolyCollection

    _show(axes, picture)
    if not views or kept.all():
        return
    gone = box[views[-1] & ~kept]
    axes.add_collection(PolyCollection(_squares(gone), facecolor="white", edgecolor="none", alpha=0.82, label="gone"))
    if len(views) > 1:
        coarse = box[views[0] & kept]
        axes.add_collection(
            PolyCollection(_squares(coarse), facecolor="none", edgecolor=ROLE_COLOURS["kept"], linewidth=1.2)
        )


def _paint_amounts(axes: Axes, picture: Any, box: np.ndarray, values: np.ndarray, norm: Any) -> Any:
    from matplotlib.collections import PolyCollection

    _show(axes, picture)
    known = ~np.isnan(values)
    axes.add_collection(PolyCollection(_squares(box[~known]), facecolor=NOTHING, edgecolor=FAINT, linewidth=0.3))
    painted = PolyCollection(
        _squares(box[known]), array=values[known], cmap=AMOUNTS, norm=norm, alpha=0.78, edgecolor="white", linewidth=0.3
    )
    axes.add_collection(painted)
    return painted
