"""The command line's commands about the study: tables of finished traces beside its printed numbers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from probe.cli_common import out
from probe.errors import ProbeError

app = typer.Typer()


@app.command()
def tables(
    folder: Annotated[
        Path | None, typer.Argument(help="A folder with finished traces; without one, the study's own tables.")
    ] = None,
    study: Annotated[
        str | None,
        typer.Option(help="Whose printed numbers stand beside: LLaDA-V, LaViDa-Dream, none; default: by the backbone."),
    ] = None,
    as_latex: Annotated[bool, typer.Option("--latex", help="LaTeX in place of Markdown.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="CSV, one line per cell, with intervals and n.")] = False,
    intervals: Annotated[bool, typer.Option("--intervals", help="Half of the 95% interval beside every mean.")] = False,
    restored: Annotated[
        bool, typer.Option("--restoration", help="Late pruning: the line, and slots committed, kept, lost.")
    ] = False,
    output: Annotated[Path | None, typer.Option("--out", "-o", help="Write to this file.")] = None,
) -> None:
    """Print finished traces as tables in the study's layout, beside the study's printed numbers."""
    from probe.study.finished import in_folder, read
    from probe.study.printed import TABLES
    from probe.study.tables import printed_tables
    from probe.study.tables import tables as tables_of
    from probe.views import study_tables

    if study not in (None, "none", *TABLES):
        raise ProbeError(f"--study {study}: the study has {' and '.join(TABLES)}; or none")
    if restored and (folder is None or as_latex or study is not None):
        raise ProbeError("--restoration wants a folder with traces, and comes as Markdown or --csv, without --study")
    paths = [] if folder is None else in_folder(folder)
    if folder is not None and not paths:
        raise ProbeError(f"there are no finished traces (*.trace.h5) in {folder}")
    if restored:
        from probe.study.restoration import restoration
        from probe.views import restoration_table

        late = restoration(paths)
        csv, markdown = restoration_table.to_csv, restoration_table.to_markdown
        _give(csv(late) if as_csv else markdown(late, intervals=intervals), output)
        return
    found = tables_of(read(paths), "" if study == "none" else study) if paths else printed_tables()
    if as_csv:
        text = study_tables.to_csv(found)
    elif as_latex:
        text = study_tables.to_latex(found, intervals=intervals)
    else:
        text = study_tables.to_markdown(found, intervals=intervals)
    _give(text, output)


def _give(text: str, output: Path | None) -> None:
    """Print it, or write it to a file and say so."""
    if output is None:
        sys.stdout.write(text)
        return
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ProbeError(f"cannot write {output}: {error.strerror}") from None
    out.print(f"table: {output}", highlight=False)
