"""What a sweep consists of: every combination as a recipe of its own, where its traces go, what is done. Runs nothing.

A sweep is a recipe with a `sweep` section (`probe.recipe_sweep`). A *cell* is one combination: one recipe on one
backbone and data with one value of every dial; a *unit* is a cell's shard, the smallest piece of work.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from probe.backbones import facts_of
from probe.compile import compile_recipe
from probe.data import named
from probe.errors import ProbeError
from probe.lmms_settings import with_settings
from probe.recipe import Recipe, load_recipe
from probe.recipe_sweep import MOST_CELLS, Entry, Sweep
from probe.recipe_yaml import KeyPath
from probe.registry import nearest
from probe.site import ModelFacts
from probe.trace import open_trace

UNPRUNED = "unpruned"


@dataclass(frozen=True)
class Group:
    """What the runs of one table have in common: they answer the same questions."""

    backbone: str
    data: str
    seed: int
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def title(self) -> str:
        """`miniature, world/short, steps 12`, and the seed unless it is 0."""
        said = [self.backbone, self.data, *([f"seed {self.seed}"] if self.seed else []), *self.settled]
        return ", ".join(said)

    @property
    def settled(self) -> list[str]:
        """What the sweep varies of the settings: `steps 12`."""
        return [f"{name.partition('.')[2]} {_word(value)}" for name, value in self.settings]


@dataclass(frozen=True)
class Cell:
    """One combination. `label` is the recipe's name in the table, `dials` the values that this sweep gives it."""

    recipe: Recipe
    group: Group
    label: str
    dials: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """`fastv keep=25%`."""
        return " ".join([self.label, *(f"{k}={_word(v)}" for k, v in self.dials.items())])

    @property
    def is_baseline(self) -> bool:
        """Whether nothing is pruned in it."""
        return self.label == UNPRUNED

    @property
    def folder(self) -> str:
        """The name of its folder: readable, and different for whatever differs in what is done to a sample."""
        words = [Path(self.group.backbone).name, self.group.data, *self.group.settled, self.title]
        readable = re.sub(r"[^A-Za-z0-9.=%+]+", "-", " ".join(words)).strip("-.")[:80]
        return f"{readable}-{self.recipe.hash[:8]}"

    def own_baseline(self, root: Path) -> Path:
        """The trace of the unpruned run that takes turns with this one, where the recipe wants one."""
        path = self.trace(root)
        return path.with_name(path.name.replace(".trace.h5", ".baseline.trace.h5"))

    def trace(self, root: Path, shard: tuple[int, int] | None = None) -> Path:
        """The trace of the cell, or of one of its shards."""
        stem = self.recipe.name.replace("/", "-") + ("" if shard is None else f".shard{shard[0]}of{shard[1]}")
        return root / self.folder / f"{stem}.trace.h5"


@dataclass(frozen=True)
class Unit:
    """A cell, or one shard (i, n) of it."""

    cell: Cell
    shard: tuple[int, int] | None = None

    @property
    def title(self) -> str:
        """The cell's, and which shard."""
        words = f"{self.cell.group.title}: {self.cell.title}"
        return words if self.shard is None else f"{words}, shard {self.shard[0]} of {self.shard[1]}"


