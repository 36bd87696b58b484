"""Run a recipe: every sample without its interventions (the baseline) and with them, into two traces and one table.

The main job of the project. Times are taken honestly: where the recipe records, both sides are run once more with
nothing recorded, interleaved sample by sample, and only those times are compared.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import cast, get_args

import numpy as np
import torch

from probe import data
from probe.assemble import StepLogits, recorded_variables
from probe.backbones import load
from probe.backbones.base import Backbone
from probe.compile import ProbeTable, Record, compile_recipe
from probe.context import check_length
from probe.decoding.unmask import Remasking
from probe.errors import ProbeError
from probe.failures import failure_notes, free_memory, is_out_of_memory, reason_of
from probe.finite import NONFINITE, NotFinite, where_first
from probe.generate import Generated, OnStep, generate
from probe.loop import Rule, Step
from probe.probe_code import CodeProbe
from probe.recipe import Recipe
from probe.run_files import failure_of, open_writer, output_folder, record_of
from probe.stopping import Stopped, Stopping
from probe.summary import Row, count_failed, summarise
from probe.timing import PHASES, Stopwatch
from probe.views.picture import draw_run

DEFAULT_LIMIT = 24
"""Samples of a task when neither the recipe nor the command says how many: tasks have no end."""

OnProgress = Callable[["Progress"], None]


@dataclass(frozen=True)
class Progress:
    """Where a run is: for a progress display. `total` is None while the data does not say how many samples it has."""

    sample: int
    total: int | None
    side: str
    step: int
    steps: int


@dataclass(frozen=True)
class RunResult:
    """What a run left: traces, the table's rows (baseline first, if there is one), and how many samples failed."""

    trace: Path
    baseline: Path | None
    rows: tuple[Row, ...]
    failed: int
    samples: int
    notes: tuple[str, ...] = ()
    picture: Path | None = None


@dataclass(frozen=True)
class _Side:
    """One way of running the samples: the baseline or the recipe."""

    label: str
    recipe: Recipe
    table: ProbeTable
    bare: ProbeTable
    path: Path
    recording: bool

    @property
    def records(self) -> list[Record]:
        """The signals that it records."""
        return [record for probe in self.table.probes for record in probe.records]


def rule_for(backbone: Backbone, recipe: Recipe, suggested: Mapping[str, int], *, pictures: bool) -> Rule:
    """The loop's settings for one sample: the recipe's, else the task's suggestion, else the backbone's own.

    A `gen_length` of the recipe's own takes one block and the suggested steps in proportion, unless it says otherwise.
    """
    own = recipe.generate
    base = {
        "gen_length": backbone.defaults.gen_length,
        "block_length": backbone.defaults.block_length,
        "steps": backbone.defaults.steps,
    } | dict(suggested)
    gen_length = own.gen_length or base["gen_length"]
    changed = gen_length != base["gen_length"]
    block_length = own.block_length or (gen_length if changed else base["block_length"])
    in_proportion = max(1, round(base["steps"] * gen_length / base["gen_length"]))
    steps = own.steps or (in_proportion if changed else base["steps"])
    stop = own.stop if own.stop is not None else (backbone.defaults.stop if pictures else ())
    remasking = own.remasking or "low_confidence"
    if remasking not in get_args(Remasking):
        raise ProbeError(f"generate.remasking is `{remasking}`; known: {', '.join(get_args(Remasking))}")
    return Rule(
        gen_length=gen_length,
        block_length=block_length,
        steps=steps,
        mask_id=backbone.special.mask,
        suppressed=backbone.special.suppressed,
        temperature=own.temperature or 0.0,
        remasking=cast(Remasking, remasking),
        cfg_scale=own.cfg_scale or 0.0,
        stop=tuple(tuple(backbone.tokenize(s)) for s in stop),
        suffix=tuple(backbone.tokenize(own.suffix)) if own.suffix else (),
    )


def samples_of(recipe: Recipe) -> Iterator[data.Sample | ProbeError]:
    """The recipe's samples; one that cannot be read is yielded as its error, and reading goes on.

    What concerns all of them (no such task, no such file, a wrong line in it) raises `ProbeError` at once.
    """
    limit = recipe.data.limit
    if recipe.data.file is not None:
        return _reading(data.from_jsonl(recipe.data.file), limit)
    limit = DEFAULT_LIMIT if limit is None else limit
    return _reading(data.load(recipe.data.source, limit), limit)


def _reading(source: Iterator[data.Sample], limit: int | None) -> Iterator[data.Sample | ProbeError]:
    count = 0
    while limit is None or count < limit:
        try:
            yield next(source)
        except StopIteration:
            return
        except ProbeError as error:
            yield error
        count += 1


