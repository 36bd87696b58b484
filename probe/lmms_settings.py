"""How long the study's answers are, benchmark by benchmark: what a recipe says where it says nothing itself."""

from __future__ import annotations

from typing import Any

from probe.recipe import Recipe
from probe.study.printed import backbone_of, generation_of


def with_settings(recipe: Recipe, backbone: str) -> Recipe:
    """The recipe with the study's generation settings for its benchmark, where it says nothing of its own.

    The study's numbers of one backbone class stand for every backbone of that class.
    """
    own, name = recipe.generate, recipe.data.lmms_eval
    if name is None or any(x is not None for x in (own.gen_length, own.block_length, own.steps)):
        return recipe
    found = generation_of(backbone_of(backbone), name)
    if found is None:
        return recipe
    said: dict[str, Any] = {"gen_length": found.gen_length, "block_length": found.block_length, "steps": found.steps}
    if found.think and own.think is None:
        said["think"] = True
    return recipe.with_sets([f"generate.{key}={str(value).lower()}" for key, value in said.items()])
