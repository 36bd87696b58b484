"""From a trace of the unpruned model to recipes: what the study's findings advise (arXiv 2511.15098, section 5.4).

The rule reads three numbers off a trace.

- *Seen layers*: layers in which the answer's attention to visual tokens, at some step, is at least half of that of the
  greatest layer.
- *Looked until*: the share of the steps after which that attention, averaged over layers, stays below half of its own
  greatest value.
- *Sure at*: the share of the steps at which the mean confidence of the open slots makes its largest rise.

At most half of the layers are seen: as in a model that was adapted from an autoregressive one, attention is
concentrated, so `layer_skip` carries visual tokens around the other layers. Else it is spread over the layers, as in a
model that was trained from scratch, which can restore what it loses: `late_step` and `progressive`.
Pure functions, apart from reading the trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from probe.calibrate import by_layer, unseen_layers
from probe.errors import ProbeError
from probe.recipe import Generate, Recipe, load_recipe, parse_recipe
from probe.recipe_text import with_comments
from probe.site import Fate, Role

if TYPE_CHECKING:
    from probe.trace import Trace

HALF = 0.5
FEWEST_STEPS = 4
"""Answers of fewer steps are left out: the study finds nothing to prune in them."""
NOTICEABLE = 0.05
"""A rise of the mean confidence from one step to the next that says when the model becomes sure."""
RECORDS = "probe run record/attention_mass"


@dataclass(frozen=True)
class Portrait:
    """What the rule reads: `layer_mass (layer,)` as in `by_layer`; shares of the steps, means over the samples."""

    samples: int
    layer_mass: tuple[float, ...]
    seen: tuple[int, ...]
    looked_until: float
    sure_at: float | None
    to_answer: float
    to_visual: float


@dataclass(frozen=True)
class Suggestion:
    """A recipe to try, and as a file whose comments say why."""

    recipe: Recipe
    text: str


def visual_mass(trace: Trace) -> list[np.ndarray]:
    """Per sample with pictures `(step, layer)` float32: the share of the answer's attention on visual tokens."""
    return [mass[:, :, int(Role.VISUAL)] for _, mass in _masses(trace)]


def _masses(trace: Trace) -> list[tuple[int, np.ndarray]]:
    """`(row, (step, layer, segment_key))` of every sample with pictures that did not fail. Refuses other traces."""
    variable = trace.variables.get("attention_mass")
    segments = list(trace.coords.get("segment", ()))
    whose = next((s for s in ("answer", "masked") if s in segments), None)
    if variable is None or whose is None or "head" in variable.dims:
        has = "has no `attention_mass`" if variable is None else "does not record it from the answer's rows, head mean"
        raise ProbeError(
            f"{trace.path.name} {has}: how the answer's attention divides must be recorded of the unpruned model; "
            f"`{RECORDS} --data ...` does that"
        )
    found = []
    for i in np.flatnonzero(trace.array("failed") == "").tolist():
        if not trace.extents(i).get("visual"):
            continue
        if (trace.row("visual_kept", i) != int(Fate.KEPT)).any():
            raise ProbeError(
                f"{trace.path.name} is of a run that removed visual tokens; take the trace of the unpruned model "
                f"(NAME.baseline.trace.h5, or `{RECORDS} --data ...`)"
            )
        found.append((i, trace.row("attention_mass", i)[:, :, segments.index(whose)]))
    if not found:
        raise ProbeError(f"{trace.path.name} has no sample with visual tokens; ask about pictures")
    return found


def portrait_of(trace: Trace) -> Portrait:
    """The rule's numbers of a trace."""
    rows = [(i, mass) for i, mass in _masses(trace) if mass.shape[0] >= FEWEST_STEPS]
    if not rows:
        raise ProbeError(
            f"{trace.path.name}: every answer has fewer than {FEWEST_STEPS} steps. The study finds nothing to prune in "
            "short answers; record longer ones (--data, --set generate.gen_length=48 --set generate.steps=24)"
        )
    return portrait([mass for _, mass in rows], [trace.row("confidence", i) for i, _ in rows])


def portrait(masses: Sequence[np.ndarray], confidences: Sequence[np.ndarray]) -> Portrait:
    """The rule's numbers, from per sample `(step, layer, segment_key)` attention and `(step, slot)` confidence.

    Confidence is NaN at slots that are not open.
    """
    visual = [np.nan_to_num(mass[:, :, int(Role.VISUAL)]) for mass in masses]
    layers = by_layer([torch.from_numpy(v) for v in visual])
    seen = (layers >= HALF * layers.max()).nonzero()[:, 0].tolist()
    sure = [at for c in confidences if (at := _sure_at(c)) is not None]
    return Portrait(
        samples=len(visual),
        layer_mass=tuple(layers.tolist()),
        seen=tuple(seen),
        looked_until=float(np.mean([_looked_until(v.mean(1)) for v in visual])),
        sure_at=float(np.mean(sure)) if sure else None,
        to_answer=float(np.mean([np.nanmean(m[:, :, int(Role.ANSWER)]) for m in masses])),
        to_visual=float(np.mean([v.mean() for v in visual])),
    )