def cells_of(recipe: Recipe) -> list[Cell]:
    """All combinations, by backbone, data and seed, the unpruned run first. A fault in one is a `ProbeError`."""
    sweep = recipe.sweep
    if sweep is None:
        words = "there is no `sweep` in this recipe; `probe run` runs it, docs/sweeps.md shows how to vary it"
        raise recipe.fault((), words)
    base = recipe.point()
    if sweep.recipes and any(p.record is None for p in base.probes):
        raise recipe.fault(("probes",), "with a list of `sweep.recipes` the probes here can only record")
    entries = [(base, Entry(recipe=base.name), ("sweep",))] if not sweep.recipes else _loaded(recipe, sweep)
    _dials_are_used(recipe, sweep, [loaded for loaded, _, _ in entries])
    settings = _settings(recipe, base, sweep)
    count = len(sweep.backbones or "1") * len(sweep.data or "1") * len(sweep.seeds or "1") * len(settings)
    if count * sum(1 for e in entries for _ in _combinations(e[0], e[1], sweep)) > MOST_CELLS:
        raise recipe.fault(("sweep",), f"more than {MOST_CELLS:,} runs; leave some values out")
    cells: list[Cell] = []
    for backbone, data, seed, settled in product(
        sweep.backbones or (base.backbone,),
        sweep.data or (base.data.source,),
        sweep.seeds or (base.generate.seed,),
        settings,
    ):
        group = Group(backbone, data, seed, settled)
        here = [e for e in entries if backbone in (e[1].backbones or (backbone,)) and data in (e[1].data or (data,))]
        if sweep.baseline and here:
            bare = base if sweep.recipes else base.without_interventions()
            cells.append(Cell(_at(bare.replace(name=UNPRUNED), base, group), group, UNPRUNED))
        for loaded, entry, path in here:
            for dials in _combinations(loaded, entry, sweep):
                cells.append(_cell(recipe, loaded, entry, path, base, group, dials))
    folders: dict[str, Cell] = {}
    for cell in cells:
        if cell.folder in folders:
            words = f"two runs are the same: `{folders[cell.folder].title}` and `{cell.title}` on {cell.group.title}"
            raise recipe.fault(("sweep",), f"{words}; leave one of them out")
        folders[cell.folder] = cell
    return cells


def _settings(recipe: Recipe, base: Recipe, sweep: Sweep) -> list[tuple[tuple[str, Any], ...]]:
    """Every combination of the settings that a sweep varies; one empty one where it varies none."""
    for name, values in sweep.set.items():
        try:
            for value in values:
                base.with_sets([f"{name}={_word(value)}"])
        except ProbeError as error:
            raise recipe.fault(("sweep", "set", name), str(error)) from None
    return [tuple(zip(sweep.set, values, strict=True)) for values in product(*sweep.set.values())]


def check_cells(cells: Sequence[Cell]) -> None:
    """Raise `ProbeError` for the first cell whose recipe does not fit its backbone, weights unseen."""
    facts: dict[str, ModelFacts] = {}
    for cell in cells:
        name = cell.group.backbone
        if name not in facts:
            facts[name] = facts_of(name)
        try:
            compile_recipe(cell.recipe, facts[name])
        except ProbeError as error:
            where = f"the sweep's run `{cell.title}` on {name}"
            raise ProbeError(f"{where}: {error} (an entry's `backbones` says where it runs)") from None


def units_of(cells: Sequence[Cell], shards: int) -> list[Unit]:
    """The pieces of work, in order."""
    if shards == 1:
        return [Unit(cell) for cell in cells]
    return [Unit(cell, (i, shards)) for cell in cells for i in range(shards)]


def is_done(unit: Unit, root: Path) -> bool:
    """Whether a unit's trace is there, finished, of this very recipe, with as many samples as are asked for."""
    path = unit.cell.trace(root, unit.shard)
    if not path.exists():
        return False
    wanted = _expected(unit)
    try:
        opened = open_trace(path)
    except ProbeError as error:
        if isinstance(error.__cause__, BlockingIOError):  # another process is at it
            return False
        raise
    with opened as trace:
        return trace.header.recipe_hash == unit.cell.recipe.hash and (wanted is None or trace.n_samples >= wanted)


def _expected(unit: Unit) -> int | None:
    """How many samples a unit has; None where only reading the data tells."""
    data = unit.cell.recipe.data
    limit = data.limit
    if limit is None or data.is_finite:
        return None
    index, count = unit.shard or (0, 1)
    return len(range(index, limit, count))


# -------------------------------------------------------------------- one combination


