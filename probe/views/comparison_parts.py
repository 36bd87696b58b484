"""The tables of `probe compare`, and the explanations below them."""

from __future__ import annotations

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text


def grid(*columns: str, left: int = 1) -> Table:
    """A table without lines; the first `left` columns are text, the others numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    for k, name in enumerate(columns):
        table.add_column(name, justify="left" if k < left else "right", no_wrap=True)
    return table


def explained(*lines: str) -> list[RenderableType]:
    """Explanations `name: words`, one per number, wrapped with a hanging indent."""
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(style="dim")
    for line in lines:
        name, _, words = line.partition(": ")
        table.add_row(f"{name}:", Text(words))
    return [table]
