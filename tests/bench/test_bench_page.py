"""The page about performance has every row, its target, its command, and what bounds it."""

from __future__ import annotations

import re
from pathlib import Path

from probe.bench.suite import BY_DEFAULT, FULL, ROWS, command_of

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "performance.md").read_text()


def test_every_row_stands_in_the_table_with_its_targets() -> None:
    table = [line.split("|") for line in PAGE.splitlines() if line.startswith("| ")]
    for row in ROWS:
        targets = {cells[3].strip() for cells in table if cells[1].strip() == row.name}
        assert set(row.targets) <= targets, row.name


def test_every_row_has_its_command_and_what_bounds_it() -> None:
    bounds = PAGE.split("## What bounds each row")[1]
    for row in ROWS:
        assert re.search(rf"^\| `{row.name}` \| .+ \| .+ \|$", bounds, flags=re.MULTILINE), row.name
        assert row.name not in BY_DEFAULT or f"`{command_of(row)}`" in bounds
    (full,) = (row for row in ROWS if row.name == "full")
    for name in FULL:
        assert f"\n{command_of(full, name)}\n" in PAGE


def test_every_line_of_the_table_says_whether_outputs_are_equal_or_that_it_was_not_measured() -> None:
    table = PAGE.split("## The table")[1].split("## What bounds")[0]
    lines = [line for line in table.splitlines() if line.startswith("| ") and not line.startswith("| row")]
    assert len(lines) > 30
    for line in lines:
        cells = [cell.strip() for cell in line.split("|")]
        assert cells[7].startswith("yes: ") or cells[4] == "not measured", line