def run(
    recipe: Recipe,
    *,
    backbone: Backbone | None = None,
    samples: Sequence[data.Sample] | None = None,
    out: str | Path | None = None,
    limit: int | None = None,
    seed: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    resume: bool = False,
    shard: tuple[int, int] | None = None,
    baseline: bool | None = None,
    timed: bool | None = None,
    code_probes: Sequence[CodeProbe] = (),
    on_progress: OnProgress | None = None,
    command: str = "",
) -> RunResult:
    """Run `recipe` on its data, or on `samples`, and leave `OUT/NAME.trace.h5` (and the baseline's) behind.

    `out` is a folder (default `runs/NAME`); `seed` overrides the recipe's; `resume` finishes what an earlier run left;
    `shard` (i, n) takes every n-th sample from the i-th on, and puts that into the file names (`probe.trace.merge`).
    A sample that fails is recorded with its reason, and the run goes on. Raises `ProbeError` for anything that
    concerns the run as a whole, before a file is made. Asked to stop (Ctrl-C, SIGTERM, SIGHUP), it finishes its
    sample, closes the partial traces and raises `Stopped`; asked twice, it stops at once.
    """
    if seed is not None:
        recipe = recipe.model_copy(update={"generate": recipe.generate.model_copy(update={"seed": seed})})
    if limit is not None:  # the trace must say all that repeating it takes
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"limit": limit})})
    seed, limit = recipe.generate.seed, recipe.data.limit
    backbone = backbone or load(recipe.backbone, device=pick_device(device), dtype=dtype)
    table = compile_recipe(recipe, backbone.facts)
    intervenes = any(p.edit is not None for p in table.probes)
    with_baseline = intervenes and (recipe.run.baseline if baseline is None else baseline)
    records = any(p.records for p in table.probes) or bool(code_probes)
    timed = recipe.run.time if timed is None else timed
    source: Iterator[data.Sample | ProbeError] = iter(samples[:limit]) if samples is not None else samples_of(recipe)
    total = len(samples[:limit]) if samples is not None else limit
    # whatever concerns every sample is said before a file is made
    opening = next(source, None)
    if opening is None:
        raise ProbeError(f"there are no samples in {recipe.data.source}")
    if isinstance(opening, data.Sample):
        rule_for(backbone, recipe, opening.generate, pictures=bool(opening.images))
    source = chain([opening], source)
    folder = output_folder(recipe.name, out, resume=resume)

    def side(label: str, r: Recipe, path: Path) -> _Side:
        return _Side(
            label,
            r,
            compile_recipe(r, backbone.facts),
            compile_recipe(r.without_recording(), backbone.facts),
            path,
            records,
        )

    stem = recipe.name.replace("/", "-")
    if shard is not None:
        stem += f".shard{shard[0]}of{shard[1]}"
    sides = [side(recipe.name, recipe, folder / f"{stem}.trace.h5")]
    if with_baseline:
        sides.insert(0, side("baseline", recipe.without_interventions(), folder / f"{stem}.baseline.trace.h5"))

    count = finished = 0
    warm = False
    failures: list[tuple[int, str]] = []
    warned: set[str] = set()
    notes: list[str] = []
    with ExitStack() as stack:
        stopping = stack.enter_context(Stopping())
        writers = [
            stack.enter_context(
                open_writer(
                    s.path,
                    s.recipe,
                    s.table,
                    backbone,
                    command=command,
                    code_probes=code_probes,
                    resume=resume,
                    own_samples=samples is not None,
                )
            )
            for s in sides
        ]
        for number, item in enumerate(source):
            if shard is not None and number % shard[1] != shard[0]:
                continue
            if stopping.signal is not None:
                raise Stopped(stopping.signal, folder, finished, total if shard is None else None)
            count += 1
            finished += 1
            if all(number in w.done for w in writers):
                continue
            no_memory = False
            try:
                if isinstance(item, ProbeError):
                    raise item
                results = _one_sample(
                    backbone,
                    sides,
                    item,
                    number,
                    seed,
                    timed=timed and records,
                    code_probes=code_probes,
                    total=total,
                    on_progress=on_progress,
                    warm_up=not warm,
                    warned=warned,
                )
                warm = True
                done = [record_of(item, number, result, pictures=recipe.trace.pictures) for result in results]
            except Exception as error:
                failures.append((number, reason_of(error)))
                done = [failure_of(item, number, failures[-1][1])] * len(writers)
                no_memory = is_out_of_memory(error)
            if no_memory:  # here nothing refers to the exception, and to what its frames held, any more
                free_memory()
            for writer, record in zip(writers, done, strict=True):
                if number not in writer.done:
                    writer.write(record)
    rows = summarise([s.path for s in sides], [s.label for s in sides])
    failed = count_failed(sides[-1].path)
    notes += failure_notes(failures, failed)
    if intervenes and rows[-1].untouched:
        notes.append(
            f"{rows[-1].untouched} of {rows[-1].n} samples kept every visual token: they ended before the intervention "
            "began, or it removes nothing"
        )
    return RunResult(
        trace=sides[-1].path,
        baseline=sides[0].path if with_baseline else None,
        rows=rows,
        failed=failed,
        samples=count,
        picture=_draw(sides, notes),
        notes=tuple(notes),
    )


