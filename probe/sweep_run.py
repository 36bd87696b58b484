"""Running a sweep: what is done is left alone, what was begun is resumed, what failed is tried again.

A unit's trace is all that is kept of it, so that a sweep that was killed, or is run by several processes at once (on
one machine, or as a Slurm array with a shared folder), needs nobody to remember what it did: a unit that another
process is writing is left to that one.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

from probe.backbones import load
from probe.backbones.base import Backbone
from probe.errors import ProbeError
from probe.failures import free_memory, is_out_of_memory, reason_of
from probe.recipe import Recipe
from probe.runner import OnProgress, pick_device, run
from probe.stopping import Stopping
from probe.summary import Row, summarise
from probe.sweep import Cell, Group, Unit, cells_of, check_cells, is_done, units_of
from probe.trace import merge, open_trace
from probe.trace_journal import Busy
from probe.views.sweep_table import write_tables

State = Literal["done", "failed", "elsewhere"]
"""`elsewhere`: another process is at it."""


@dataclass(frozen=True)
class Outcome:
    """What became of a unit: `reason` why it failed, `failed` how many of its samples did; `again` if a second try may
    end otherwise.
    """

    unit: Unit
    state: State
    reason: str = ""
    failed: int = 0
    again: bool = False


@dataclass(frozen=True)
class SweepResult:
    """Rows of every group that has any, what failed, what is still open, and the tables' files."""

    folder: Path
    rows: dict[Group, list[tuple[Cell, Row]]]
    failures: tuple[Outcome, ...]
    open: int
    tables: tuple[Path, ...]


class OnUnit(Protocol):
    """Told of every unit: how many are finished, of how many, and which one is being worked on."""

    def __call__(self, finished: int, total: int, unit: Unit | None) -> None:
        """`unit` is None behind the last one."""
        ...


Workers = Callable[[Sequence[Unit], Path], Iterator[Outcome]]
"""Carries units out, in any order and anywhere, and yields what became of each."""


class Worker:
    """Carries out units one after the other; keeps the last backbone loaded."""

    def __init__(
        self,
        device: str = "auto",
        dtype: str = "auto",
        on_progress: OnProgress | None = None,
        command: str = "",
        stopping: Stopping | None = None,
    ) -> None:
        self.device, self.dtype, self.on_progress, self.command = device, dtype, on_progress, command
        self.stopping = stopping
        self._loaded: tuple[str, Backbone] | None = None

    def backbone(self, recipe: Recipe) -> Backbone:
        """The recipe's backbone, as the recipe loads it."""
        key = backbone_key(recipe)
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None  # two may not fit
            free_memory()
            model = load(recipe.backbone, device=pick_device(self.device), dtype=self.dtype, **recipe.load)
            self._loaded = key, model
        return self._loaded[1]

    def __call__(self, unit: Unit, root: Path) -> Outcome:
        """Run a unit, or what is left of it. Only `KeyboardInterrupt` and the like get out."""
        cell = unit.cell
        try:
            if is_done(unit, root):  # by another process, since we began
                return Outcome(unit, "done")
            result = run(
                cell.recipe,
                backbone=self.backbone(cell.recipe),
                out=root / cell.folder,
                resume=True,
                shard=unit.shard,
                baseline=needs_baseline(cell),
                timed=cell.recipe.written("run").get("time", False),
                picture=False,
                on_progress=self.on_progress,
                command=self.command,
                stopping=self.stopping,
            )
        except Exception as error:
            if isinstance(error.__cause__, Busy):
                return Outcome(unit, "elsewhere")
            if is_out_of_memory(error):
                self._loaded = None
            return Outcome(unit, "failed", reason_of(error), again=not isinstance(error, ProbeError))
        return Outcome(unit, "done", failed=result.failed)

    def all(self, units: Sequence[Unit], root: Path) -> Iterator[Outcome]:
        """Every unit in turn."""
        for unit in units:
            yield self(unit, root)


def backbone_key(recipe: Recipe) -> str:
    """The same for recipes that can be run on one loaded backbone."""
    return json.dumps([recipe.backbone, recipe.load], sort_keys=True)


def needs_baseline(cell: Cell) -> bool:
    """Whether a cell brings its own unpruned run: if it says so, or records how far it is from that."""
    from probe.registry import signals

    if cell.is_baseline:
        return False
    recorded = [part.name for probe in cell.recipe.probes for part in probe.record or ()]
    compares = any("reference" in signals[name].needs for name in recorded)
    return compares or bool(cell.recipe.written("run").get("baseline", False))


