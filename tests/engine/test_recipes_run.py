"""Every shipped pruner that acts in the language model runs, on one sample and on several, and keeps what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from probe.backbones import load
from probe.backbones.base import Backbone
from probe.compile import ProbeTable, compile_recipe
from probe.decoding.caching import PrefixLM
from probe.generate import Generated, generate
from probe.loop import Rule
from probe.recipe import Recipe, load_recipe, shipped_recipes
from probe.selections import token_count
from probe.site import Fate

IN_THE_ENCODER = ("images", "encoder", "projector")


def in_the_language_model(name: str) -> bool:
    return not any(str(probe.at.site).startswith(IN_THE_ENCODER) for probe in load_recipe(name).probes)


NAMES = [
    info.name
    for info in shipped_recipes()
    if info.name.startswith(("prune/", "study/")) and in_the_language_model(info.name)
]
CACHED = [name for name in NAMES if name.endswith("_lavida")]
"""Recipes for a prefill whose keys are kept."""
STEPS = 4
ALWAYS = {"jump": -1.0, "confidence": 0.0, "below": 1.0}
"""Dials of recipes that wait for a signal, turned so that it comes."""


@pytest.fixture(scope="module")
def miniature() -> Backbone:
    return load("miniature")


@pytest.fixture(scope="module")
def routers(tmp_path_factory: pytest.TempPathFactory, miniature: Backbone) -> Path:
    """Routers of random weights for the miniature; those of the later layers want the picture out."""
    file, width = tmp_path_factory.mktemp("routers") / "routers.safetensors", miniature.facts.width
    tensors, draw = {}, torch.Generator().manual_seed(0)
    for layer in range(miniature.facts.layers):
        tensors |= {f"{layer}.0.weight": torch.randn(4, 2 * width, generator=draw), f"{layer}.0.bias": torch.zeros(4)}
        bias = torch.tensor([0.0, 1.0 if layer >= 3 else -1.0])
        tensors |= {f"{layer}.2.weight": torch.zeros(2, 4), f"{layer}.2.bias": bias}
    save_file(tensors, file)
    return file


def table_of(name: str, backbone: Backbone, routers: Path) -> tuple[Recipe, ProbeTable]:
    recipe = load_recipe(name)
    recipe = recipe.with_sets([f"{dial}={value}" for dial, value in ALWAYS.items() if dial in recipe.dial])
    if "file" in recipe.dial:
        recipe = recipe.with_sets([f"file={routers}"])
    return recipe, compile_recipe(recipe, backbone.facts)


def run(backbone: Backbone, prompts: Any, table: ProbeTable, samples: list[int], **settings: Any) -> list[Generated]:
    rule = Rule(
        **{"gen_length": 8, "block_length": 8, "steps": STEPS} | settings,
        mask_id=backbone.special.mask,
        suppressed=backbone.special.suppressed,
    )
    return generate(backbone, prompts, rule, table, samples=samples)


def settings_of(name: str) -> dict[str, Any]:
    return {"caching": PrefixLM()} if name in CACHED else {}


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs_and_keeps_what_it_says(name: str, miniature: Backbone, routers: Path, prompts_for: Any) -> None:
    recipe, table = table_of(name, miniature, routers)
    prompts = prompts_for(miniature, 2)
    together = run(miniature, prompts, table, [0, 1], **settings_of(name))
    for i, prompt in enumerate(prompts):
        alone = run(miniature, [prompt], table, [i], **settings_of(name))[0]
        assert alone.ids == together[i].ids
        fates, counts = together[i].arrays["visual_kept"], together[i].arrays["visual_tokens"]
        np.testing.assert_array_equal(fates, alone.arrays["visual_kept"])
        assert set(np.unique(fates)) <= {int(f) for f in Fate}
        assert fates.shape[2] == prompt.n_visual
        assert (together[i].arrays["nonfinite"] == 0).all() and not together[i].nan_scores
        kept = (fates == int(Fate.KEPT)).sum(-1)
        assert (counts >= kept).all()
        planned(recipe, prompt.n_visual, kept)


def planned(recipe: Recipe, n: int, kept: np.ndarray) -> None:
    """As many original tokens stay, where a recipe says so by a number or a share."""
    if recipe.name == "none":
        assert (kept == n).all()
        return
    if recipe.name in ("attnreal", "maskkv"):  # these hide from some heads or rows; nothing leaves
        assert (kept == n).all()
        return
    assert kept.min() < n
    keep = recipe.dial.get("keep")
    shares = keep if isinstance(keep, list) else [keep]
    if not all(isinstance(share, int | float) for share in shares):
        return
    if recipe.name.startswith("late_when"):  # when is the model's business, how many the recipe's
        assert set(np.unique(kept)) <= {n, round(shares[0] * n)}
        return
    if getattr(recipe.probes[0].do, "name", "") == "recycle":  # recycled tokens are among the chosen
        assert kept.min() <= token_count(min(shares), n, "floor")
        return
    found = set(np.unique(kept).tolist())
    roundings = ("floor", "half_even", "truncate")
    for share in shares:
        assert any(token_count(share, n, rounding) in found for rounding in roundings) or recipe.name == "dart"
    if recipe.name == "dart":
        assert found - {n} == {recipe.dial["image"] + int(shares[0] * n / 8) * 8}


def keeps_everything_at_one(name: str) -> bool:
    """Whether `keep=1.0` means that every token stays; not for recipes with a list, a count or a rule of their own."""
    recipe = load_recipe(name)
    own_way = recipe.name.startswith(("todre", "dart", "progressive_when"))
    return isinstance(recipe.dial.get("keep"), float) and not own_way


@pytest.mark.parametrize("name", [n for n in NAMES if n not in CACHED and keeps_everything_at_one(n)])
def test_keeping_everything_changes_nothing(name: str, miniature: Backbone, routers: Path, prompts_for: Any) -> None:
    recipe = load_recipe(name)
    prompts = prompts_for(miniature, 1)
    whole = run(miniature, prompts, compile_recipe(recipe.with_sets(["keep=1.0"]), miniature.facts), [0])[0]
    bare = run(miniature, prompts, ProbeTable(()), [0])[0]
    assert whole.ids == bare.ids
    np.testing.assert_array_equal(whole.arrays["confidence"], bare.arrays["confidence"])
