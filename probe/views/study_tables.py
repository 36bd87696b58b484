"""Tables in the study's layout as Markdown, LaTeX and CSV. Ours first, the study's number in brackets."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence

from probe.study.printed import METHODS
from probe.study.tables import Cell, Row, Table

UNPRUNED = "unpruned"


def _heads(table: Table) -> list[str]:
    average = ["Avg."] if table.layout == "retention" else []
    kept = ["kept"] if any(not math.isnan(row.kept) for row in _rows(table)) else []
    return ["method", *kept, *table.columns, *average]


def _rows(table: Table) -> list[Row]:
    return [row for section in table.sections for row in section.rows]


def _text(cell: Cell, percent: str = "", intervals: bool = False) -> str:
    """`79.3`, `79.3 (78.8)`, `(78.8)`; a dash where there is nothing; `79.3 ±2.1` with intervals."""
    ours = "" if math.isnan(cell.ours.value) else f"{cell.ours.value:.1f}{percent}"
    if ours and intervals and not math.isnan(cell.ours.low):
        ours += f" ±{(cell.ours.high - cell.ours.low) / 2:.1f}"
    study = "" if math.isnan(cell.study) else f"({cell.study:.1f}{percent})"
    return f"{ours} {study}".strip() or "–"


def _cells(table: Table, row: Row, percent: str, intervals: bool) -> list[str]:
    kept = [f"{row.kept:.0f}{percent}" if not math.isnan(row.kept) else "–"] if "kept" in _heads(table) else []
    average = [_text(row.average, percent)] if table.layout == "retention" else []
    name = row.label.replace("none", UNPRUNED, 1) if row.label.startswith(METHODS[0]) else row.label
    return [name, *kept, *(_text(cell, intervals=intervals) for cell in row.cells), *average]


def caption(table: Table) -> str:
    """What a table shows, in a sentence or two."""
    said = f"{table.title}: pruned from the first step." if table.layout == "retention" else (
        f"{table.title}: pruned after a share of the steps."
    )  # fmt: skip
    if any(not math.isnan(cell.ours.value) for row in _rows(table) for cell in row.cells):
        said += " kept: share of the visual tokens over layers and steps."
    if table.study:
        said += f" In brackets: {table.study} in the study (arXiv 2511.15098)."
    return said


def to_markdown(tables: Sequence[Table], *, intervals: bool = False) -> str:
    """One Markdown table after the other, each with its caption and its notes."""
    out = []
    for table in tables:
        heads = _heads(table)
        lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
        for section in table.sections:
            if section.title:
                lines.append(f"| *{section.title}* |" + " |" * (len(heads) - 1))
            lines += ["| " + " | ".join(_cells(table, row, "%", intervals)) + " |" for row in section.rows]
        notes = [f"- {note}" for note in table.notes]
        out.append("\n".join([f"**{caption(table)}**", "", *lines, *([""] if notes else []), *notes]))
    return "\n\n".join(out) + "\n"


_LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"–": "--", "±": r"$\pm$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}
)


def to_latex(tables: Sequence[Table], *, intervals: bool = False) -> str:
    """The same as LaTeX tables; they want the package booktabs."""
    out = []
    for table in tables:
        heads = _heads(table)
        lines = [" & ".join(h.translate(_LATEX) for h in heads) + r" \\", r"\midrule"]
        for i, section in enumerate(table.sections):
            lines += [r"\midrule"] if i else []
            if section.title:
                said = section.title.translate(_LATEX)
                lines.append(rf"\multicolumn{{{len(heads)}}}{{c}}{{\textit{{{said}}}}} \\")
            for row in section.rows:
                lines.append(" & ".join(c.translate(_LATEX) for c in _cells(table, row, "%", intervals)) + r" \\")
        said = " ".join([caption(table), *(f"{note}." for note in table.notes)]).translate(_LATEX)
        body = [r"\toprule", *lines, r"\bottomrule"]
        out.append(
            "\n".join(
                [
                    r"\begin{table}",
                    r"\centering",
                    rf"\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}",
                    *body,
                    r"\end{tabular}",
                    rf"\caption{{{said}}}",
                    r"\end{table}",
                ]
            )
        )
    return "\n\n".join(out) + "\n"


FIELDS = (
    "backbone", "layout", "method", "recipe", "retention_percent", "kept_percent", "column",
    "score", "low", "high", "n", "study_backbone", "study_score",
)  # fmt: skip


def to_csv(tables: Sequence[Table]) -> str:
    """One line per cell, averages included (column `Avg`); empty where nothing is known."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(FIELDS)
    for table in tables:
        for row in _rows(table):
            named = list(zip(table.columns, row.cells, strict=True))
            named += [("Avg", row.average)] if table.layout == "retention" else []
            for column, cell in named:
                who = (table.title, table.layout, row.label, row.recipe, f"{row.keep:.4g}", _plain(row.kept), column)
                ours = (*map(_plain, (cell.ours.value, cell.ours.low, cell.ours.high)), cell.ours.n or "")
                writer.writerow((*who, *ours, table.study, _plain(cell.study)))
    return buffer.getvalue()


def _plain(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}"
