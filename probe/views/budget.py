"""The table of `probe budget`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from probe.budget import Line


def render_budget(lines: Sequence[Line], keep: float) -> RenderableType:
    """One line per recipe; what does not run here stands below, with the reason."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column("recipe", no_wrap=True)
    for name in ("nominal", "layers", "trajectory", "FLOPs"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for line in (entry for entry in lines if not entry.cannot):
        numbers = (line.nominal, line.layer_average, line.trajectory_average, line.flops)
        table.add_row(line.name, *("-" if math.isnan(x) else f"{x:.1%}" for x in numbers), line.remark)
    said = (
        f"keep {keep:g}; shares of the unpruned run's visual tokens, means over the samples.\n"
        "nominal: the fewest of any layer and step; layers: mean over the layers of the\n"
        "first step in which tokens are missing; trajectory: mean over layers and steps;\n"
        "FLOPs: executed, encoder and scoring included, of the unpruned run's"
    )
    rest = [Text(f"{line.name} does not run here: {line.cannot}") for line in lines if line.cannot]
    return Group(table, Text(said, style="dim"), *rest)
