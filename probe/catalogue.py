"""The shipped recipes at a glance: what each does, where it acts, its dials. Reads recipes, knows no model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from probe.recipe import ProbeSpec, Recipe, load_recipe, shipped_recipes
from probe.recipe_files import find_recipe, read_bytes
from probe.recipe_yaml import dump_yaml


@dataclass(frozen=True)
class Entry:
    """One recipe: `where` its interventions act (or, if it has none, where it records), `dials` with their values."""

    name: str
    about: str
    paper: str
    where: tuple[str, ...]
    dials: tuple[str, ...]
    path: Path


def catalogue() -> list[Entry]:
    """Every shipped recipe, sorted by name."""
    return [entry_of(info.name, load_recipe(info.path), info.path) for info in shipped_recipes()]


def entry_of(name: str, recipe: Recipe, path: Path) -> Entry:
    """What the list says of a recipe."""
    acting = [p for p in recipe.probes if p.record is None] or list(recipe.probes)
    where = [place(p) for p in acting]
    decoding = {k: getattr(recipe.generate, k) for k in ("unmask", "cache", "length")}
    where += [f"{key} {part.name}" for key, part in decoding.items() if part is not None]
    return Entry(
        name,
        recipe.about or "",
        recipe.paper or "",
        tuple(dict.fromkeys(where)) or ("nowhere: settings alone",),
        tuple(f"{k}={_flow(v)}" for k, v in recipe.dial.items()),
        path,
    )


def place(probe: ProbeSpec) -> str:
    """Where a probe acts, in a few words: `layer.input 2`, `final`."""
    at = probe.at
    if at.where is None:
        return str(at.site)
    named = at.where.spelled_one() if at.layer is not None else at.where.spelled()
    if isinstance(named, float):
        named = f"{100 * named:.6g}%"
    if isinstance(named, list):
        named = ", ".join(f"{100 * x:.6g}%" if isinstance(x, float) else str(x) for x in named)
    return f"{at.site} {_flow(named)}"


def _flow(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return dump_yaml(value).split("\n")[0] if isinstance(value, bool) or value is None else str(value)


def source_of(name: str) -> tuple[Path, str]:
    """The file of a recipe, shipped or not, and its text."""
    path = find_recipe(name)
    return path, read_bytes(path).decode("utf-8", "replace")
