"""Every decode fragment: complete, usable through `include`, and it decodes on a backbone that it fits."""

from __future__ import annotations

import pytest

from probe import vocabulary as _registered  # noqa: F401
from probe.backbones import load
from probe.compile import ProbeTable
from probe.data import load as samples
from probe.errors import ProbeError
from probe.generate import generate
from probe.generation import rule_for
from probe.recipe import Recipe, load_recipe, parse_recipe, recipe_folder, shipped_recipes
from probe.registry import cachings, lengths, unmaskings

NAMES = [info.name for info in shipped_recipes() if info.name.startswith("decode/")]
ELSEWHERE = {"autoregressive": "next token", "flexmdm": "length head"}
"""What the miniature cannot do, and what is said of it."""
SIZES = """
generate: {gen_length: 16, steps: 8, block_length: 8, stop: []}
data: {task: world/mixed, limit: 1}
"""


def including(name: str, more: str = SIZES) -> Recipe:
    return parse_recipe(f"schema: 1\nname: mine\ninclude: {name}\n{more}")


def test_every_policy_has_a_fragment() -> None:
    named: dict[str, set[str]] = {key: set() for key in ("unmask", "cache", "length")}
    for name in NAMES:
        own = load_recipe(name).generate
        for key in named:
            part = getattr(own, key)
            if part is not None:
                named[key].add(part.name)
    built_in = {e.name for e in unmaskings if e.function.__module__.startswith("probe.")}
    assert built_in <= named["unmask"]
    assert {e.name for e in cachings if e.function.__module__.startswith("probe.")} <= named["cache"]
    assert {e.name for e in lengths if e.function.__module__.startswith("probe.")} <= named["length"]


@pytest.mark.parametrize("name", NAMES)
def test_a_fragment_says_what_it_is(name: str) -> None:
    recipe = load_recipe(name)
    text = (recipe_folder() / f"{name}.yaml").read_text()
    assert text.startswith("# ") and recipe.about and recipe.paper
    assert not recipe.probes and name == f"decode/{recipe.name}"
    assert set(recipe.dial) == set(recipe.dials_used)


def test_what_includes_a_fragment_has_the_last_word() -> None:
    mine = including("decode/fast_threshold", "generate: {block_length: 8}\ndial: {tau: 0.7}\n")
    assert mine.generate.block_length == 8
    assert mine.generate.unmask is not None
    assert mine.generate.unmask.name == "threshold" and mine.generate.unmask.params == {"tau": 0.7}
    both = parse_recipe("schema: 1\nname: two\ninclude: [decode/fast_threshold, decode/fast_dual]\n")
    assert both.generate.cache is not None and both.generate.cache.name == "fast_dual"
    with pytest.raises(ProbeError, match="generate.unmask has another value"):
        parse_recipe("schema: 1\nname: two\ninclude: [decode/fast_threshold, decode/prophet]\n")


@pytest.mark.parametrize("name", NAMES)
def test_a_fragment_decodes(name: str) -> None:
    short = name.split("/")[1]
    model, recipe = load("miniature"), including(name)
    if short == "daedal":
        recipe = including(name, "generate: {stop: []}\ndial: {first: 16, block: 8, most: 24, tail: 4}\n")
    if short == "dreamon":
        recipe = including(name, "generate: {gen_length: 16, steps: 32, stop: []}\ndial: {expand: 30, most: 24}\n")
    (sample,) = samples("world/mixed", 1)
    prompt = model.assemble(sample.question, model.encode_images(sample.pictures[:1]))

    def decode() -> list[int]:
        rule = rule_for(model, recipe, {}, pictures=True)
        return generate(model, [prompt], rule, ProbeTable(()))[0].ids

    if short in ELSEWHERE:
        with pytest.raises(ProbeError, match=ELSEWHERE[short]):
            decode()
        return
    ids = decode()
    assert ids
    assert ids.count(model.special.mask) < len(ids) / 2  # the mask token may win here and there, as published