def sweep(
    recipe: Recipe,
    *,
    out: Path | None = None,
    limit: int | None = None,
    workers: Workers | None = None,
    shard: tuple[int, int] | None = None,
    retries: int = 1,
    begin: float = 0.0,
    on_unit: OnUnit | None = None,
) -> SweepResult:
    """Run what is not done yet of a sweep in `out` (default `runs/NAME`), and put its tables there.

    `limit` overrides the recipe's; `shard` (i, n) takes every n-th unit; a unit that failed for a reason that may pass
    is tried `retries` more times, last of all; `begin` is where in their list to begin, as a share. Faults of the sweep
    itself raise `ProbeError` before anything runs.
    """
    if limit is not None:
        recipe = recipe.replace(data=recipe.written("data") | {"limit": limit})
    cells = cells_of(recipe)
    check_cells(cells)
    assert recipe.sweep is not None
    root = out or Path("runs") / recipe.name.replace("/", "-")
    root.mkdir(parents=True, exist_ok=True)
    every = units_of(cells, recipe.sweep.shards)
    mine = every if shard is None else every[shard[0] :: shard[1]]
    waiting = [unit for unit in mine if not is_done(unit, root)]
    finished, first = len(mine) - len(waiting), int(begin * len(waiting))
    waiting = waiting[first:] + waiting[:first]
    failures: list[Outcome] = []
    work = workers or Worker().all
    for attempt in range(retries + 1):
        failures = [f for f in failures if not f.again]
        again: list[Unit] = []
        for unit, outcome in _told(work, waiting, root, finished, len(mine), on_unit):
            if outcome.state == "failed":
                failures.append(replace(outcome, again=outcome.again and attempt < retries))
                again += [unit] if outcome.again else []
            else:
                finished += 1
        waiting = again
        if not waiting:
            break
    _join(cells, recipe.sweep.shards, root)
    rows = rows_of(cells, root)
    left = sum(not is_done(unit, root) for unit in every)
    return SweepResult(root, rows, tuple(failures), left, write_tables(rows, root))


def _when_free(cells: Sequence[Cell], root: Path) -> tuple[Row, ...]:
    """The summary of finished traces, which another process may be having a look at whether they lack samples."""
    for attempt in range(20):
        try:
            return summarise([cell.trace(root) for cell in cells], [cell.title for cell in cells])
        except ProbeError:
            if attempt == 19:
                raise
            time.sleep(0.25)
    raise AssertionError


def _told(
    work: Workers, units: Sequence[Unit], root: Path, finished: int, total: int, on_unit: OnUnit | None
) -> Iterator[tuple[Unit, Outcome]]:
    if on_unit is not None:
        on_unit(finished, total, units[0] if units else None)
    for count, outcome in enumerate(work(units, root), 1):
        if on_unit is not None:
            on_unit(finished + count, total, units[count] if count < len(units) else None)
        yield outcome.unit, outcome


def _join(cells: Sequence[Cell], shards: int, root: Path) -> None:
    """Merge the shards of every cell whose shards are all there; one that is merged already is left alone."""
    for cell in cells if shards > 1 else ():
        parts = [cell.trace(root, (i, shards)) for i in range(shards)]
        whole = cell.trace(root)
        if not all(path.exists() for path in parts) or _samples(parts) == _samples([whole]):
            continue
        try:
            merge(parts, whole, overwrite=whole.exists())
            if cell.recipe.data.lmms_eval is not None:  # which scores whole benchmarks, no shards
                from probe.lmms_score import score

                score(whole, cell.recipe)
        except ProbeError as error:
            if not isinstance(error.__cause__, Busy) and not whole.exists():  # else another process is merging it
                raise


def _samples(paths: Sequence[Path]) -> int:
    count = 0
    for path in paths:
        if path.exists():
            with open_trace(path) as trace:
                count += trace.n_samples
    return count


def rows_of(cells: Sequence[Cell], root: Path) -> dict[Group, list[tuple[Cell, Row]]]:
    """The table's rows by group; agreement is with the group's unpruned run."""
    out: dict[Group, list[tuple[Cell, Row]]] = {}
    for group in dict.fromkeys(cell.group for cell in cells):
        there = [cell for cell in cells if cell.group == group and cell.trace(root).exists()]
        if not there:
            continue
        found = _when_free(there, root)
        if not there[0].is_baseline:  # nothing to agree with
            found = tuple(replace(row, agreement=math.nan) for row in found)
        out[group] = [(cell, _with_speed(cell, row, root)) for cell, row in zip(there, found, strict=True)]
    return out


def _with_speed(cell: Cell, row: Row, root: Path) -> Row:
    """Times are comparable where runs took turns with an unpruned one; others are not shown."""
    if cell.is_baseline:
        return replace(row, agreement=math.nan, seconds=math.nan)
    own = cell.own_baseline(root)
    if not own.exists():
        return replace(row, seconds=math.nan)
    (base,) = summarise([own], [cell.title])
    return replace(row, speed=base.seconds / row.seconds)
