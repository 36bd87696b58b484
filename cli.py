"""The command line: parses, calls `probe.*`, prints.

Nothing is computed here, and nothing heavy is imported for --help. Commands about backbones, sweeps, traces and the
study's tables, and those for people who write pruners, stand in the files `probe/cli_*.py`.
"""

from __future__ import annotations

import gc
import shlex
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast

import typer

from probe import cli_backbones, cli_bench, cli_study, cli_sweep, cli_tools, cli_traces
from probe.cli_common import (
    BackboneOption,
    PluginOption,
    RecipeArgument,
    SetOption,
    err,
    importing,
    out,
    recipe_of,
    shard_of,
    size_of,
)
from probe.errors import ProbeError

if TYPE_CHECKING:
    from rich.progress import TaskID

    from probe.runner import Progress, RunResult

app = typer.Typer(
    name="probe",
    help="Record and intervene at any (denoising step, layer) of a discrete-diffusion multimodal LLM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def begin() -> None:
    """A command begins."""
    gc.freeze()
    gc.enable()


@app.command()
def run(
    recipe: RecipeArgument,
    backbone: BackboneOption = None,
    data: Annotated[
        str | None,
        typer.Option(help="A task (`probe backbones`), a JSONL file, a folder of pictures with --ask, a Hub data set."),
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="A picture of your own, with --ask; give it again for more pictures.")
    ] = None,
    video: Annotated[Path | None, typer.Option(help="A video file, or a folder of frames, with --ask.")] = None,
    frames: Annotated[int, typer.Option(min=1, help="How many frames of --video, evenly spread.")] = 32,
    ask: Annotated[str | None, typer.Option(help="The question about --image, --video or a folder.")] = None,
    sets: SetOption = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many samples.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of every random choice; default: the recipe's.")] = None,
    folder: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for traces; default runs/NAME.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:0, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Finish what an interrupted run left.")] = False,
    shard: Annotated[str | None, typer.Option(metavar="I/N", help="Only every N-th sample, from the I-th on.")] = None,
    baseline: Annotated[
        bool | None, typer.Option("--baseline/--no-baseline", help="Also run without the interventions.")
    ] = None,
    timed: Annotated[
        bool | None, typer.Option("--time/--no-time", help="Where signals are recorded: time once more without.")
    ] = None,
    plugin: PluginOption = None,
) -> None:
    """Run a recipe and compare it with the unpruned baseline."""
    from probe.plugins import load_plugins
    from probe.runner import run as run_recipe
    from probe.stopping import Stopped

    code = load_plugins(plugin or [])
    loaded = recipe_of(recipe, sets, backbone=backbone, data=data, ask=ask, own_samples=bool(image or video or data))
    samples = None
    seen = bool(image or video)
    if seen and data:
        raise ProbeError("--image (or --video) and --data cannot stand together; give one of them")
    if seen != (ask is not None) and not data:
        raise ProbeError("--image (or --video) and --ask belong together: what is seen, and the question about it")
    if image and video:
        raise ProbeError("--image and --video cannot stand together; give one of them")
    if ask is not None and seen:
        from probe.data import from_images, from_video

        samples = [from_images(image, ask) if image else from_video(cast(Path, video), ask, frames)]
    try:
        with _Display(loaded.name) as display:
            result = run_recipe(
                loaded,
                samples=samples,
                out=folder,
                limit=limit,
                seed=seed,
                device=device,
                dtype=dtype,
                resume=resume,
                shard=shard_of(shard),
                baseline=baseline,
                timed=timed,
                code_probes=code,
                on_progress=display,
                command="probe " + shlex.join(sys.argv[1:]),
            )
    except Stopped as stopped:
        err.print(f"{stopped}\nto go on: {_again(sys.argv[1:], stopped.folder)}", highlight=False, markup=False)
        raise typer.Exit(stopped.status) from None
    except KeyboardInterrupt:
        err.print("stopped at once; samples that were finished are kept: the same command with --resume goes on")
        raise typer.Exit(130) from None
    _report(result)
    raise typer.Exit(1 if result.failed else 0)


