"""The command line's commands for those who write pruners: skeletons, calibration, suggestions, budgets."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from probe.cli_common import BackboneOption, PluginOption, RecipeArgument, SetOption, err, out, recipe_of
from probe.errors import ProbeError

app = typer.Typer()


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="What the recipe is to be called.")],
    plugin: Annotated[bool, typer.Option("--plugin", help="Also a score of your own in Python, and its test.")] = False,
    folder: Annotated[Path, typer.Option("--out", "-o", help="Where to write.")] = Path(),
) -> None:
    """Write a commented recipe to begin with; with --plugin also a Python file and its test."""
    from probe.skeleton import write

    for path in write(name, folder, plugin=plugin):
        out.print(f"wrote {path}", highlight=False)


@app.command()
def calibrate(
    recipe: RecipeArgument,
    backbone: BackboneOption = None,
    data: Annotated[str | None, typer.Option(help="A task or a JSONL file of your own; default: the recipe's.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many samples to measure on.")] = 20,
    trace: Annotated[
        Path | None, typer.Option(help="Read attention from this trace of the unpruned model, in place of a run.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--with", metavar="NAME=VALUE", help="A number of the search, e.g. eta=0.001.")
    ] = None,
    sets: SetOption = None,
    output: Annotated[Path | None, typer.Option("--out", "-o", help="FILE.yaml; default: print it.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:0, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    plugin: PluginOption = None,
) -> None:
    """Find the numbers of a recipe's dials on a few samples, and write the recipe with them and the evidence."""
    from probe.calibrate_run import calibrate as calibrated
    from probe.catalogue import source_of
    from probe.plugins import load_plugins
    from probe.recipe_text import opening_comment
    from probe.runner import pick_device

    load_plugins(plugin or [])
    loaded = recipe_of(recipe, sets, backbone=backbone, data=data)
    header = "" if recipe.endswith((".h5", ".partial")) else opening_comment(source_of(recipe)[1])
    with err.status("measuring"):
        result = calibrated(
            loaded,
            samples=samples,
            trace=trace,
            settings=settings or (),
            device=pick_device(device),
            dtype=dtype,
            header=header,
        )
    if output is None:
        sys.stdout.write(result.text)
        return
    _write(output, result.text)
    for dial, found in result.findings.items():
        out.print(f"{dial} = {found.value}: {found.evidence[0]}", highlight=False, markup=False)
    out.print(f"recipe: {output}", highlight=False)


@app.command()
def suggest(
    trace: Annotated[Path, typer.Argument(help="A trace of the unpruned model that recorded attention_mass.")],
    folder: Annotated[Path | None, typer.Option("--out", "-o", help="Where to write; default: print them.")] = None,
) -> None:
    """From a trace of the unpruned model, write the recipes that the study's findings advise, with the evidence."""
    from probe.suggest import suggest as suggestions
    from probe.trace import open_trace

    with open_trace(trace) as opened:
        found = suggestions(opened)
    for suggestion in found:
        if folder is None:
            sys.stdout.write(suggestion.text + "\n")
            continue
        path = folder / f"{suggestion.recipe.name}.yaml"
        _write(path, suggestion.text)
        out.print(f"recipe: {path}", highlight=False)


@app.command()
def budget(
    recipes: Annotated[list[str] | None, typer.Argument(help="Recipes; default: every shipped pruner.")] = None,
    keep: Annotated[float, typer.Option(help="Share of the visual tokens to keep.")] = 0.25,
    backbone: BackboneOption = None,
    data: Annotated[str, typer.Option(help="A task or a JSONL file of your own.")] = "world/long",
    samples: Annotated[int, typer.Option(min=1, help="How many samples to run.")] = 2,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="NAME=VALUE", help="A setting for all of them, e.g. generate.steps=8."),
    ] = None,
    folder: Annotated[Path | None, typer.Option("--out", "-o", help="Keep the traces here.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:0, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    plugin: PluginOption = None,
) -> None:
    """Run all pruners at one budget and say what each really keeps and costs."""
    from probe.budget import measure
    from probe.plugins import load_plugins
    from probe.views.budget import render_budget

    load_plugins(plugin or [])
    with err.status("loading") as status:
        lines = measure(
            recipes or (),
            keep=keep,
            backbone=backbone or "miniature",
            data=data,
            samples=samples,
            sets=sets or (),
            out=folder,
            device=device,
            dtype=dtype,
            on_recipe=status.update,
        )
    out.print(render_budget(lines, keep))


def _write(path: Path, text: str) -> None:
    """Write a new file, or say what stands in the way."""
    if path.exists():
        raise ProbeError(f"{path} is there already; name another file, or take it away")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ProbeError(f"cannot write {path}: {error.strerror}") from None