def _looked_until(by_step: np.ndarray) -> float:
    """The share of the steps behind the last one that reaches half of the greatest."""
    return float((np.flatnonzero(by_step >= HALF * by_step.max())[-1] + 1) / len(by_step))


def _sure_at(confidence: np.ndarray) -> float | None:
    """The share of the steps that are done when the mean confidence of open slots has made its largest rise."""
    known = ~np.isnan(confidence)
    steps = np.flatnonzero(known.any(1))
    means = np.array([confidence[t][known[t]].mean() for t in steps])
    rises = np.diff(means)
    if not len(rises) or rises.max() < NOTICEABLE:
        return None
    return float((steps[int(rises.argmax()) + 1] + 1) / len(confidence))


def advise(found: Portrait, like: Recipe) -> list[Suggestion]:
    """Recipes for the backbone, data and generation of `like`, first the one to begin with."""
    layers, seen = len(found.layer_mass), len(found.seen)
    each = ", ".join(f"{i}: {value:.1%}" for i, value in enumerate(found.layer_mass))
    said = [
        f"Measured on {like.backbone}, data {like.data.source}, {found.samples} samples of at least {FEWEST_STEPS} "
        "steps, unpruned.",
        "Share of the answer's attention on visual tokens, greatest over the steps, by layer: "
        f"{each}. {seen} of {layers} layers reach half of the greatest.",
        f"Averaged over layers it stays above half of its greatest until {found.looked_until:.0%} of the steps. Mean "
        f"over layers and steps: {found.to_visual:.1%} on visual tokens, {found.to_answer:.1%} on the answer itself.",
        _sure_words(found),
    ]
    if seen <= HALF * layers:
        said.append("So attention is concentrated in few layers, as in a model adapted from an autoregressive one.")
        return [_layer_skip(found, like, said)]
    said.append("So attention is spread over the layers, as in a model trained from scratch.")
    return _late(found, like, said)


def _sure_words(found: Portrait) -> str:
    if found.sure_at is None:
        return "The confidence of open slots never rises noticeably from one step to the next."
    return f"The confidence of open slots makes its largest rise by {found.sure_at:.0%} of the steps."


def _layer_skip(found: Portrait, like: Recipe, said: Sequence[str]) -> Suggestion:
    rule = unseen_layers([torch.tensor([found.layer_mass])])
    start = 0.0 if found.looked_until > HALF else _rounded(found.looked_until)
    why = [rule.evidence[-1]]
    if start:
        why.append(f"The answer looks in the first steps above all, so skipping begins at {start:.0%} of the steps.")
    return _suggestion("layer_skip", like, [f"layer={rule.value}", f"start={start}"], [*said, *why])


def _late(found: Portrait, like: Recipe, said: Sequence[str]) -> list[Suggestion]:
    if found.looked_until <= HALF:
        start, why = _rounded(found.looked_until), "The answer looks in the first steps above all; then tokens can go."
    elif found.sure_at is not None:
        start, why = _rounded(found.sure_at), "Pruning begins when the model has become sure of its answer."
    else:
        start, why = HALF, "Neither signal says when, so pruning begins at half of the steps, as in the study's table."
    at = [point for point in (0.25, 0.5, 0.75) if point >= start] or [start]
    spelled = ", ".join(f"{point:.0%}" for point in at)
    return [
        _suggestion("late_step", like, [f"start={start}"], [*said, why]),
        _suggestion("progressive", like, [f"at=[{spelled}]"], [*said, why]),
    ]


def _rounded(share: float) -> float:
    """To the next twentieth; not before 5 % nor after 90 % of the steps."""
    return min(max(np.ceil(round(share * 20, 6)) / 20, 0.05), 0.9)


def _suggestion(name: str, like: Recipe, sets: Sequence[str], said: Sequence[str]) -> Suggestion:
    recipe = load_recipe(f"prune/{name}", sets)
    recipe = recipe.replace(backbone=like.backbone, data=like.data.model_copy(update={"limit": None}))
    if like.generate != Generate():
        recipe = recipe.replace(generate=like.generate)
    return Suggestion(recipe, with_comments(recipe, [f"{recipe.about} ({recipe.paper}).", *said]))


def suggest(trace: Trace) -> list[Suggestion]:
    """What to try on the model that a trace of the unpruned run is of."""
    return advise(portrait_of(trace), parse_recipe(trace.header.recipe_yaml, source=str(trace.path)))