@app.command()
def check(
    recipe: RecipeArgument,
    backbone: BackboneOption = None,
    sets: SetOption = None,
    plugin: PluginOption = None,
    picture: Annotated[
        str | None, typer.Option(metavar="WxH", help="Count the visual tokens of a picture of this size, e.g. 640x480.")
    ] = None,
) -> None:
    """Say in words what a recipe will do on a backbone, and what it will leave, without loading its weights."""
    with importing():
        from probe.backbones import facts_of, visual_count
        from probe.composition import check_without_weights
        from probe.explain import explain
        from probe.outlook import outlook
        from probe.plugins import load_plugins

    load_plugins(plugin or [])
    loaded = recipe_of(recipe, sets, backbone=backbone)
    sizes = [size_of(picture)] if picture is not None else None
    facts = facts_of(loaded.backbone)
    check_without_weights(loaded, facts)
    n_visual = visual_count(loaded.backbone, sizes, **loaded.load) if sizes else None
    out.print(explain(loaded, facts, n_visual), highlight=False, markup=False)
    if (foreseen := outlook(loaded, sizes)) is not None:
        out.print(foreseen, highlight=False, markup=False)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="Show this one as it is written.")] = None,
) -> None:
    """List the shipped recipes: what each does, where it acts, its dials, its paper. Or show one."""
    from probe.catalogue import catalogue, source_of
    from probe.views.catalogue import render_catalogue

    if name is None:
        out.print(render_catalogue(catalogue()))
        return
    path, text = source_of(name)
    out.print(f"# {path}", highlight=False, markup=False, soft_wrap=True)
    out.print(text, highlight=False, markup=False, soft_wrap=True, end="")


app.command()(cli_sweep.sweep)
app.add_typer(cli_tools.app)
app.add_typer(cli_backbones.app)
app.add_typer(cli_traces.app)
app.add_typer(cli_study.app)
app.add_typer(cli_bench.app)


class _Display:
    """A progress bar on the terminal: which sample, which side, which step."""

    def __init__(self, name: str) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeRemainingColumn,
        )

        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=err,
            transient=True,
            disable=not err.is_terminal,
        )
        from probe.finite import NotFinite

        self._ours = NotFinite
        self._name = name
        self._task: TaskID | None = None

    def __enter__(self) -> _Display:
        self._showwarning, warnings.showwarning = warnings.showwarning, self._warn
        self._bar.start()
        self._task = self._bar.add_task(f"{self._name}: loading", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        warnings.showwarning = self._showwarning

    def _warn(self, message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        """What the run itself warns of, as a sentence; other packages' warnings as usual."""
        if issubclass(category, self._ours):
            err.print("[yellow]warning:[/] ", end="")
            err.print(str(message), highlight=False, markup=False)
        else:
            self._showwarning(message, category, *where, **more)

    def __call__(self, at: Progress) -> None:
        if self._task is not None:
            self._bar.update(
                self._task,
                completed=at.sample,
                total=at.total,
                description=f"sample {at.sample} · {at.side} · step {at.step}/{at.steps}",
            )


def _report(result: RunResult) -> None:
    from probe.views.table import render_table

    for note in result.notes:
        err.print("[yellow]note:[/] ", end="")
        err.print(note, highlight=False, markup=False)
    out.print(render_table(result))


def _again(words: list[str], folder: Path) -> str:
    """The command that goes on with a run that was stopped."""
    named = any(w in ("-o", "--out") or w.startswith("--out=") for w in words)
    more = [*([] if named else ["--out", str(folder)]), *([] if "--resume" in words else ["--resume"])]
    return "probe " + shlex.join([*words, *more])


def _fail(message: str) -> NoReturn:
    err.print("[bold red]error:[/] ", end="")
    err.print(message, highlight=False, markup=False)
    raise SystemExit(2)


def main() -> None:
    """The console command: like `app`, with errors a user can act on printed in one message, exit status 2."""
    try:
        app()
    except ProbeError as error:
        _fail(str(error))
    except OSError as error:  # a full disk, a folder that cannot be written, under a view's output
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}")
    except MemoryError:
        _fail("out of memory; free some, or ask for less at a time")


if __name__ == "__main__":
    main()
