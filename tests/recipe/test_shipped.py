"""Every shipped recipe loads, compiles on models of several depths, and says what it does; the docs' snippets load."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from recipe_helpers import clock

from probe.compile import compile_recipe
from probe.explain import explain
from probe.recipe import load_recipe, parse_recipe, recipe_folder, shipped_recipes
from probe.site import ModelFacts, Site

NAMES = [info.name for info in shipped_recipes()]
DOCS = Path(__file__).parents[2] / "docs" / "recipes.md"
MODELS = [
    ModelFacts("miniature", 6, 4, 64, 100, encoder_layers=4, patches=36, text_tower=True),
    ModelFacts("llada_v", 32, 32, 4096, 126464, encoder_layers=26, patches=729, text_tower=True),
]


def in_encoder(name: str) -> bool:
    """Whether a recipe acts while pictures are encoded: before the first step, so it has no start."""
    return any(probe.at.site.in_encoder for probe in load_recipe(name).probes)


@pytest.mark.parametrize("facts", MODELS, ids=lambda f: f.name)
@pytest.mark.parametrize("name", NAMES)
def test_shipped_recipes_compile_and_explain_themselves(name: str, facts: ModelFacts) -> None:
    recipe = load_recipe(name)
    assert recipe.about
    assert name.rsplit("/", 1)[-1] == recipe.name
    assert parse_recipe(recipe.to_yaml()) == recipe
    assert compile_recipe(recipe, facts).probes or name.startswith("decode/")  # these say how to decode
    said = explain(recipe, facts, 144, steps=24)
    assert all(probe.name in said for probe in recipe.probes)
    assert "used nowhere" not in said


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("prune/")])
def test_pruners_open_with_a_comment_and_have_the_common_dials(name: str) -> None:
    text = (recipe_folder() / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    recipe = load_recipe(name)
    assert {"keep", "layer", "r", "side", "scale"} & set(recipe.dial) or recipe.name == "blind"  # keeps none anywhere
    if in_encoder(name) or "site: images" in text:  # before the first step
        assert "start" not in recipe.dial
    elif recipe.name not in ("progressive", "maskkv"):  # which say at which steps they act
        assert recipe.dial["start"] == (0.5 if recipe.name in ("late_step", "blind") else 0.0)


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("record/")])
def test_recording_recipes_change_nothing(name: str) -> None:
    assert compile_recipe(load_recipe(name), MODELS[0]).edits == ()


def test_fastv_is_as_published() -> None:
    (probe,) = compile_recipe(load_recipe("fastv", ["keep=0.25"]), MODELS[1]).probes
    assert (probe.site, probe.layer) == (Site.LAYER_INPUT, 2)
    assert probe.edit is not None
    assert probe.edit.score is not None
    score = probe.edit.score.params(clock(0))
    assert (score["layer"], score["queries"], score["heads"], score["form"]) == (-1, "last", "mean", "softmax")
    assert probe.edit.select.params(clock(0))["keep"] == 0.25
    do = probe.edit.do.params(clock(0))
    assert (do["positions"], do["order"], do["lasts"]) == ("keep", "raster", "forward")
    assert load_recipe("fastv", ["queries=masked"]).probes[0].score.params["queries"] == "masked"  # type: ignore[union-attr]


def test_divprune_is_as_published() -> None:
    (probe,) = compile_recipe(load_recipe("divprune"), MODELS[1]).probes
    assert probe.site is Site.BEFORE_LM
    assert probe.edit is not None
    assert probe.edit.score is not None
    assert probe.edit.score.params(clock(0))["space"] == "embedding"
    select = probe.edit.select.params(clock(0))
    assert (select["round"], select["start"]) == ("half_even", "max_nearest")
    do = probe.edit.do.params(clock(0))
    assert (do["positions"], do["order"], do["lasts"]) == ("compact", "raster", "generation")


def test_vtw_withdraws_in_the_middle() -> None:
    assert [compile_recipe(load_recipe("vtw"), m).probes[0].layer for m in MODELS] == [3, 16]
    assert compile_recipe(load_recipe("vtw", ["layer=15"]), MODELS[1]).probes[0].layer == 15


def test_the_quickstart_prunes_from_half_of_the_steps_on_and_records() -> None:
    recipe = load_recipe("quickstart")
    assert recipe.data.limit == 12
    table = compile_recipe(recipe, MODELS[0])
    assert [p.name for p in table.at(clock(11)) if p.edit] == []
    assert [p.name for p in table.at(clock(12)) if p.edit] == ["prune"]
    assert set(table.variables) == {"attention_mass", "visual_importance", "entropy", "margin", "logit_kl"}


SNIPPETS = re.findall(r"```yaml\n(.*?)```", DOCS.read_text(), flags=re.DOTALL) if DOCS.exists() else []


def test_the_page_has_snippets() -> None:
    assert len(SNIPPETS) >= 8


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda s: s.strip().split("\n")[0][:40])
def test_every_snippet_of_the_page_is_valid(snippet: str) -> None:
    """Whole recipes load as they are; probes and other parts are put into a recipe with the page's dials."""
    if not snippet.startswith("schema:"):
        frame = "schema: 1\nname: snippet\n"
        if re.match(r"- ", snippet):
            frame += "probes:\n"
        if "dial:" not in snippet:
            frame = frame.replace("name: snippet\n", "name: snippet\ndial: {keep: 0.5, start: 0.0}\n")
        snippet = frame + snippet
    recipe = parse_recipe(snippet)
    compile_recipe(recipe, MODELS[1])
    explain(recipe, MODELS[1], 729, steps=64)
