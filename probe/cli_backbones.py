"""The command line's commands about backbones: which there are, where probes attach."""

from __future__ import annotations

from typing import Annotated

import typer

from probe.cli_common import out

app = typer.Typer()


@app.command()
def backbones() -> None:
    """List the backbones by name, and the tasks that come with the project."""
    from rich.table import Column, Table

    from probe.backbones import known_backbones
    from probe.data import tasks

    name = Column("backbone", no_wrap=True)
    table = Table(name, "layers", "width", "vocabulary", "what it is", box=None, pad_edge=False)
    for info in known_backbones():
        table.add_row(info.name, str(info.layers), str(info.width), str(info.vocabulary), info.about)
    out.print(table)
    out.print("\nAny folder or Hub id with a checkpoint in one of these layouts works as well.")
    out.print("Tasks: " + ", ".join(tasks()))


@app.command()
def sites(backbone: Annotated[str, typer.Argument(help="Name, folder or Hub id.")] = "miniature") -> None:
    """Show where probes can attach, and the module behind each place."""
    from probe.views.sites import render_sites

    out.print(render_sites(backbone))
