"""The `sweep` of a recipe: lists of recipes, backbones, data, dial values and seeds, to be run in every combination."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from probe.recipe_parts import Section
from probe.recipe_words import Wrong, describe

MOST_CELLS = 10_000
"""Runs of one sweep."""
Scalar = bool | int | float | str | None


def _many(value: Any) -> Any:
    """One name is a list of one."""
    return [value] if isinstance(value, str) else value


def _entries(value: Any) -> Any:
    """A recipe's name alone stands for `{recipe: NAME}`."""
    if isinstance(value, str | dict):
        value = [value]
    return [{"recipe": v} if isinstance(v, str) else v for v in value] if isinstance(value, list) else value


def _values(value: Any) -> Any:
    """Dials with the list of their values; one value is a list of one."""
    if not isinstance(value, dict):
        return value
    for name, values in value.items():
        if values == []:
            raise Wrong(f"the list of values of `{name}` is empty", name)
        if isinstance(values, dict):
            raise Wrong(f"`{name}` should be a value or a list of values, but is {describe(values)}", name)
    return {name: values if isinstance(values, list) else [values] for name, values in value.items()}


Names = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False), BeforeValidator(_many)]
Values = Annotated[dict[str, list[Any]], BeforeValidator(_values)]


class Entry(Section):
    """One recipe of a sweep, with what is its own: dial values, settings (`generate.cache: prefix`), where it runs."""

    recipe: str = Field(min_length=1)
    label: str | None = Field(default=None, min_length=1)
    dial: Values = Field(default_factory=dict)
    set: dict[str, Scalar] = Field(default_factory=dict)
    backbones: Names = ()
    data: Names = ()


class Sweep(Section):
    """What is varied. What is left out is as the recipe itself has it."""

    recipes: Annotated[tuple[Entry, ...], Field(strict=False), BeforeValidator(_entries)] = ()
    backbones: Names = ()
    data: Names = ()
    dial: Values = Field(default_factory=dict)
    set: Values = Field(default_factory=dict)
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)] = ()
    shards: int = Field(default=1, ge=1, le=10_000)
    baseline: bool = True

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        for key in ("backbones", "data", "seeds"):
            listed = getattr(self, key)
            if twice := [v for i, v in enumerate(listed) if v in listed[:i]]:
                raise Wrong(f"names {twice[0]} twice", key)
        for name in self.set:
            if name == "generate.seed" or not name.startswith(("generate.", "load.")):
                words = f"`{name}` is no setting of `generate` or `load`; dials stand under `dial`, seeds under `seeds`"
                raise Wrong(words, "set", name)
        for i, entry in enumerate(self.recipes):
            for key in ("backbones", "data"):
                if strange := [v for v in getattr(entry, key) if v not in getattr(self, key)]:
                    known = ", ".join(getattr(self, key)) or "none is listed"
                    raise Wrong(f"`{strange[0]}` is not among the sweep's {key} ({known})", "recipes", i, key)
        return self
