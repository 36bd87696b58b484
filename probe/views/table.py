"""The table that ends a run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from probe.runner import RunResult


def flops_text(value: float) -> str:
    """`1.23 G` and the like; a dash where nothing is known."""
    if math.isnan(value):
        return "-"
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f}"


def _number(value: float, digits: int = 3) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _ratio(value: float, base: float) -> str:
    known = not (math.isnan(value) or math.isnan(base)) and base > 0 and value > 0
    return f"{value / base:.2f}x" if known else "-"


def render_table(result: RunResult) -> RenderableType:
    """Baseline against recipe, and where the traces are. Fits 80 columns."""
    base = result.rows[0]
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column("run ", no_wrap=True)
    for name in ("n", "score", "agrees", "seconds", "speed", "FLOPs", "ratio", "visual tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in result.rows:
        first = row is base
        alone = first and len(result.rows) > 1
        interval = "" if math.isnan(row.score_half_width) else f"±{row.score_half_width:.2f}"
        kept = "" if math.isnan(row.retention) else f" ({row.retention:.0%})"
        table.add_row(
            row.label,
            str(row.n),
            _number(row.score) + interval,
            "" if alone else "-" if first else _number(row.agreement),
            _number(row.seconds),
            "" if first else _ratio(base.seconds, row.seconds),
            flops_text(row.flops),
            "" if first else _ratio(row.flops, base.flops),
            _number(row.visual_tokens, 1) + kept,
        )
    lines: list[RenderableType] = [
        table,
        Text(
            "score: mean and half of its 95% interval; agrees: answer tokens equal to the\n"
            "unpruned run's; seconds, FLOPs: per sample, with nothing recorded;\n"
            "visual tokens: mean over layers and steps",
            style="dim",
        ),
    ]
    if result.failed:
        lines.append(Text(f"{result.failed} of {result.samples} samples failed; the trace says why", style="bold red"))
    where = [f"trace: {result.trace}"]
    if result.baseline is not None:
        where.append(f"baseline: {result.baseline}")
    if result.picture is not None:
        where.append(f"picture: {result.picture}")
    lines += [Text(w) for w in where]
    lines.append(Text(f"look: probe show {result.trace}", style="dim"))
    return Group(*lines)
