"""A recipe in plain words says where, when, how many, for how long, and what is recorded."""

from __future__ import annotations

import re

import pytest
from recipe_helpers import FASTV

from probe.compile import Vocabulary
from probe.explain import explain
from probe.recipe import parse_recipe
from probe.site import ModelFacts


@pytest.fixture
def words(vocabulary: Vocabulary, facts: ModelFacts):
    def say(text: str, *sets: str, n_visual: int | None = None, steps: int | None = None) -> str:
        recipe = parse_recipe(text, sets=sets)
        return re.sub(r"\s+", " ", explain(recipe, facts, n_visual, steps=steps, vocabulary=vocabulary))

    return say


def test_everything_known_is_said(words) -> None:
    said = words(FASTV, "start=50%", "generate.steps=24", n_visual=144)
    for part in (
        "fastv on miniature (layers 0..5), 24 denoising steps, 144 visual tokens, data world/mixed",
        "dials: keep = 0.5, start = 50%",
        "1. prune (intervenes) where the input of layer 2",
        "when every step from 50% of the steps on: steps 12..23 (12 of 24)",
        "scores attention: Attention received. [layer -1, queries last, flag false]",
        "keeps 72 of 144 visual tokens (50%), chosen by top",
        "does drop: Take out. [positions keep]",
        "lasts this step only",
        "2. layer.attention@all (records) where the attention of every layer (0..5) when every step (0..23)",
        "records mass: Mass.",
        "records mass_last (the signal mass): Mass. [queries last",
    ):
        assert part in said


def test_what_is_not_known_is_said_in_shares(words) -> None:
    said = words(FASTV, "start=50%")
    assert "as many denoising steps as the task or the backbone sets" in said
    assert "when every step from 50% of the steps on scores" in said
    assert "keeps 50% of the sample's original visual tokens, chosen by top" in said


def test_values_per_layer_and_schedules_are_spelled_out(words) -> None:
    said = words(FASTV, "probes.prune.at.layers=[2,4]", "keep=[36, {0%: 1.0, 50%: 0.25}]", n_visual=144, steps=24)
    assert "where the input of layers 2, 4" in said
    assert "layer 2: 36 visual tokens (of 144); layer 4: from step 0 on 144 of 144 visual tokens (100%)" in said
    assert "from step 12 on 36 of 144 visual tokens (25%); chosen by top" in said


@pytest.mark.parametrize(
    ("steps", "part"),
    [
        ("all", "when every step (0..23)"),
        ("first", "exactly at the first one: step 0 (1 of 24)"),
        ("{from: 1.0}", "never within the 24 nominal steps"),
        ("[2, 30]", "step 2 (1 of 24); 30 beyond the nominal steps, reached only if the decoder runs longer"),
        ("{from: 4, every: 8}", "one step in 8 from step 4 on: steps 4, 12, 20 (3 of 24)"),
        ("{at: [25%, 50%]}", "exactly at 25% of the steps, 50% of the steps: steps 6, 12 (2 of 24)"),
    ],
)
def test_steps_in_words(steps: str, part: str, words) -> None:
    assert part in words(FASTV, f"probes.prune.at.steps={steps}", steps=24)


def test_a_dial_that_stands_nowhere_is_pointed_out(words) -> None:
    assert "start = 0.0 (used nowhere)" in words(FASTV.replace("$start", "0"))


def test_a_recipe_without_probes_and_a_lasting_one(words) -> None:
    assert "no probes: the bare model runs" in words("schema: 1\nname: a\n")
    said = words(
        "schema: 1\nname: a\nprobes: [{at: {site: layer.input, layer: 50%}, do: {withdraw: {lasts: generation}}}]\n"
    )
    assert "keeps none: Nothing. does withdraw: Take all out. lasts the rest of the generation" in said
