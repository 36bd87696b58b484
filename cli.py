"""The command line: parses, calls `probe.*`, prints.

Nothing is computed here, and nothing heavy is imported for --help.
"""

from __future__ import annotations

import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from probe.errors import ProbeError

if TYPE_CHECKING:
    from rich.progress import TaskID

    from probe.recipe import Recipe
    from probe.runner import Progress, RunResult

app = typer.Typer(
    name="probe",
    help="Record and intervene at any (denoising step, layer) of a discrete-diffusion multimodal LLM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console()
err = Console(stderr=True)

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, a shipped recipe's name, or a trace to repeat.")
]
BackboneOption = Annotated[
    str | None,
    typer.Option("--backbone", "-b", help="Name, folder or Hub id; default: the recipe's, else `miniature`."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="NAME=VALUE", help="Turn a dial (keep=0.25) or a setting (generate.steps=8)."),
]

PluginOption = Annotated[
    list[Path] | None,
    typer.Option("--plugin", help="A Python file with scores, selections or code probes of your own."),
]


@app.command()
def run(
    recipe: RecipeArgument,
    backbone: BackboneOption = None,
    data: Annotated[
        str | None, typer.Option(help="A task (see `probe backbones`) or a JSONL file of your own.")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="One picture of your own, with --ask.")] = None,
    ask: Annotated[str | None, typer.Option(help="The question about --image.")] = None,
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
    loaded = _load(recipe, sets, backbone=backbone, data=data, own_samples=image is not None or data is not None)
    samples = None
    if (image is None) != (ask is None):
        raise ProbeError("--image and --ask belong together: a picture, and the question about it")
    if image is not None and ask is not None:
        from probe.data import from_image

        samples = [from_image(image, ask)]
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
                shard=_shard(shard),
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
    """Say in words what a recipe will do on a backbone, without loading its weights."""
    from probe.backbones import facts_of, visual_count
    from probe.explain import explain
    from probe.plugins import load_plugins

    load_plugins(plugin or [])
    loaded = _load(recipe, sets, backbone=backbone)
    n_visual = visual_count(loaded.backbone, [_size(picture)]) if picture is not None else None
    out.print(explain(loaded, facts_of(loaded.backbone), n_visual), highlight=False, markup=False)


@app.command()
def recipes() -> None:
    """List the shipped recipes."""
    from rich.table import Table

    from probe.recipe import shipped_recipes

    table = Table("recipe", "what it does", box=None, pad_edge=False)
    for info in shipped_recipes():
        table.add_row(info.name, info.about)
    out.print(table)


@app.command()
def backbones() -> None:
    """List the backbones by name, and the tasks that come with the project."""
    from rich.table import Table

    from probe.backbones import known_backbones
    from probe.data import tasks

    table = Table("backbone", "layers", "width", "vocabulary", "what it is", box=None, pad_edge=False)
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


