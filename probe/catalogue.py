"""The shipped recipes at a glance: what each does, where it acts, its dials. Reads recipes, knows no model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from probe.recipe import ProbeSpec, Recipe, load_recipe, shipped_recipes
from probe.recipe_files import find_recipe, read_bytes
from probe.recipe_yaml import dump_yaml


@dataclass(frozen=True)
class Entry:
    """One recipe: `where` its interventions act (or, if it has none, where it records), what they do there (`steps`:
    score, selection, operation), `dials` with their values.
    """

    name: str
    about: str
    paper: str
    where: tuple[str, ...]
    steps: tuple[str, ...]
    dials: tuple[str, ...]
    path: Path


def catalogue() -> list[Entry]:
    """Every shipped recipe and sweep, sorted by name."""
    infos = sorted([*shipped_recipes(), *shipped_recipes(sweeps=True)], key=lambda info: info.name)
    return [entry_of(info.name, load_recipe(info.path), info.path) for info in infos]


def entry_of(name: str, recipe: Recipe, path: Path) -> Entry:
    """What the list says of a recipe."""
    acting = [p for p in recipe.probes if p.record is None] or list(recipe.probes)
    where = [place(p) for p in acting]
    if recipe.sweep is not None:
        where = [f"sweep over {', '.join(recipe.sweep.backbones or (recipe.backbone,))}"]
    decoding = {k: getattr(recipe.generate, k) for k in ("unmask", "cache", "length")}
    where += [f"{key} {part.name}" for key, part in decoding.items() if part is not None]
    return Entry(
        name,
        recipe.about or "",
        recipe.paper or "",
        tuple(dict.fromkeys(where)) or ("nowhere: settings alone",),
        tuple(dict.fromkeys(steps(p) for p in acting)),
        tuple(f"{k}={_flow(v)}" for k, v in recipe.dial.items()),
        path,
    )


def steps(probe: ProbeSpec) -> str:
    """Score, selection and operation by their names (`attention > top_k > drop`), or what is recorded."""
    if probe.record is not None:
        return "records " + ", ".join(part.name for part in probe.record)
    parts = [part for part in (probe.score, probe.select, probe.do) if part is not None]
    return " > ".join(_named(part.name, part.params) for part in parts)


def _named(name: str, params: object) -> str:
    """A part's name, with those of the parts that it combines."""
    inside = params.get("of") if isinstance(params, dict) else None
    items = inside if isinstance(inside, list) else [inside] if isinstance(inside, dict) else []
    names = [_named(*next(iter(item.items()))) if isinstance(item, dict) else str(item) for item in items]
    return f"{name}({', '.join(names)})" if names else name


def place(probe: ProbeSpec) -> str:
    """Where a probe acts, in a few words: `layer.input 2`, `final`."""
    at = probe.at
    if at.where is None:
        return str(at.site)
    named = at.where.spelled_one() if at.layer is not None else at.where.spelled()
    if isinstance(named, dict):
        to, every = named.get("to"), named.get("every", 1)
        said = f"{_share(named['from'])}..{'' if to is None else _share(to)}"
        return f"{at.site} {said}" + (f", one in {every}" if every > 1 else "")
    return f"{at.site} {', '.join(map(_share, named)) if isinstance(named, list) else _share(named)}"


def _share(value: object) -> str:
    return f"{100 * value:.6g}%" if isinstance(value, float) else str(value)


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
