"""The table of pruners on docs/pruners.md, from the recipes themselves. Run this file to write it anew."""

from __future__ import annotations

from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "pruners.md"
BEGIN, END = "<!-- recipes -->\n", "<!-- end of recipes -->"
HEAD = "| recipe | paper | where | score, selection, operation | dials |\n|---|---|---|---|---|\n"


def table() -> str:
    """One row per shipped recipe that intervenes."""
    from probe.catalogue import catalogue

    rows = []
    for entry in catalogue():
        if not entry.name.startswith(("prune/", "study/")):
            continue
        if any(where.startswith("sweep over") for where in entry.where):
            continue  # docs/study.md has them
        dials = ", ".join(f"`{dial.split('=')[0]}`" for dial in entry.dials)
        steps = "; ".join(entry.steps).replace(">", "→")
        rows.append(
            f"| `{entry.name.split('/', 1)[1]}` | {entry.paper} | {'; '.join(entry.where)} | {steps} | {dials} |\n"
        )
    return HEAD + "".join(rows)


def told(page: str) -> str:
    """The table as the page has it."""
    return page.split(BEGIN)[1].split(END)[0]


if __name__ == "__main__":
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.split(END)[1])
