"""The command line's commands about traces: look at them, draw them, compare, join and check them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from probe.cli_common import err, out
from probe.errors import ProbeError

app = typer.Typer()


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
    traces: Annotated[
        list[Path] | None, typer.Argument(help="One trace; several, or folders, for `tradeoff` and `late_pruning`.")
    ] = None,
    figure: Annotated[str | None, typer.Option("--figure", "-f", help="See --list; default: the trace's own.")] = None,
    output: Annotated[Path | None, typer.Option("--out", "-o", help="FILE.png, .pdf or .svg.")] = None,
    sample: Annotated[int | None, typer.Option(help="Number of a sample, for figures of one sample.")] = None,
    layer: Annotated[int | None, typer.Option(help="A layer, instead of the mean over layers.")] = None,
    step: Annotated[int | None, typer.Option(help="A step, instead of all of them.")] = None,
    list_them: Annotated[bool, typer.Option("--list", help="List the figures.")] = False,
) -> None:
    """Draw a figure of a trace."""
    from probe.study.finished import in_folder
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
    files = [file for given in traces for file in (in_folder(given) if given.is_dir() else [given])]
    if not files:
        raise ProbeError(f"there are no finished traces (*.trace.h5) in {', '.join(map(str, traces))}")
    last = traces[-1]
    own = f"{figure or 'figure'}.png"
    path = output or (last / own if last.is_dir() else last.with_suffix("").with_suffix(f".{own}"))
    drawn = draw(files, figure, path, sample=sample, layer=layer, step=step)
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
