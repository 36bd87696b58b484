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

import numpy as np
import torch

from probe import data, lmms_settings
from probe.assemble import StepLogits, recorded_variables
from probe.backbones import load
from probe.backbones.base import Backbone, Prompt
from probe.compile import ProbeTable, Record, compile_recipe
from probe.composition import check_composition
from probe.context import check_length
from probe.data.pictures import on_sheet
from probe.decoding.caching import NoCache
from probe.encoder import Encoded, encode_with_probes
from probe.errors import ProbeError
from probe.failures import failure_notes, free_memory, is_out_of_memory, reason_of
from probe.finite import NONFINITE, NotFinite, where_first
from probe.generate import Generated, OnStep, generate
from probe.generation import rule_for
from probe.loop import Step
from probe.probe_code import CodeProbe
from probe.recipe import Recipe
from probe.run_files import failure_of, open_writer, output_folder, record_of
from probe.stopping import Stopped, Stopping
from probe.summary import Row, summarise
from probe.timing import PHASES, Stopwatch
from probe.views.picture import draw_run

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


def samples_of(recipe: Recipe, backbone: str = "") -> Iterator[data.Sample | ProbeError]:
    """The recipe's samples, for the backbone of this name.

    One that cannot be read is yielded as its error, and reading goes on. What concerns all of them (no such task, no
    such file, a wrong line in it) raises `ProbeError` at once.
    """
    limit = None if recipe.data.lmms_eval is not None else recipe.data.limit  # which counts in each of a task's parts
    return _reading(data.samples(recipe.data, backbone), limit)


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
    samples: Sequence[data.Sample | ProbeError] | None = None,
    out: str | Path | None = None,
    limit: int | None = None,
    seed: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    resume: bool = False,
    shard: tuple[int, int] | None = None,
    baseline: bool | None = None,
    timed: bool | None = None,
    picture: bool = True,
    code_probes: Sequence[CodeProbe] = (),
    on_progress: OnProgress | None = None,
    command: str = "",
    stopping: Stopping | None = None,
) -> RunResult:
    """Run `recipe` on its data, or on `samples`, and leave `OUT/NAME.trace.h5` (and the baseline's) behind.

    `out` is a folder (default `runs/NAME`); `seed` overrides the recipe's; `resume` finishes what an earlier run left;
    `shard` (i, n) takes every n-th sample from the i-th on, and puts that into the file names (`probe.trace.merge`);
    `picture` draws what was kept, beside the traces.
    A sample that fails is recorded with its reason, and the run goes on. Raises `ProbeError` for anything that
    concerns the run as a whole, before a file is made. Asked to stop (Ctrl-C, SIGTERM, SIGHUP), it finishes its
    sample, closes the partial traces and raises `Stopped`; asked twice, it stops at once. `stopping` is for those who
    ask it in another way than by a signal to this process.
    """
    if seed is not None:
        recipe = recipe.model_copy(update={"generate": recipe.generate.model_copy(update={"seed": seed})})
    if limit is not None:  # the trace must say all that repeating it takes
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"limit": limit})})
    seed, limit = recipe.generate.seed, recipe.data.limit
    backbone = backbone or load(recipe.backbone, device=pick_device(device), dtype=dtype, **recipe.load)
    of_harness = recipe.data.lmms_eval is not None
    if of_harness:  # likewise: how long an answer is and how many steps it takes
        recipe = lmms_settings.with_settings(recipe, backbone.source)
    table = compile_recipe(recipe, backbone.facts)
    intervenes = any(p.edit is not None for p in table.probes)
    with_baseline = intervenes and (recipe.run.baseline if baseline is None else baseline)
    records = any(p.records for p in table.probes) or bool(code_probes)
    timed = recipe.run.time if timed is None else timed
    given = None if samples is None else samples[:limit]
    source = samples_of(recipe, backbone.source) if given is None else iter(given)
    total = len(given) if given is not None else limit
    # whatever concerns every sample is said before a file is made
    opening = next(source, None)
    if opening is None:
        raise ProbeError(f"there are no samples in {recipe.data.source}")
    if isinstance(opening, data.Sample):
        rule = rule_for(backbone, recipe, opening.generate, pictures=bool(opening.pictures))
        check_composition(recipe, table, rule.caching, rule.nominal_steps)
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

    count = finished = unreached = 0
    warm = False
    failures: list[tuple[int, str]] = []
    warned: set[str] = set()
    notes: list[str] = []
    with ExitStack() as stack:
        stopping = stack.enter_context(Stopping()) if stopping is None else stopping
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
                    own_samples=samples is not None and not of_harness,
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
                unreached += bool(results[-1].arrays["unreached"])
            except Exception as error:
                failures.append((number, reason_of(error)))
                done = [failure_of(item, number, failures[-1][1])] * len(writers)
                no_memory = is_out_of_memory(error)
            if no_memory:  # here nothing refers to the exception, and to what its frames held, any more
                free_memory()
            for writer, record in zip(writers, done, strict=True):
                if number not in writer.done:
                    writer.write(record)
    if unreached:
        notes.append(f"{unreached} of {count} samples ended before an intervention's first step (trace: `unreached`)")
    if of_harness and samples is None and shard is None:
        notes += [_scored_by_harness(s) for s in sides]
    rows = summarise([s.path for s in sides], [s.label for s in sides])
    failed = rows[-1].failed
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
        picture=_draw(sides, notes) if picture else None,
        notes=tuple(notes),
    )


