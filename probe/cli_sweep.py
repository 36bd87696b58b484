"""The command `probe sweep`: parses, calls `probe.sweep_run`, prints."""

from __future__ import annotations

import shlex
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from probe.cli_common import PluginOption, RecipeArgument, SetOption, err, out, recipe_of, shard_of
from probe.errors import ProbeError

if TYPE_CHECKING:
    from rich.progress import TaskID

    from probe.recipe import Recipe
    from probe.runner import Progress
    from probe.sweep import Unit
    from probe.sweep_run import OnUnit, SweepResult, Workers


def sweep(
    recipe: RecipeArgument,
    sets: SetOption = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many samples per run.")] = None,
    folder: Annotated[Path | None, typer.Option("--out", "-o", help="Folder; default runs/NAME.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:0, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    shard: Annotated[str | None, typer.Option(metavar="I/N", help="Only every N-th run, from the I-th on.")] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Processes that share the runs.")] = 1,
    retries: Annotated[int, typer.Option(min=0, help="How often a run that failed is tried again.")] = 1,
    on: Annotated[str | None, typer.Option(metavar="ray", help="Let the workers of a Ray cluster run it.")] = None,
    address: Annotated[
        str | None, typer.Option(help="With --on ray: a running cluster's; default: one on this machine.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="With --on ray: how many; default: as many as the cluster has devices.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="With --on ray: GPUs of each worker, where there are any.")] = 1,
    figures: Annotated[bool, typer.Option(help="When all runs are done, draw them as well.")] = True,
    plan: Annotated[bool, typer.Option("--plan", help="Only list the runs, and which are done.")] = False,
    plugin: PluginOption = None,
) -> None:
    """Run every combination of a recipe's `sweep`, or what is left of it, and end with tables and figures."""
    from probe.plugins import load_plugins
    from probe.stopping import Stopped
    from probe.sweep_jobs import Job, start_jobs
    from probe.sweep_ray import workers as on_ray
    from probe.sweep_run import Worker
    from probe.sweep_run import sweep as run_sweep

    if on not in (None, "ray"):
        raise ProbeError(f"--on {on}: there is only `ray`; without --on the sweep runs here")
    if on is None and (address is not None or workers is not None or gpus != 1):
        raise ProbeError("--address, --workers and --gpus belong to --on ray")
    if on is not None and jobs > 1:
        raise ProbeError("--jobs shares this machine out, --on ray a cluster (with --workers); give one of them")
    load_plugins(plugin or [])
    loaded = recipe_of(recipe, sets)
    where = folder or Path("runs") / loaded.name.replace("/", "-")
    if plan:
        _plan(loaded if limit is None else loaded.replace(data=loaded.written("data") | {"limit": limit}), where)
        return
    command = "probe " + shlex.join(sys.argv[1:])

    def run_with(work: Workers, on_unit: OnUnit) -> SweepResult:
        share = shard_of(shard)
        return run_sweep(loaded, out=where, limit=limit, workers=work, shard=share, retries=retries, on_unit=on_unit)

    try:
        with _Display() as display, ExitStack() as beside:
            here = Worker(device, dtype, on_progress=display.sample, command=command).all
            if jobs > 1:
                others = [
                    Job(
                        recipe=loaded.to_yaml(),
                        source=recipe,
                        out=str(where),
                        limit=limit,
                        device=device,
                        dtype=dtype,
                        shard=shard_of(shard),
                        retries=retries,
                        plugins=tuple(map(str, plugin or [])),
                        begin=i / jobs,
                        command=command,
                    )
                    for i in range(1, jobs)
                ]
                running = beside.enter_context(start_jobs(others, where, device))
                run_with(here, display.unit)
                for process in running:
                    process.wait()
            if on == "ray":
                work = on_ray(
                    address,
                    count=workers,
                    gpus=gpus,
                    device=device,
                    dtype=dtype,
                    plugins=plugin or (),
                    command=command,
                    on_note=_note,
                )
                result = run_with(work, display.units)
            else:
                result = run_with(here, display.unit)  # with siblings: what they left, and the table
    except KeyboardInterrupt as stopped:
        status = stopped.status if isinstance(stopped, Stopped) else 130
        err.print(f"stopped; everything that was finished is kept. To go on: {command}", highlight=False, markup=False)
        raise typer.Exit(status) from None
    _report(result, figures)
    raise typer.Exit(1 if result.failures or any(row.failed for rows in result.rows.values() for _, row in rows) else 0)


