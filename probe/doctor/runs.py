"""Ways to generate under examination: the backbone's own decoder, with and without its cache, one sample or several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch

from probe.compile import compile_recipe
from probe.decoding.rule import Rule
from probe.doctor.patient import SLOTS, NotHere, Patient, expect
from probe.generate import Generated, generate
from probe.generation import rule_for
from probe.recipe import Recipe, parse_recipe

STEPS = 3
NOTHING = "- {name: sure, at: {site: logits}, record: [confidence]}\n"
RECORD = """
- {name: attention, at: {site: layer.attention, layers: all}, record: [attention_mass, visual_importance]}
- {name: logits, at: {site: logits}, record: [entropy, margin]}
"""
EDITS = {
    "layer": """
- name: edit
  at: {site: layer.input, layer: 1}
  score: {attention: {layer: -1, queries: last}}
  select: {top_k: {keep: 0.5}}
  do: {drop: {lasts: forward}}
""",
    "canvas": """
- name: edit
  at: {site: before_lm}
  score: random
  select: {top_k: {keep: 0.5}}
  do: {drop: {lasts: generation}}
""",
}
"""An intervention inside the decoder, and one before it."""
WITHDRAW = "- {name: edit, at: {site: layer.output, layer: -1}, do: withdraw}\n"


def recipe_of(patient: Patient, probes: str, cache: str) -> Recipe:
    """Probes under the backbone's own decoder, and its cache or none."""
    if not patient.speaks:
        raise NotHere("there is no tokenizer, so no answer can be read")
    causal = patient.backbone.causal
    steps = SLOTS if causal else STEPS
    generate = f"{{gen_length: {SLOTS}, block_length: {SLOTS}, steps: {steps}, stop: [], cache: {cache}}}"
    return parse_recipe(f"schema: 1\nname: doctor\ngenerate: {generate}\nprobes:\n{probes}")


def rule_of(patient: Patient, recipe: Recipe) -> Rule:
    """The rule of a recipe on this backbone."""
    return rule_for(patient.backbone, recipe, {}, pictures=True)


def answers(patient: Patient, count: int, probes: str = NOTHING, cache: str = "none") -> list[Generated]:
    """The first `count` samples under some probes, generated once for all checks that ask."""
    key = count, probes, cache
    if key not in patient.answers:
        patient.answers[key] = generated(patient, range(count), probes, cache)
    return patient.answers[key]


def generated(patient: Patient, numbers: Sequence[int], probes: str, cache: str) -> list[Generated]:
    """Samples of these numbers under some probes, generated now."""
    recipe = recipe_of(patient, probes, cache)
    table = compile_recipe(recipe, patient.backbone.facts)
    prompts = [patient.prompts[i] for i in numbers]
    return generate(patient.backbone, prompts, rule_of(patient, recipe), table, samples=list(numbers))


def own_cache(patient: Patient) -> str:
    """The name of the backbone's own cache, `none` if it has none."""
    return next(iter(patient.backbone.defaults.cache))


def own_and_none(patient: Patient) -> list[str]:
    """No cache, and the backbone's own if it has one."""
    return list(dict.fromkeys(("none", own_cache(patient))))


def batches(patient: Patient) -> tuple[int, ...]:
    """One sample, and all of them where the backbone takes batches."""
    return (1, len(patient.prompts)) if patient.backbone.batches else (1,)


def ways(patient: Patient) -> Iterator[tuple[Callable[[str], list[Generated]], str]]:
    """Every cache with every batch: a function from probes to answers, and what that is called."""
    for cache in own_and_none(patient):
        for count in batches(patient):
            yield partial(answers, patient, count, cache=cache), f"cache {cache}, batch {count}"


def seen_ways(patient: Patient) -> str:
    """The ways in words."""
    return f"cache {', '.join(own_and_none(patient))}; batch {', '.join(map(str, batches(patient)))}"


def same(a: Generated, b: Generated, where: str, names: Sequence[str] = ("token", "confidence")) -> None:
    """Raise `Unwell` unless two answers are the same bit for bit."""
    expect(a.ids == b.ids, f"{where}: the answers are {a.ids} and {b.ids}")
    for name in names:
        equal = np.array_equal(a.arrays[name], b.arrays[name], equal_nan=a.arrays[name].dtype.kind == "f")
        expect(equal, f"{where}: `{name}` is not the same bit for bit")


def alike(patient: Patient, a: Generated, b: Generated, where: str, names: Sequence[str] = ("confidence",)) -> float:
    """Raise `Unwell` unless two answers are the same up to rounding; returns the largest difference of the first step.

    Later steps may differ by ten times as much, for what is predicted is fed back. Where the type is coarse for that
    (`Patient.compares_later`), tokens may fall otherwise, so only the first step is compared.
    """
    if patient.compares_later:
        expect(a.ids == b.ids, f"{where}: the answers are {a.ids} and {b.ids}")
    gap = 0.0
    for name in names:
        x, y = (v.arrays[name] if patient.compares_later else v.arrays[name][:1] for v in (a, b))
        expect(x.shape == y.shape, f"{where}: `{name}` has the shapes {x.shape} and {y.shape}")
        expect(bool((np.isnan(x) == np.isnan(y)).all()), f"{where}: `{name}` is not known at the same places")
        for steps, allowed in ((slice(0, 1), patient.tolerance), (slice(1, None), 10 * patient.tolerance)):
            known = ~np.isnan(x[steps])
            if not known.any():
                continue
            differ = patient.apart(*(torch.from_numpy(v[steps][known]) for v in (x, y)))
            expect(differ <= allowed, f"{where}: `{name}` differs by {differ:.1e}; {allowed:.0e} may be")
            gap = max(gap, differ if steps.start == 0 else 0.0)
    return gap