def _scored_by_harness(side: _Side) -> str:
    """Let lmms-eval score a side's answers, all together; what it found, in a line."""
    from probe import lmms_score

    return lmms_score.note(side.label, lmms_score.score(side.path, side.recipe))


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
    """All sides of one sample; pictures are encoded once for all sides that have no probes in the encoder."""
    sample.check()
    recipe = sides[0].recipe
    seen: dict[int, _Seen] = {}

    def see(table: ProbeTable) -> _Seen:
        key = id(table) if table.encoder else 0
        if key not in seen:
            seen[key] = _see(backbone, sample, table, seed * 1_000_003 + number, think=bool(recipe.generate.think))
            check_length(backbone, seen[key].prompt, rule.gen_length + len(rule.suffix))
        return seen[key]

    rule = rule_for(backbone, recipe, sample.generate, pictures=bool(sample.pictures))
    keeps_signals = recipe.trace.samples == "all" or number < int(recipe.trace.samples)

    def on_step(side: _Side) -> OnStep:
        def tell(step: Step) -> None:
            if on_progress is not None:
                on_progress(Progress(number, total, side.label, step.clock.step + 1, rule.steps))

        return tell

    # the baseline runs first: its logits are what signals such as logit_kl compare with
    compares = len(sides) > 1 and keeps_signals and any("reference" in r.signal.entry.needs for r in sides[-1].records)
    unpruned: StepLogits = {}

    def without_cache(side: _Side) -> StepLogits:
        """The logits of the side's run in which every pass computes every row."""
        found: StepLogits = {}
        if keeps_signals and any("uncached" in r.signal.entry.needs for r in side.records):
            plain, prompts = replace(rule, caching=NoCache()), [see(side.bare).prompt]
            generate(backbone, prompts, plain, side.bare, seed=seed, samples=[number], collected=found)
        return found

    def recorded(side: _Side) -> Generated:
        is_baseline = side is not sides[-1]
        table = side.table if keeps_signals else side.bare
        result = generate(
            backbone,
            [see(table).prompt],
            rule,
            table,
            seed=seed,
            samples=[number],
            code_probes=code_probes if keeps_signals else (),
            on_step=on_step(side),
            collected=unpruned if compares and is_baseline else None,
            reference=None if is_baseline else unpruned,
            uncached=without_cache(side),
        )[0]
        return _charged(result, see(table))

    def unrecorded(side: _Side) -> Generated:
        # code probes may intervene, so they are part of what is timed
        prompts = [see(side.bare).prompt]
        result = generate(backbone, prompts, rule, side.bare, seed=seed, samples=[number], code_probes=code_probes)[0]
        return _charged(result, see(side.bare))

    recording = sides[0].recording
    if warm_up and sample.pictures:  # sides may see their pictures differently, so this too is paid for beforehand
        _see(backbone, sample, sides[0].bare, seed, think=False)
    if warm_up and (timed or not recording):
        unrecorded(sides[0])  # the first run of all pays for what libraries do once
    turns = list(sides if compares or number % 2 == 0 else sides[::-1])
    results = {side.path: recorded(side) for side in turns}
    if len(sample.pictures) > 1:
        sizes = [p.size for p in sample.pictures]
        for side, result in zip(turns, list(results.values()), strict=True):
            prompt = see(side.table if keeps_signals else side.bare).prompt
            box = on_sheet(prompt.box.cpu().numpy(), prompt.picture.cpu().numpy(), sizes)
            results[side.path] = replace(result, arrays=result.arrays | {"visual_box": box})
    again = turns if timed else []
    clean = {side.path: unrecorded(side) for side in again} if recording else results
    for side in sides:
        dims = {v.name: v.dims for v in recorded_variables(side.table)}
        done = results[side.path]
        where = where_first(done.arrays, side.table, dims, rule.steps, done.nan_scores)
        if where is not None and side.label not in warned:
            warned.add(side.label)
            told = f"{side.label}, sample {number}, {where}; `{NONFINITE}` in the trace counts them"
            warnings.warn(told, NotFinite, stacklevel=2)
    return [_compared(side, results[side.path], clean.get(side.path), number) for side in sides]


