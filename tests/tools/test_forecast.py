"""A forecast is what the run then does: for every shipped recipe whose counts do not depend on the picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from probe import data
from probe.backbones.base import Backbone
from probe.backbones.lavida import DREAM_DEFAULTS, LLADA_DEFAULTS
from probe.backbones.sizes import PUBLISHED, dims_of, habits_of
from probe.compile import compile_recipe
from probe.encoder import encode_with_probes
from probe.forecast import Setting, forecast
from probe.generate import Generated, generate
from probe.loop import Rule
from probe.outlook import setting_of
from probe.recipe import load_recipe, parse_recipe, shipped_recipes
from probe.site import ModelFacts
from probe.timing import PHASES
from probe.views.forecast import render

STEPS, SLOTS = 4, 8
RECIPES = [i.name for i in shipped_recipes() if i.name.startswith(("prune/", "study/"))]
WITHOUT_CACHE = [n for n in RECIPES if not n.endswith("_lavida")]


def run(backbone: Backbone, table: Any) -> tuple[Generated, Any]:
    (sample,) = data.load("world/colour", 1)
    prompt = backbone.encode(sample.images, sample.question)
    rule = Rule(
        gen_length=SLOTS,
        block_length=SLOTS,
        steps=STEPS,
        mask_id=backbone.special.mask,
        suppressed=backbone.special.suppressed,
    )
    return generate(backbone, [prompt], rule, table)[0], prompt


@pytest.fixture(scope="module")
def unpruned(miniature: Backbone) -> tuple[Generated, Any]:
    return run(miniature, compile_recipe(load_recipe("none"), miniature.facts))


def executed(result: Generated) -> float:
    return float(result.arrays["flops"][:, [PHASES.index("backbone"), PHASES.index("head")]].sum())


@pytest.mark.parametrize("name", WITHOUT_CACHE)
def test_the_counts_are_those_of_the_run(name: str, miniature: Backbone, unpruned: tuple[Generated, Any]) -> None:
    recipe = load_recipe(name)
    if any(p.at.when for p in recipe.probes) or "file" in recipe.dial:
        pytest.skip("waits for a signal, or needs weights")
    if any(p.at.site.in_encoder for p in recipe.probes):
        pytest.skip("acts in the encoder, see below")
    table = compile_recipe(recipe, miniature.facts)
    bare, prompt = unpruned
    text = prompt.embeds.shape[0] - prompt.n_visual
    setting = Setting(prompt.n_visual, STEPS, SLOTS, text=text)
    found = forecast(table, miniature.facts, setting, dims_of("miniature", miniature.facts.vocabulary))
    result, _ = run(miniature, table)
    if not found.unsure:
        np.testing.assert_array_equal(found.tokens, result.arrays["visual_tokens"])
        assert found.flops == pytest.approx(executed(result) / executed(bare), rel=2e-3)
    assert set(found.unsure) <= {p.name for p in recipe.probes}
    assert ("prune" in found.unsure) == (name == "prune/sparsevlm_rank")


def test_most_recipes_are_compared() -> None:
    assert len(WITHOUT_CACHE) > 25


def test_the_encoder_hands_on_what_its_views_keep(miniature: Backbone) -> None:
    patches = miniature.facts.patches
    for name, keep in (("tome", None), ("fastervlm", "keep=0.25"), ("visionzip", "keep=0.5")):
        recipe = load_recipe(name, [keep] if keep else [])
        found = forecast(compile_recipe(recipe, miniature.facts), miniature.facts, Setting(5 * patches, 2, 4))
        expected = 36 - 3 * recipe.dial["r"] if name == "tome" else int(recipe.dial["keep"] * patches)
        assert (found.tokens == 5 * expected).all()
    found = forecast(compile_recipe(load_recipe("prumerge"), miniature.facts), miniature.facts, Setting(180, 2, 4))
    assert "depends on the picture" in found.unsure["prune"]


@pytest.mark.parametrize(("size", "scale"), [((96, 96), 0.5), ((96, 48), 0.7), ((200, 100), 0.3), ((40, 90), 0.1)])
def test_a_smaller_picture_is_foreseen_as_it_is_encoded(
    size: tuple[int, int], scale: float, miniature: Backbone, probe_command: Callable[..., str]
) -> None:
    recipe = load_recipe("downsample", [f"scale={scale}"])
    table = compile_recipe(recipe, miniature.facts)
    image = Image.effect_noise(size, 60).convert("RGB")
    prompt = encode_with_probes(miniature, [image], table).assemble(miniature, "what?")
    habits = habits_of("miniature")
    assert habits is not None
    setting = setting_of(recipe, table, habits, [size])
    assert setting is not None
    found = forecast(table, miniature.facts, setting)
    assert (setting.visual, setting.shown) == (prompt.n_original, prompt.n_visual)
    assert (found.tokens == prompt.n_visual).all()
    assert not found.unsure
    picture = "x".join(map(str, size))
    said = probe_command("check", "downsample", "--set", f"scale={scale}", "--picture", picture)
    assert f"{prompt.n_visual} in every layer" in " ".join(said.split())
    assert "unsure" not in said


def test_retention_is_that_of_the_closed_form() -> None:
    """FastV after K of L layers: nominal rho, layer average (K + (L - K) rho) / L, at every step."""
    facts = ModelFacts("m", 32, 32, 4096, 1000, encoder_layers=0)
    found = forecast(compile_recipe(load_recipe("fastv", ["keep=0.5"]), facts), facts, Setting(1000, 8, 16))
    assert (found.nominal, found.layer_average) == (0.5, pytest.approx((2 + 30 * 0.5) / 32))
    assert found.trajectory_average == pytest.approx(found.layer_average)
    late = forecast(compile_recipe(load_recipe("late_step", ["keep=0.25"]), facts), facts, Setting(1000, 8, 16))
    assert late.trajectory_average == pytest.approx(0.5 * 1 + 0.5 * 0.25)
    study = forecast(compile_recipe(load_recipe("study_vtw"), facts), facts, Setting(1000, 8, 16))
    assert (study.nominal, study.layer_average) == (0.0, 0.5)
    assert study.trajectory_average == pytest.approx(0.5 / 8)


def test_parts_of_ones_own_that_cannot_be_foreseen_are_said_to_be() -> None:
    facts = ModelFacts("m", 4, 4, 64, 100, encoder_layers=0)
    text = (
        "schema: 1\nname: x\nprobes: [{name: p, at: {site: layer.output, layer: 1}, "
        "score: {learned: {file: none.bin}}, select: {threshold: {value: 0.0}}, do: drop}]"
    )
    found = forecast(compile_recipe(parse_recipe(text), facts), facts, Setting(100, 2, 4))
    assert "cannot be foreseen" in found.unsure["p"]
    assert "unsure  `p`" in render(found)


@pytest.mark.parametrize("name", [n for n in PUBLISHED if "lavida" in n.lower()])
def test_habits_that_no_class_says_are_the_decoders(name: str) -> None:
    for defaults in (DREAM_DEFAULTS, LLADA_DEFAULTS):
        said = (defaults.gen_length, defaults.steps, next(iter(defaults.cache)))
        found = habits_of(name)
        assert found is not None
        assert said == (found.gen_length, found.steps, found.cache)


def test_sizes_without_weights_are_those_with(miniature: Backbone) -> None:
    assert dims_of("miniature", miniature.facts.vocabulary) == miniature.costs
    for name in PUBLISHED:
        dims = dims_of(name, 1000)
        assert dims is not None
        assert dims.width % dims.heads == 0
        assert habits_of(name) is not None
    assert dims_of("Qwen/Qwen2.5-VL-7B-Instruct", 1000) is None


def test_check_tells_the_forecast_and_what_a_cache_rules_out(probe_command: Callable[..., str]) -> None:
    said = " ".join(
        probe_command("check", "fastv", "--set", "keep=64", "-b", "GSAI-ML/LLaDA-V", "--picture", "640x480").split()
    )
    assert "forecast for 2929 visual tokens, 24 steps, 48 answer slots" in said
    assert "2929 in layers 0..1, 64 in layers 2..31" in said
    dream = ("-b", "jacklishufan/lavida-dream-v1.0-instruct", "--picture", "640x480")
    assert "attention from `raters` rows" in " ".join(probe_command("check", "sparsevlm", *dream).split())
    assert "cannot" not in probe_command("check", "divprune", *dream)
    assert "forecast" not in probe_command("check", "record/confidence")