@app.command()
def show(
    trace: Annotated[Path, typer.Argument(help="A trace file, complete or partial.")],
    variable: Annotated[str | None, typer.Argument(help="One of its variables.")] = None,
    sample: Annotated[str | None, typer.Option(help="3, or 3..5")] = None,
    step: Annotated[str | None, typer.Option(help="4, or 4..8")] = None,
    layer: Annotated[str | None, typer.Option(help="2, or 0..3")] = None,
    head: Annotated[str | None, typer.Option(help="0, or 0..3")] = None,
    mean: Annotated[list[str] | None, typer.Option(help="Average over this axis.")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print the selection as CSV.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the selection as JSON.")] = False,
) -> None:
    """Show what a trace holds, or one variable of it."""
    from probe.trace import open_trace
    from probe.views import terminal

    with open_trace(trace) as opened:
        if variable is None:
            out.print(terminal.render_summary(opened))
            return
        picked: dict[str, Any] = {"sample": sample, "step": step, "layer": layer, "head": head}
        if as_csv or as_json:
            write = terminal.to_csv if as_csv else terminal.to_json
            sys.stdout.write(write(opened, variable, **picked, mean=tuple(mean or ())))
            return
        out.print(terminal.render_variable(opened, variable, **picked, mean=tuple(mean or ())))


@app.command()
def plot(
    traces: Annotated[list[Path] | None, typer.Argument(help="One trace, or several for `tradeoff`.")] = None,
    figure: Annotated[str | None, typer.Option("--figure", "-f", help="See --list; default: the trace's own.")] = None,
    output: Annotated[Path | None, typer.Option("--out", "-o", help="FILE.png, .pdf or .svg.")] = None,
    sample: Annotated[int | None, typer.Option(help="Number of a sample, for figures of one sample.")] = None,
    layer: Annotated[int | None, typer.Option(help="A layer, instead of the mean over layers.")] = None,
    step: Annotated[int | None, typer.Option(help="A step, instead of all of them.")] = None,
    list_them: Annotated[bool, typer.Option("--list", help="List the figures.")] = False,
) -> None:
    """Draw a figure of a trace."""
    from probe.views.figures import list_figures
    from probe.views.figures import plot as draw

    if list_them:
        from rich.table import Table

        table = Table("figure", "what it shows", box=None, pad_edge=False)
        for name, about in list_figures():
            table.add_row(name, about)
        out.print(table)
        return
    if not traces:
        raise ProbeError("name a trace to draw: `probe plot FILE --figure NAME`; `probe plot --list` names the figures")
    path = output or traces[-1].with_suffix("").with_suffix(f".{figure or 'figure'}.png")
    drawn = draw(traces, figure, path, sample=sample, layer=layer, step=step)
    out.print(f"figure: {drawn}", highlight=False, markup=False)


@app.command()
def compare(
    traces: Annotated[list[Path], typer.Argument(help="The unpruned trace, then those to compare with it.")],
    as_csv: Annotated[bool, typer.Option("--csv", help="Print the differences of every sample as CSV.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Compare traces of the same samples, paired: score, agreement, divergence and restoration, cost."""
    from probe.compare import compare as compare_traces
    from probe.views import comparison

    result = compare_traces(traces)
    if as_csv or as_json:
        sys.stdout.write(comparison.to_csv(result) if as_csv else comparison.to_json(result))
        return
    out.print(comparison.render_comparison(result))


@app.command()
def replay(
    trace: Annotated[Path, typer.Argument(help="A trace file, complete or partial.")],
    sample: Annotated[int, typer.Option(help="Number of the sample.")] = 0,
    gif: Annotated[Path | None, typer.Option(help="Write an animated picture instead.")] = None,
) -> None:
    """Step through one sample's denoising: keys right and left, space plays, q ends."""
    from probe.trace import open_trace
    from probe.views.replay import play
    from probe.views.replay_frames import row_of
    from probe.views.replay_gif import save_gif

    with open_trace(trace) as opened:
        row = row_of(opened, sample)
        if gif is not None:
            out.print(f"animation: {save_gif(opened, row, gif)}", highlight=False, markup=False)
        else:
            play(opened, row, out)


@app.command()
def report(
    traces: Annotated[list[Path], typer.Argument(help="Traces of the same samples, shown side by side.")],
    output: Annotated[Path, typer.Option("--out", "-o", help="FILE.html")] = Path("report.html"),
    samples: Annotated[int | None, typer.Option(min=1, help="At most this many samples.")] = None,
) -> None:
    """Write one self-contained page to look around in: pictures, tokens, attention, answers, tables."""
    from probe.views.report import write_report

    out.print(f"page: {write_report(traces, output, samples=samples)}", highlight=False, markup=False)


@app.command()
def merge(
    traces: Annotated[list[Path], typer.Argument(help="Traces of the shards of one run, in any order.")],
    output: Annotated[Path, typer.Option("--out", "-o", help="The trace to write.")],
) -> None:
    """Join the traces of a run's shards, in the order of their samples."""
    from probe.trace import merge as join

    out.print(f"trace: {join(traces, output)}", highlight=False, markup=False)


@app.command()
def verify(
    trace: Annotated[Path, typer.Argument(help="A trace file.")],
    rescue: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the samples that are whole into this new trace.")
    ] = None,
) -> None:
    """Check a trace's checksums, in a process that damage may stop; rescue what is whole."""
    from probe.trace_examine import examine
    from probe.trace_examine import rescue as save

    if rescue is not None:
        saved = save(trace, rescue)
        _complain(saved.problems)
        out.print(f"rescued: {saved.kept} of {saved.rows} samples, into {saved.path}", highlight=False, markup=False)
        if saved.kept < saved.rows:
            out.print(
                "to compute the others, put it in the place of the damaged file and repeat the run with --resume",
                highlight=False,
            )
        return
    found = examine(trace)
    _complain(found.problems)
    if found.problems:
        if found.rows:
            err.print(
                f"{len(found.whole)} of {found.rows} samples are whole"
                + (f"; probe verify {trace} --rescue NEW.trace.h5 saves them" if found.whole else ""),
                highlight=False,
                markup=False,
            )
        raise typer.Exit(1)
    out.print(f"{trace}: intact", highlight=False, markup=False)


def _complain(problems: Sequence[str]) -> None:
    for problem in problems:
        err.print(problem, highlight=False, markup=False)


def _again(words: list[str], folder: Path) -> str:
    """The command that goes on with a run that was stopped."""
    named = any(w in ("-o", "--out") or w.startswith("--out=") for w in words)
    more = [*([] if named else ["--out", str(folder)]), *([] if "--resume" in words else ["--resume"])]
    return "probe " + shlex.join([*words, *more])


def _size(text: str) -> tuple[int, int]:
    width, cross, height = text.lower().partition("x")
    if not (cross and width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise ProbeError(f"--picture {text}: write WIDTHxHEIGHT in pixels, for example 640x480")
    return int(width), int(height)


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ProbeError(f"--shard {text}: write I/N with I from 0 to N-1, for example 0/4")
    return int(index), int(count)


def _load(
    recipe: str,
    sets: list[str] | None,
    *,
    backbone: str | None = None,
    data: str | None = None,
    own_samples: bool = False,
) -> Recipe:
    from probe.recipe import load_recipe, parse_recipe

    overrides = list(sets or ())
    if recipe.endswith((".h5", ".h5.partial")):
        from probe.trace import open_trace

        with open_trace(Path(recipe)) as trace:
            if trace.header.extra.get("own_samples") and not own_samples:
                raise ProbeError(f"{recipe} is of a picture and a question of your own; give --image and --ask again")
            loaded = parse_recipe(trace.header.recipe_yaml, source=recipe, sets=overrides)
    else:
        loaded = load_recipe(recipe, overrides)
    if backbone is not None:
        loaded = loaded.model_copy(update={"backbone": backbone})
    if data is not None:
        source = (
            {"task": None, "file": data}
            if data.endswith((".jsonl", ".json")) or Path(data).exists()
            else {
                "task": data,
                "file": None,
            }
        )
        loaded = loaded.model_copy(update={"data": loaded.data.model_copy(update=source)})
    return loaded


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
