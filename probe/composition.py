"""What of a recipe cannot work together: its interventions and its cache. Said before anything runs, with the place."""

from __future__ import annotations

from probe.backbones.base import GenerationDefaults
from probe.backbones.sizes import habits_of
from probe.backbones.traits import traits_of
from probe.compile import BoundProbe, ProbeTable, compile_recipe
from probe.decoding.dllm_cache import DllmCache
from probe.decoding.fit import misfit, name_of
from probe.decoding.policy import Caching
from probe.generation import check_cache, policies
from probe.inputs import asked, reads_prompt
from probe.recipe import Recipe
from probe.site import Clock, ModelFacts, Phase, Site

NO_ONE_YET = ("masked", "answer", "filled", "predicting")
"""Rows that are not there while a prompt is computed alone."""


def check_without_weights(recipe: Recipe, facts: ModelFacts) -> None:
    """The same, and whether the decoding policies fit the backbone, as far as its class alone tells."""
    traits = traits_of(recipe.backbone)
    defaults, habits = traits.defaults, habits_of(recipe.backbone)
    known = defaults is not None or habits is not None
    if defaults is None:
        defaults = GenerationDefaults() if habits is None else GenerationDefaults(cache={habits.cache: {}})
    unmasking, caching, _ = policies(recipe, defaults)
    shift = traits.shift
    if shift is not None and (found := misfit(unmasking, caching, shift=shift, causal=traits.causal)) is not None:
        raise recipe.fault(("generate", found[0]), found[1])
    if known or recipe.generate.cache is not None:
        check_cache(recipe, caching)
    table = compile_recipe(recipe, facts)
    check_composition(recipe, table, caching, recipe.generate.steps or defaults.steps)


def check_composition(recipe: Recipe, table: ProbeTable, caching: Caching, steps: int) -> None:
    """Raise `ProbeError` for the first intervention that this cache cannot serve over `steps` nominal steps."""
    for probe in table.edits:
        why = _never_again(probe, caching, steps) or _inside_layers(probe, caching)
        if why is not None:
            number = next(i for i, spec in enumerate(recipe.probes) if spec.name == probe.name)
            raise recipe.fault(("probes", number), f"{why}; see `generate.cache`")


def _clock(step: int, steps: int, phase: Phase) -> Clock:
    share = min(1.0, step / steps)
    return Clock(step, step, 0, step, steps, 1, phase, (share,))


def _never_again(probe: BoundProbe, caching: Caching, steps: int) -> str | None:
    """An intervention that reads prompt rows, and begins when they are not computed any more."""
    if not caching.stores or caching.renews or probe.edit is None or probe.when:
        return None
    why = f"the cache `{name_of(caching)}` computes the prompt once, before the first step"
    if probe.fires(clock := _clock(0, steps, Phase.PREFILL)):
        for _, params in asked(probe.edit, clock):
            if params.get("projected") and params.get("queries") in NO_ONE_YET:
                return f"looks ahead from `{params['queries']}` rows, but {why}, and without the answer"
        return None  # it acts while the prompt is computed, and what it removed stays away
    for step in range(steps):
        clock = _clock(step, steps, Phase.DENOISE)
        if probe.fires(clock) and (reason := reads_prompt(probe.edit, probe.site, clock)):
            return f"{reason} from step {step} on, but {why}"
    return None


def _inside_layers(probe: BoundProbe, caching: Caching) -> str | None:
    """What needs a layer to run as a whole."""
    if not isinstance(caching, DllmCache) or probe.edit is None:
        return None
    if probe.site is Site.LAYER_AFTER_ATTENTION:
        return "acts between attention and MLP, whose outputs `dllm_cache` stores for every row"
    if probe.edit.do.entry.meta.get("changes") == "attention":
        return "changes attention rows, some of which `dllm_cache` does not compute"
    if any(params.get("as_keys") for params in probe.edit.do.variants):
        return "carries tokens around an MLP alone, whose outputs `dllm_cache` stores for every row"
    return None