def _loaded(recipe: Recipe, sweep: Sweep) -> list[tuple[Recipe, Entry, KeyPath]]:
    out: list[tuple[Recipe, Entry, KeyPath]] = []
    for i, entry in enumerate(sweep.recipes):
        path: KeyPath = ("sweep", "recipes", i)
        try:
            loaded = load_recipe(entry.recipe, [f"{k}={_word(v)}" for k, v in entry.set.items()])
        except ProbeError as error:
            raise recipe.fault(path, str(error)) from None
        if loaded.sweep is not None:
            raise recipe.fault(path, f"`{entry.recipe}` is a sweep itself; name recipes that are none")
        for name in entry.dial:
            if name not in loaded.dial:
                hint = nearest(name, sorted(loaded.dial)) if loaded.dial else "it has no dials"
                raise recipe.fault((*path, "dial", name), f"`{entry.recipe}` has no dial `{name}`; {hint}", key=True)
        out.append((loaded, entry, path))
    return out


def _dials_are_used(recipe: Recipe, sweep: Sweep, loaded: Sequence[Recipe]) -> None:
    known = sorted({name for one in loaded for name in one.dial})
    for name in sweep.dial:
        if name not in known:
            hint = nearest(name, known) if known else "they have no dials"
            words = f"none of the recipes has a dial `{name}`; {hint}"
            raise recipe.fault(("sweep", "dial", name), words, key=True)


def _combinations(loaded: Recipe, entry: Entry, sweep: Sweep) -> Iterator[dict[str, Any]]:
    """Values of the dials that this recipe has and the sweep varies; the entry's own go before the sweep's."""
    lists = {name: values for name, values in (sweep.dial | entry.dial).items() if name in loaded.dials_used}
    for values in product(*lists.values()):
        yield dict(zip(lists, values, strict=True))


def _cell(
    recipe: Recipe, loaded: Recipe, entry: Entry, path: KeyPath, base: Recipe, group: Group, dials: dict[str, Any]
) -> Cell:
    try:
        turned = loaded.with_sets([f"{name}={_word(value)}" for name, value in dials.items()])
        if base.probes and loaded is not base:
            turned = turned.with_probes_of(base)
        varied = {k: v for k, v in dials.items() if len(sweep_values(recipe, entry, k)) > 1 or _changes(loaded, k, v)}
        return Cell(_at(turned, base, group), group, entry.label or loaded.name, varied)
    except ProbeError as error:
        raise recipe.fault(path, f"{entry.recipe} with {_listed(dials)}: {error}") from None


def _changes(recipe: Recipe, dial: str, value: Any) -> bool:
    """Whether a value is another than the recipe's own, however it is written."""
    return recipe.with_sets([f"{dial}={_word(value)}"]).hash != recipe.hash


def sweep_values(recipe: Recipe, entry: Entry, dial: str) -> list[Any]:
    """The values that a sweep gives a dial of one of its recipes."""
    assert recipe.sweep is not None
    return entry.dial.get(dial) or recipe.sweep.dial.get(dial, [])


def _at(recipe: Recipe, base: Recipe, group: Group) -> Recipe:
    """A recipe on the group's backbone and data, with the sweep's own settings over its own."""
    own = base.written("data")
    source = dict(named(group.data, own.get("ask")))
    beside = {"limit", *(("config", "split", "columns", "metric") if "hub" in source else ())}
    beside |= {"include_path"} if "lmms_eval" in source else set()
    data = {k: v for k, v in own.items() if k in beside} | source
    generate = recipe.written("generate") | base.written("generate")
    if generate.get("seed", 0) != group.seed:
        generate["seed"] = group.seed
    changes: dict[str, Any] = {"backbone": group.backbone, "data": data, "generate": generate}
    for key in ("load", "trace", "run"):
        if base.written(key):
            changes[key] = recipe.written(key) | base.written(key)
    made = recipe.replace(**{k: v for k, v in changes.items() if v})
    made = made.with_sets([f"{name}={_word(value)}" for name, value in group.settings])
    return with_settings(made, group.backbone)  # as a run would, so that its trace is known by its hash


def _word(value: Any) -> str:
    """A value as it is written behind `--set NAME=`."""
    return value if isinstance(value, str) else json.dumps(value)


def _listed(dials: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}={_word(v)}" for k, v in dials.items()) or "its own dials"
