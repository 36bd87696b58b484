"""The command line's commands about backbones: which there are, where probes attach, whether all is well."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from probe.cli_common import PluginOption, out

app = typer.Typer()


@app.command()
def backbones() -> None:
    """List the backbones by name, and the tasks that come with the project."""
    from rich.table import Table

    from probe.backbones import INSTALLED, known_backbones
    from probe.data import tasks

    left, right = {"no_wrap": True}, {"no_wrap": True, "justify": "right"}
    heads = [("backbone", left), ("layers", right), ("width", right), ("vocabulary", right), ("kind", left)]
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for head, look in heads:
        table.add_column(head, **look)  # type: ignore[arg-type]
    kinds = {}
    for info in known_backbones():
        kind, _, words = info.about.removeprefix(INSTALLED).partition(": ")
        kinds[kind] = words
        table.add_row(info.name, str(info.layers), str(info.width), f"{info.vocabulary:,}", kind)
    out.print(table)
    about = Table(box=None, pad_edge=False, show_header=False, padding=(0, 1, 0, 0))
    about.add_column(no_wrap=True)
    for kind, words in kinds.items():
        about.add_row(kind, words)
    out.print()
    out.print(about)
    out.print("\nThe miniatures are installed with the package; the others come from the Hugging Face Hub.")
    out.print("Any folder or Hub id with a checkpoint in one of these layouts works as well.")
    out.print("Tasks: " + ", ".join(tasks()))


@app.command()
def sites(backbone: Annotated[str, typer.Argument(help="Name, folder or Hub id.")] = "miniature") -> None:
    """Show where probes can attach, and the module behind each place."""
    from probe.views.sites import render_sites

    out.print(render_sites(backbone))


@app.command()
def doctor(
    backbone: Annotated[str, typer.Argument(help="Name, folder or Hub id.")] = "miniature",
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="A small random model in the published layout; no download.")
    ] = False,
    layers: Annotated[int, typer.Option(help="Layers of the small model.")] = 3,
    width: Annotated[int, typer.Option(help="Width of the small model, a multiple of 32.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random weights.")] = 0,
    only: Annotated[list[str] | None, typer.Option(help="Make this check alone; may be given again.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:0, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16, float64.")] = "auto",
    attention: Annotated[str | None, typer.Option(help="The attention kernel, e.g. sdpa or eager.")] = None,
    plugin: PluginOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Check that a backbone keeps the adapter contract, line by line."""
    from probe.doctor import chosen, examine
    from probe.doctor.admit import admit
    from probe.plugins import load_plugins
    from probe.runner import pick_device
    from probe.views import checklist

    load_plugins(plugin or [])
    chosen(only or ())  # a wrong name is said before anything is loaded
    findings = []
    with admit(
        backbone,
        random_weights=random_weights,
        layers=layers,
        width=width,
        seed=seed,
        device=pick_device(device),
        dtype=dtype,
        attention=attention,
    ) as patient:
        about = {"name": backbone, "random_weights": random_weights, **patient.described}
        if not as_json:
            out.print(checklist.headline(about), highlight=False)
        for finding in examine(patient, only or ()):
            findings.append(finding)
            if not as_json:
                out.print(checklist.render_finding(finding))
    if as_json:
        sys.stdout.write(checklist.to_json(about, findings))
    else:
        out.print(checklist.summary(findings), highlight=False)
    if checklist.failed(findings):
        raise typer.Exit(1)
