"""The forecast of a recipe as it stands: for its backbone and its data, without weights."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from probe import data
from probe.backbones import facts_of, visual_count
from probe.backbones.sizes import Habits, dims_of, habits_of
from probe.compile import ProbeTable, compile_recipe
from probe.errors import ProbeError
from probe.forecast import Setting, forecast
from probe.recipe import Recipe
from probe.views.forecast import render

LOOKED_AT = 6
"""Samples of the data that are looked at: the one with the most steps is forecast."""


def outlook(recipe: Recipe, sizes: Sequence[tuple[int, int]] | None = None) -> str | None:
    """What an intervening recipe will leave and cost, in words; None where it changes nothing, or nothing is known.

    `sizes` are (width, height) of a sample's pictures; by default those of the data's first samples.
    """
    facts = facts_of(recipe.backbone)
    table = compile_recipe(recipe, facts)
    habits = habits_of(recipe.backbone)
    if not table.edits or habits is None:
        return None
    setting = setting_of(recipe, table, habits, sizes)
    if setting is None:
        return None
    return render(forecast(table, facts, setting, dims_of(recipe.backbone, facts.vocabulary)))


def setting_of(
    recipe: Recipe, table: ProbeTable, habits: Habits, sizes: Sequence[tuple[int, int]] | None
) -> Setting | None:
    """How large a sample is and how it is generated; None where its pictures are not to be had."""
    sample = _longest(recipe)
    if sizes is None:
        if sample is None or not sample.pictures or sample.frames:
            return None
        sizes = [p.size for p in sample.pictures]
    suggested = dict(sample.generate) if sample is not None else {}
    base_slots, base_steps = suggested.get("gen_length", habits.gen_length), suggested.get("steps", habits.steps)
    own = recipe.generate
    slots = own.gen_length or base_slots
    steps = own.steps or max(1, round(base_steps * slots / base_slots))
    cache = own.cache.name if own.cache is not None else habits.cache
    seen = (list(sizes), [table.shown(size) for size in sizes])
    visual, shown = (visual_count(recipe.backbone, of, **recipe.load) for of in seen)
    return Setting(visual, steps, slots, cache, shown=shown)


def _longest(recipe: Recipe) -> data.Sample | None:
    """Of the data's first samples the one with the most steps; None if it cannot be read (`probe run` says why)."""
    try:
        if recipe.data.hub is not None or recipe.data.lmms_eval is not None:
            return None  # a look must not fetch anything
        few = recipe.data.model_copy(update={"limit": LOOKED_AT})
        samples = list(islice(data.samples(few), LOOKED_AT))
    except ProbeError:
        return None
    return max(samples, key=lambda s: s.generate.get("steps", 0), default=None)
