"""What a recipe, a task and a backbone say about generating, to the `Rule` of one generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast, get_args

from probe import vocabulary as _registered  # noqa: F401  (the built-in policies must be known)
from probe.backbones.base import Backbone, GenerationDefaults
from probe.compile_call import bind
from probe.decoding.caching import NoCache
from probe.decoding.fit import misfit
from probe.decoding.policy import Caching, Length, Unmasking
from probe.decoding.rule import Rule
from probe.decoding.unmask import Remasking
from probe.recipe import Part, Recipe
from probe.recipe_words import Wrong
from probe.registry import Registry, cachings, lengths, nearest, unmaskings
from probe.site import Site

MASK = "[MASK]"
"""What stands for an open slot in `generate.answer`."""


def rule_for(backbone: Backbone, recipe: Recipe, suggested: Mapping[str, int], *, pictures: bool) -> Rule:
    """The loop's settings for one sample: the recipe's, else the task's suggestion, else the backbone's own.

    A `gen_length` of the recipe's own takes one block and the suggested steps in proportion, unless it says otherwise.
    """
    own, defaults = recipe.generate, backbone.defaults
    base = {
        "gen_length": defaults.gen_length,
        "block_length": defaults.block_length,
        "steps": defaults.steps,
    } | dict(suggested)
    given = _given_answer(backbone, recipe)
    gen_length = own.gen_length or (len(given) if given else base["gen_length"])
    if given and len(given) > gen_length:
        words = f"the answer has {len(given)} tokens and masks, more than gen_length {gen_length}"
        raise recipe.fault(("generate", "answer"), words)
    changed = gen_length != base["gen_length"]
    block_length = own.block_length or (gen_length if changed else base["block_length"])
    in_proportion = max(1, round(base["steps"] * gen_length / base["gen_length"]))
    steps = own.steps or (in_proportion if changed else base["steps"])
    ends = pictures or backbone.causal or defaults.stop_without_pictures
    stop = own.stop if own.stop is not None else (defaults.stop if ends else ())
    remasking = own.remasking or "low_confidence"
    if remasking not in get_args(Remasking):
        raise recipe.fault(("generate", "remasking"), f"is `{remasking}`; known: {', '.join(get_args(Remasking))}")
    unmasking, caching, length = policies(recipe, defaults)
    check_reach(backbone, recipe, caching)
    rule = Rule(
        gen_length=gen_length,
        block_length=block_length,
        steps=steps,
        mask_id=backbone.special.mask,
        suppressed=backbone.special.suppressed,
        temperature=own.temperature or 0.0,
        remasking=cast(Remasking, remasking),
        cfg_scale=own.cfg_scale or 0.0,
        stop=tuple(tuple(backbone.tokenize(s)) for s in stop),
        suffix=tuple(backbone.tokenize(own.suffix)) if own.suffix else (),
        eos=backbone.special.eos,
        prior=tuple((i, token) for i, token in enumerate(given or ()) if token is not None),
        vocabulary=backbone.facts.vocabulary,
        unmasking=unmasking,
        caching=caching,
        length=length,
    )
    caching.check(rule, backbone.shift)
    if (found := misfit(unmasking, caching, shift=backbone.shift, causal=backbone.causal)) is not None:
        raise recipe.fault(("generate", found[0]), found[1])
    return rule


def check_reach(backbone: Backbone, recipe: Recipe, caching: Caching) -> None:
    """Raise `ProbeError` where an intervention waits for a pass, or for rows, that this way of decoding never has."""
    check_cache(recipe, caching)
    for i, probe in enumerate(recipe.probes):
        if probe.record is not None or not backbone.causal:
            continue
        words = "`masked` rows never come: {} writes one token after the other; try `last`, or `answer`"
        for j, condition in enumerate(probe.at.when):
            if condition.source == "masked":
                raise recipe.fault(("probes", i, "at", "when", j, "from"), words.format(backbone.facts.name))
        for key in ("score", "select", "do"):
            part = getattr(probe, key)
            if part is not None and "masked" in _named(part.params, "queries") | _named(part.params, "from"):
                raise recipe.fault(("probes", i, key), words.format(backbone.facts.name))


def check_cache(recipe: Recipe, caching: Caching) -> None:
    """Raise `ProbeError` where an intervention waits for a cache, and there is none."""
    for i, probe in enumerate(recipe.probes):
        if probe.record is not None or not isinstance(caching, NoCache):
            continue
        if probe.at.steps.exactly == ("prefill",):
            words = "`prefill` is when the prompt is computed for a cache, and there is none: set `generate.cache`"
            raise recipe.fault(("probes", i, "at", "steps"), words)
        if probe.at.site is Site.PREFIX_CACHE:
            words = "`prefix_cache` is where keys are stored, and there is no cache: set `generate.cache`"
            raise recipe.fault(("probes", i, "at", "site"), words)


def _named(params: Any, key: str) -> set[str]:
    """What stands behind a key anywhere in nested parameters."""
    if isinstance(params, Mapping):
        given = params.get(key)
        listed = given if isinstance(given, list | tuple) else [given]
        own = {word for word in listed if isinstance(word, str)}
        return own.union(*(_named(value, key) for value in params.values()))
    return set().union(*(_named(item, key) for item in params)) if isinstance(params, list | tuple) else set()


def policies(recipe: Recipe, defaults: GenerationDefaults) -> tuple[Unmasking, Caching, Length]:
    """How a recipe decodes: its own policies, else the backbone's. Faults carry their place in the recipe."""
    own = recipe.generate
    return (
        cast(Unmasking, _policy(recipe, unmaskings, "unmask", own.unmask, defaults.unmask)),
        cast(Caching, _policy(recipe, cachings, "cache", own.cache, defaults.cache)),
        cast(Length, _policy(recipe, lengths, "length", own.length, {"fixed": {}})),
    )


def _policy(
    recipe: Recipe, registry: Registry, key: str, part: Part | None, default: Mapping[str, Mapping[str, Any]]
) -> Any:
    if part is None:
        ((name, params),) = default.items()
        return registry[name].function(**params)
    if part.name not in registry:
        known = nearest(part.name, registry.names())
        raise recipe.fault(("generate", key), f"there is no {registry.kind} policy `{part.name}`; {known}")
    try:
        call = bind(registry[part.name], part.params, 0, 1, varies=False)
    except Wrong as error:
        words = str(error)
        path = ("generate", key, part.name, *error.path)
        raise recipe.fault(path, words, key=words.startswith("unknown")) from None
    return call.entry.function(**call.segments[0][1])


def _given_answer(backbone: Backbone, recipe: Recipe) -> list[int | None] | None:
    """The answer that a recipe gives in part: a token per slot, None where it is open."""
    given = recipe.generate.answer
    if given is None:
        return None
    if isinstance(given, str):
        out: list[int | None] = []
        for i, piece in enumerate(given.split(MASK)):
            out += [None] if i else []
            out += backbone.tokenize(piece) if piece else []
        return out
    last = max(given, default=-1)
    slots: list[int | None] = [None] * (last + 1)
    for slot, token in given.items():
        ids: Sequence[int] = [token] if isinstance(token, int) else backbone.tokenize(token)
        if len(ids) != 1 or not 0 <= ids[0] < backbone.facts.vocabulary:
            words = f"{token!r} is {len(ids)} tokens" if len(ids) != 1 else f"there is no token {ids[0]}"
            raise recipe.fault(("generate", "answer", slot), f"{words}; one token belongs at each slot")
        slots[slot] = ids[0]
    return slots
