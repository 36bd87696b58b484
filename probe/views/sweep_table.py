"""The tables of a sweep: on the terminal, as Markdown and as CSV."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from probe.views.table import flops_text

if TYPE_CHECKING:
    from probe.summary import Row
    from probe.sweep import Cell, Group

HEAD = ("run", "n", "score", "share", "agrees", "FLOPs", "ratio", "seconds", "speed", "tokens")
NARROW = ("run", "n", "score", "share", "agrees", "ratio", "speed", "tokens")
"""What fits a terminal."""
TOLD = (
    "score: mean and half of its 95% interval; share: of the unpruned run's score; agrees:",
    "answer tokens equal to the unpruned run's; ratio: FLOPs over the unpruned run's; speed:",
    "against unpruned runs that took turns with these; tokens: visual ones, mean over layers and steps",
)
Rows = Mapping["Group", Sequence[tuple["Cell", "Row"]]]


def words_of(row: Row, base: Row | None) -> tuple[str, ...]:
    """One line of a table as text, in the order of `HEAD`; `base` is the unpruned run's row."""
    alone = base is None or row is base
    half = "" if math.isnan(row.score_half_width) else f"±{row.score_half_width:.3f}"
    kept = "" if math.isnan(row.retention) else f" ({row.retention:.0%})"
    return (
        row.label,
        str(row.n),
        _number(row.score) + half,
        "" if alone or base is None else _share(row.score, base.score),
        "" if alone else _number(row.agreement),
        flops_text(row.flops),
        "" if alone or base is None else _ratio(row.flops, base.flops),
        _number(row.seconds),
        _number(row.speed, 2) + ("" if math.isnan(row.speed) else "x"),
        _number(row.visual_tokens, 1) + kept,
    )


def _number(value: float, digits: int = 3) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _share(value: float, base: float) -> str:
    return f"{value / base:.1%}" if base > 0 and not math.isnan(value) else "-"


def _ratio(value: float, base: float) -> str:
    return f"{value / base:.2f}x" if base > 0 and not math.isnan(value) else "-"


def _base(rows: Sequence[tuple[Cell, Row]]) -> Row | None:
    return next((row for cell, row in rows if cell.is_baseline), None)


def render_sweep(rows: Rows) -> RenderableType:
    """One table per group."""
    lines: list[RenderableType] = []
    for group, found in rows.items():
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0), title_justify="left")
        table.title = Text(group.title, style="bold")
        words = [words_of(row, _base(found)) for _, row in found]
        columns = [HEAD.index(name) for name in NARROW]
        known = [i for i in columns if any(line[i] not in ("", "-") for line in words)]
        for i in known:
            table.add_column(HEAD[i], justify="right" if i else "left", no_wrap=True)
        for line in words:
            table.add_row(*(line[i] for i in known))
        lines += [table, Text()]
    return Lines(*lines, Text(" ".join(TOLD), style="dim")) if lines else Text("nothing is finished yet")


def write_tables(rows: Rows, folder: Path) -> tuple[Path, ...]:
    """`table.md` and `table.csv` in the sweep's folder; nothing while there is no row."""
    if not rows:
        return ()
    markdown, values = folder / "table.md", folder / "table.csv"
    text: list[str] = []
    for group, found in rows.items():
        text += [f"**{group.title}**", "", "| " + " | ".join(HEAD) + " |", "|---|" + "---:|" * (len(HEAD) - 1)]
        text += ["| " + " | ".join(words_of(row, _base(found))) + " |" for _, row in found]
        text.append("")
    markdown.write_text("\n".join([*text, " ".join(TOLD), ""]), encoding="utf-8")
    with open(values, "w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        measured = ("seconds", "speed", "flops", "visual_tokens", "retention")
        fields = ("n", "score", "score_half_width", "agreement", *measured)
        out.writerow(["backbone", "data", "seed", "settings", "recipe", "dials", *fields, "trace"])
        for group, found in rows.items():
            for cell, row in found:
                dials = json.dumps(dict(cell.dials), ensure_ascii=False) if cell.dials else ""
                known = [getattr(row, name) for name in fields]
                shown = ["" if isinstance(v, float) and math.isnan(v) else v for v in known]
                trace = cell.trace(Path()).as_posix()
                who = (group.backbone, group.data, group.seed, ", ".join(group.settled), cell.label, dials)
                out.writerow([*who, *shown, trace])
    return markdown, values
