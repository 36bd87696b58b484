"""What `probe doctor` prints: a line per check as it is made, what was seen below it, and a last line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from probe.doctor import Finding

_COLOURS = {"pass": "green", "fail": "bold red", "skip": "yellow"}


def headline(about: dict[str, Any]) -> str:
    """What is examined."""
    weights = ", random weights" if about["random_weights"] else ""
    sizes = f"{about['layers']} layers of width {about['width']}"
    return f"{about['name']}: {sizes}{weights}, {about['dtype']} on {about['device']}, attention `{about['attention']}`"


def render_finding(finding: Finding) -> RenderableType:
    """Outcome, name and text of a check; below, dimmed, what was seen."""
    table = Table.grid(padding=(0, 2))
    table.add_column(width=4)
    table.add_column(width=8)
    table.add_column(ratio=1)
    table.add_row(Text(finding.status, style=_COLOURS[finding.status]), Text(finding.name), Text(finding.about))
    table.add_row("", "", Text(finding.detail, style="" if finding.status == "fail" else "dim"))
    return table


def summary(findings: Sequence[Finding]) -> str:
    """How many checks came to what, and the time that they took."""
    count = {status: sum(f.status == status for f in findings) for status in _COLOURS}
    skipped = f", {count['skip']} not applicable" if count["skip"] else ""
    seconds = sum(f.seconds for f in findings)
    return f"{count['pass']} passed, {count['fail']} failed{skipped} in {seconds:.1f} s"


def to_json(backbone: dict[str, Any], findings: Sequence[Finding]) -> str:
    """Everything as one JSON object."""
    found = {"backbone": backbone, "checks": [asdict(f) for f in findings], "failed": failed(findings)}
    return json.dumps(found, indent=2) + "\n"


def failed(findings: Sequence[Finding]) -> list[str]:
    """Names of the checks that failed."""
    return [f.name for f in findings if f.status == "fail"]