@dataclass(frozen=True)
class _Seen:
    """A sample as the language model meets it, what that cost, and what probes recorded on the way."""

    prompt: Prompt
    seconds: Mapping[str, float]
    """By phase: `encode` and `probe`."""
    flops: Mapping[str, float]
    arrays: Mapping[str, np.ndarray]
    nan_scores: Mapping[str, int]
    """How many values of its scores were NaN, by probe."""


def _see(backbone: Backbone, sample: data.Sample, table: ProbeTable, seed: int, *, think: bool) -> _Seen:
    """Encode a sample's pictures or clip under a table's probes, and lay the prompt out."""
    watch = Stopwatch(backbone.device)
    done: Encoded | None = None
    with watch.section("encode"):
        if sample.pictures:
            done = encode_with_probes(
                backbone,
                sample.frames or sample.images,
                table,
                clip=bool(sample.frames),
                question=sample.question,
                seed=seed,
                watch=watch,
            )
    flops = {"encode": 0.0 if done is None else done.flops, "probe": 0.0 if done is None else done.probe_flops}
    spent = watch.drain()
    seconds = {phase: sum(s for (_, p), s in spent.items() if p == phase) for phase in flops}
    if done is None:
        return _Seen(backbone.assemble(sample.question, None, think=think), seconds, flops, {}, {})
    arrays = done.arrays
    if done.view_picture is not None and len(sample.pictures) > 1:
        of_patch = done.view_picture[arrays["patch_view"]]
        arrays = arrays | {"patch_box": on_sheet(arrays["patch_box"], of_patch, [p.size for p in sample.pictures])}
    return _Seen(done.assemble(backbone, sample.question, think=think), seconds, flops, arrays, done.nan_scores)


def _charged(result: Generated, seen: _Seen) -> Generated:
    """A result with its share of the encoding, and what was recorded there."""
    arrays = {**result.arrays, **seen.arrays}
    seconds, flops, nonfinite = (arrays[name].copy() for name in ("seconds", "flops", NONFINITE))
    nonfinite[0] += sum(seen.nan_scores.values())
    for phase in ("encode", "probe"):
        seconds[0, PHASES.index(phase)] += seen.seconds[phase]
        flops[0, PHASES.index(phase)] += seen.flops[phase]
    arrays |= {
        "seconds": seconds,
        "flops": flops,
        NONFINITE: nonfinite,
        "seconds_total": arrays["seconds_total"] + sum(seen.seconds.values()),
        "flops_total": arrays["flops_total"] + sum(seen.flops.values()),
    }
    return replace(result, arrays=arrays, nan_scores=result.nan_scores | dict.fromkeys(seen.nan_scores, 0))


def _compared(side: _Side, result: Generated, clean: Generated | None, number: int) -> Generated:
    """A result with time and FLOPs of the run that recorded nothing."""
    if clean is not None and clean.ids != result.ids:
        raise ProbeError(f"{side.label}: recording changed the answer of sample {number}; please report this")
    nan = np.array(np.nan)
    arrays = result.arrays | {
        "seconds_unrecorded": nan if clean is None else clean.arrays["seconds_total"],
        "flops_unrecorded": nan if clean is None else clean.arrays["flops_total"],
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