def _note(words: str) -> None:
    err.print("[yellow]note:[/] ", end="")
    err.print(words, highlight=False, markup=False)


def _plan(recipe: Recipe, where: Path) -> None:
    from rich.table import Table

    from probe.sweep import cells_of, check_cells, is_done, units_of

    cells = cells_of(recipe)
    check_cells(cells)
    assert recipe.sweep is not None
    units = units_of(cells, recipe.sweep.shards)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    settings = ("settings",) if recipe.sweep.set else ()
    for name in ("", "backbone", "data", "seed", *settings, "run", "done"):
        table.add_column(name)
    done = 0
    for number, unit in enumerate(units):
        group, finished = unit.cell.group, is_done(unit, where)
        done += finished
        title = unit.cell.title + ("" if unit.shard is None else f" ({unit.shard[0]}/{unit.shard[1]})")
        settled = (", ".join(group.settled),) if settings else ()
        who = (str(number), group.backbone, group.data, str(group.seed), *settled)
        table.add_row(*who, title, "yes" if finished else "")
    out.print(table)
    told = f"{len(units)} runs in {where}, {done} of them done"
    out.print(told, highlight=False, markup=False, soft_wrap=True)


def _report(result: SweepResult, figures: bool) -> None:
    from probe.views.sweep_figures import write_figures, write_study
    from probe.views.sweep_table import render_sweep

    out.print(render_sweep(result.rows))
    for failure in result.failures:
        err.print("[bold red]failed:[/] ", end="")
        err.print(f"{failure.unit.title}: {failure.reason}", highlight=False, markup=False)
    if result.open:
        err.print(f"{result.open} runs are not done; the same command goes on with them", highlight=False)
    if written := [*result.tables, *write_study(result.rows, result.folder)]:
        out.print("tables: " + ", ".join(map(str, written)), highlight=False, markup=False)
    if figures and not result.open:
        with err.status("drawing"):
            drawn, notes = write_figures(result.rows, result.folder)
        for words in notes:
            _note(words)
        if drawn:
            out.print("figures: " + ", ".join(path.name for path in drawn), highlight=False, markup=False)
    out.print(f"traces: {result.folder}", highlight=False, markup=False)


class _Display:
    """How far the sweep and its present run are, on a terminal; nothing where there is none."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=err,
            transient=True,
            disable=not err.is_terminal,
        )
        self._runs: TaskID | None = None
        self._samples: TaskID | None = None

    def __enter__(self) -> _Display:
        self._bar.start()
        self._runs = self._bar.add_task("runs", total=None)
        self._samples = self._bar.add_task("", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def unit(self, finished: int, total: int, unit: Unit | None) -> None:
        """A unit begins."""
        assert self._runs is not None and self._samples is not None
        self._bar.update(self._runs, completed=finished, total=total)
        self._bar.reset(self._samples, description=unit.title if unit else "", total=None)

    def units(self, finished: int, total: int, unit: Unit | None) -> None:
        """Some are being worked on elsewhere, `finished` are done."""
        assert self._runs is not None and self._samples is not None
        self._bar.update(self._runs, completed=finished, total=total)
        self._bar.update(self._samples, visible=False)

    def sample(self, at: Progress) -> None:
        """A sample of it is being worked on."""
        assert self._samples is not None
        self._bar.update(self._samples, completed=at.sample, total=at.total)