def _draw(sides: Sequence[_Side], notes: list[str]) -> Path | None:
    """The run's picture. The traces are complete by now, so that one which cannot be drawn is a note, no failure."""
    path = sides[-1].path
    try:
        return draw_run(sides[0].path if len(sides) > 1 else None, path, path.with_suffix("").with_suffix(".png"))
    except Exception as error:
        notes.append(f"the run's picture could not be drawn ({reason_of(error)}); the traces are complete")
        return None


def _one_sample(
    backbone: Backbone,
    sides: Sequence[_Side],
    sample: data.Sample,
    number: int,
    seed: int,
    *,
    timed: bool,
    code_probes: Sequence[CodeProbe],
    total: int | None,
    on_progress: OnProgress | None,
    warm_up: bool,
    warned: set[str],
) -> list[Generated]:
    """All sides of one sample; pictures are encoded once, and each side is charged for it."""
    sample.check()
    watch = Stopwatch(next(backbone.parameters()).device)
    with watch.section("encode"):
        features = backbone.encode_images(sample.images) if sample.images else None
    encode_flops = backbone.encode_flops(features) if features is not None else 0.0
    spent = sum(watch.drain().values())
    recipe = sides[0].recipe
    prompt = backbone.assemble(sample.question, features, think=bool(recipe.generate.think))
    rule = rule_for(backbone, recipe, sample.generate, pictures=bool(sample.images))
    check_length(backbone, prompt, rule.gen_length + len(rule.suffix))
    keeps_signals = recipe.trace.samples == "all" or number < int(recipe.trace.samples)

    def on_step(side: _Side) -> OnStep:
        def tell(step: Step) -> None:
            if on_progress is not None:
                on_progress(Progress(number, total, side.label, step.clock.step + 1, rule.steps))

        return tell

    # the baseline runs first: its logits are what signals such as logit_kl compare with
    compares = len(sides) > 1 and keeps_signals and any("reference" in r.signal.entry.needs for r in sides[-1].records)
    unpruned: StepLogits = {}

    def recorded(side: _Side) -> Generated:
        is_baseline = side is not sides[-1]
        return generate(
            backbone,
            [prompt],
            rule,
            side.table if keeps_signals else side.bare,
            seed=seed,
            samples=[number],
            code_probes=code_probes if keeps_signals else (),
            on_step=on_step(side),
            collected=unpruned if compares and is_baseline else None,
            reference=None if is_baseline else unpruned,
        )[0]

    def unrecorded(side: _Side) -> Generated:
        # code probes may intervene, so they are part of what is timed
        return generate(backbone, [prompt], rule, side.bare, seed=seed, samples=[number], code_probes=code_probes)[0]

    recording = sides[0].recording
    if warm_up and (timed or not recording):
        unrecorded(sides[0])  # the first run of all pays for what libraries do once
    turns = list(sides if compares or number % 2 == 0 else sides[::-1])
    results = {side.path: recorded(side) for side in turns}
    again = turns if timed else []
    clean = {side.path: unrecorded(side) for side in again} if recording else results
    for side in sides:
        dims = {v.name: v.dims for v in recorded_variables(side.table)}
        where = where_first(results[side.path].arrays, side.table, dims, rule.steps)
        if where is not None and side.label not in warned:
            warned.add(side.label)
            told = f"{side.label}, sample {number}, {where}; `{NONFINITE}` in the trace counts them"
            warnings.warn(told, NotFinite, stacklevel=2)
    return [_charged(side, results[side.path], clean.get(side.path), spent, encode_flops, number) for side in sides]


def _charged(
    side: _Side, result: Generated, clean: Generated | None, spent: float, encode_flops: float, number: int
) -> Generated:
    """A result with its share of the encoding, and with time and FLOPs of the run that recorded nothing."""
    if clean is not None and clean.ids != result.ids:
        raise ProbeError(f"{side.label}: recording changed the answer of sample {number}; please report this")
    arrays = dict(result.arrays)
    encode = PHASES.index("encode")
    arrays["seconds"][0, encode], arrays["flops"][0, encode] = spent, encode_flops
    nan = np.array(np.nan)
    arrays |= {
        "seconds_total": result.arrays["seconds_total"] + spent,
        "flops_total": result.arrays["flops_total"] + encode_flops,
        "seconds_unrecorded": nan if clean is None else clean.arrays["seconds_total"] + spent,
        "flops_unrecorded": nan if clean is None else clean.arrays["flops_total"] + encode_flops,
    }
    return replace(result, arrays=arrays)


def pick_device(device: str) -> str:
    """`auto` is the first CUDA device if there is one, else the CPU."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind = device.split(":")[0]
    if kind == "cuda" and not torch.cuda.is_available():
        raise ProbeError(
            f"device `{device}` was asked for, but torch {torch.__version__} sees no CUDA device here; use cpu"
        )
    if kind not in ("cpu", "cuda", "mps"):
        raise ProbeError(f"there is no device `{device}`; known: auto, cpu, cuda, cuda:0, mps")
    return device
