"""The list of recipes on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

if TYPE_CHECKING:
    from probe.catalogue import Entry


def render_catalogue(entries: Sequence[Entry]) -> RenderableType:
    """Per recipe its name and what it does; below, where it acts, its dials, its paper."""
    lines: list[RenderableType] = []
    for entry in entries:
        lines.append(Text.assemble((entry.name, "bold"), f": {entry.about}"))
        said = [f"at {'; '.join(entry.where)}: {'; '.join(entry.steps)}" if entry.steps else "; ".join(entry.where)]
        if entry.dials:
            said.append(f"dials {', '.join(entry.dials)}")
        if entry.paper:
            said.append(entry.paper)
        lines += [Padding(Text(line, style="dim"), (0, 0, 0, 4)) for line in said]
    return Group(*lines)
