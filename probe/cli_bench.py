"""The command line's `bench`: what instrumentation costs and what pruning gains, on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from probe.cli_common import err, out
from probe.errors import ProbeError

if TYPE_CHECKING:
    from probe.bench.line import Line

app = typer.Typer()


@app.command()
def bench(
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer steps and repeats: all rows of a CPU in a few minutes.")
    ] = False,
    rows: Annotated[str | None, typer.Option(metavar="NAME,...", help="Only these rows; `--list` names them.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="List the rows, their targets and commands.")] = False,
    backbone: Annotated[
        str | None, typer.Option("--backbone", "-b", help="Measure this one, in place of 8 layers of width 512.")
    ] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="The backbone's published shape with random weights: no download.")
    ] = False,
    layers: Annotated[int | None, typer.Option(min=1, help="So many decoder layers.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="So many visual tokens; default 1,024.")] = None,
    answer: Annotated[int | None, typer.Option(min=1, help="So many answer tokens; default 64.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="So many denoising steps; default: the row's own.")] = None,
    width: Annotated[int | None, typer.Option(min=64, help="Width of the model, where no backbone is named.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:0, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16.")] = "float32",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Processor threads; default: as many as torch takes.")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs",
            "-j",
            min=1,
            help="Processes of one thread that share the rows; default 1, with --quick on a CPU of two cores 2.",
        ),
    ] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Timed turns of every pair; default: the row's.")] = None,
    file: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write FILE.md and FILE.json as well.")
    ] = None,
) -> None:
    """Measure what instrumentation costs and what pruning gains, with the target beside every figure."""
    from probe.bench.settings import listing, prepared, shared_by
    from probe.bench.share import measure_shared
    from probe.bench.suite import ROWS, chosen, measure
    from probe.bench.table import as_json, conditions, markdown, not_measured, render

    if listed:
        out.print(listing(ROWS), highlight=False, markup=False, soft_wrap=True)
        return
    wanted = chosen([name.strip() for name in rows.split(",")] if rows else [], backbone)
    settings: dict[str, Any] = {
        "device": device, "dtype": dtype, "quick": quick, "backbone": backbone, "random_weights": random_weights,
        "layers": layers, "tokens": tokens, "answer": answer, "width": width,
    }  # fmt: skip
    shared = shared_by(jobs, threads, quick=quick, device=device)
    bench = prepared(threads=1 if shared > 1 else threads, **settings)
    told = conditions(bench, shared)

    def write(lines: list[Line]) -> None:
        """What there is so far: a long run that is stopped keeps its rows."""
        if file is None:
            return
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.with_suffix(".md").write_text(markdown(lines, told), encoding="utf-8")
            file.with_suffix(".json").write_text(as_json(lines, told), encoding="utf-8")
        except OSError as error:
            raise ProbeError(f"cannot write {file}: {error.strerror}") from None

    write([])
    with err.status("measuring") as status:
        if shared > 1:
            lines = measure_shared(wanted, shared, settings, steps=steps, repeats=repeats, on_lines=write)
        else:
            lines = measure(
                bench,
                wanted,
                steps=steps,
                repeats=repeats,
                on_row=lambda name: status.update(f"measuring {name}"),
                on_lines=write,
            )
    told = conditions(bench, shared)
    lines += [] if rows and "full" not in rows else not_measured(lines)
    out.print(render(lines, told))
    write(lines)
    if file is not None:
        out.print(f"wrote {file.with_suffix('.md')} and {file.with_suffix('.json')}", highlight=False)
