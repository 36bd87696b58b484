"""What a finished sweep is drawn as, and its scores in the study's layout: files beside its traces."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from probe.errors import ProbeError
from probe.study.finished import read
from probe.study.tables import tables
from probe.trace import open_trace
from probe.views.figures import plot
from probe.views.study_tables import to_markdown
from probe.views.sweep_table import Rows

if TYPE_CHECKING:
    from probe.sweep import Cell

OF_UNPRUNED = ("attention_mass", "confidence")
"""Figures of the unpruned runs, where these record it."""


def write_study(rows: Rows, folder: Path) -> tuple[Path, ...]:
    """`study.md`: what `probe tables` prints of the sweep's traces; nothing where nothing was pruned."""
    if not any(_prunes(cell) for found in rows.values() for cell, _ in found):
        return ()
    path = folder / "study.md"
    path.write_text(to_markdown(tables(read(_traces(rows, folder)))), encoding="utf-8")
    return (path,)


def write_figures(rows: Rows, folder: Path) -> tuple[list[Path], list[str]]:
    """Figures of a sweep, and in words what could not be drawn.

    Over everything score left by retention and by start (`late_pruning`), for each group score against cost
    (`tradeoff`), and attention and confidence of unpruned runs that record them. Wants matplotlib.
    """
    drawn: list[Path] = []
    notes: list[str] = []

    def tried(traces: Sequence[Path], figure: str, of: str = "") -> None:
        try:
            drawn.append(plot(traces, figure, folder / f"{figure}{of}.png"))
        except ProbeError as error:
            notes.append(f"{figure}: {error}")

    every = _traces(rows, folder)
    if any(cell.dials.get("start") for found in rows.values() for cell, _ in found):
        tried(every, "late_pruning")
    for group, found in rows.items():
        name = "-" + re.sub(r"[^A-Za-z0-9.=%+]+", "-", group.title).strip("-.")
        own = [cell.trace(folder) for cell, _ in found]
        if len(own) > 1:
            tried(own, "tradeoff", name)
        for bare in (cell.trace(folder) for cell, _ in found if not _prunes(cell)):
            for figure in OF_UNPRUNED:
                if _has(bare, figure):
                    tried([bare], figure, name)
    return drawn, list(dict.fromkeys(notes))


def _prunes(cell: Cell) -> bool:
    return any(probe.do is not None for probe in cell.recipe.probes)


def _traces(rows: Rows, folder: Path) -> list[Path]:
    return [cell.trace(folder) for found in rows.values() for cell, _ in found]


def _has(path: Path, variable: str) -> bool:
    with open_trace(path) as trace:
        return variable in trace.variables
