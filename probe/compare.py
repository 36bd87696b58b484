"""Traces beside each other, sample by sample: answers, cost, divergence from the first of them. Numbers only.

The first trace is the reference, usually the unpruned run. Everything is over the samples that finished in *all*
traces, so that every number of a comparison is about the same samples. `docs/compare.md` says what each one means.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from probe import intervals
from probe.compare_committed import Committed, Course, Final, decompose, final_of
from probe.compare_steps import Side, StepsApart, first_intervened, steps_apart
from probe.data.metrics import agreement
from probe.errors import ProbeError
from probe.intervals import NAN, Estimate
from probe.recipe_at import as_share
from probe.recipe_words import Wrong
from probe.recipe_yaml import read_yaml
from probe.trace import Trace, open_trace
from probe.trace_summary import unpruned_tokens

EQUAL_BUDGET = 0.01
"""Runs whose retention differs by more than this share of the visual tokens do not have the same budget."""


@dataclass(frozen=True)
class StepDivergence:
    """Means over `n` samples at one step, counted from the first intervened one (0; -1 is the step before).

    `tokens`: share of the slots filled in both runs that differ; `confidence`: the reference's minus this run's,
    over slots open in both; `kl`: `logit_kl` in nat, over slots open in both. NaN: nothing to compare.
    """

    step: int
    n: int
    tokens: float
    confidence: float
    kl: float


@dataclass(frozen=True)
class Divergence:
    """How far a run goes from the reference, over its `n` samples in which visual tokens went missing.

    `loss`, `left`: mean `logit_kl` over the slots open at the first intervened step, at that step and at the last step
    at which each of them was open; `restored` = 1 - left / loss. `changed`: share of the slots filled in both runs at
    the end that differ; `stake`: the same, of the slots still open when the intervention came. `ever` slots differed at
    some step, and `back` of them were equal at the end. `n` is 0 if no sample lost any: then all samples are in.
    """

    n: int
    loss: Estimate
    left: Estimate
    restored: Estimate
    changed: Estimate
    stake: Estimate
    ever: int
    back: int
    by_step: tuple[StepDivergence, ...]


@dataclass(frozen=True)
class Run:
    """One trace of a comparison. Costs are means per sample; `seconds` is time with nothing recorded (NaN: unknown).

    `score_difference`, `agreement` and the ratios are against the reference, and NaN for the reference itself.
    `retention` is the share of visual tokens over all steps and layers, `retention_end` that over the layers of the
    last step. `start` is the share of steps that run unpruned first, if the recipe's dial `start` says so.
    """

    label: str
    path: str
    recipe: str
    dials: Mapping[str, Any]
    backbone: str
    score: Estimate
    score_difference: Estimate
    agreement: Estimate
    flops: float
    flops_ratio: float
    seconds: float
    seconds_ratio: float
    retention: float
    retention_end: float
    start: float | None
    divergence: Divergence | None


@dataclass(frozen=True)
class LateStart:
    """A run that prunes from a share `start` of the steps on, beside the same pruner from the first step on.

    `line` = start + (1 - start) * score(start 0) is the score if tokens committed before were all right and the rest no
    better than when pruned from the beginning; `line_reference` = start * score(reference) + (1 - start) * score(start
    0) takes them for as right as the reference's. `surplus` is the score minus `line_reference`, paired by sample.
    `stake` and `stake_zero`: share of the slots that were open when the late run began to prune, filled in the
    end, that differ from the reference: in the late run, and the same slots in the run from the first step on.
    """

    label: str
    zero: str
    start: float
    score: float
    line: float
    line_reference: float
    surplus: Estimate
    stake: Estimate
    stake_zero: Estimate


@dataclass(frozen=True)
class SampleDifference:
    """One sample of one run, against the reference. `first_step` is the nominal step of the intervention, or -1."""

    sample: int
    sample_id: str
    task: str
    run: str
    score: float
    score_reference: float
    agreement: float
    slots: int
    changed: int
    first_step: int
    kl_first: float
    kl_last: float


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. `n` samples are in every number; `left_out` are not, since some trace lacks them."""

    n: int
    left_out: int
    reference: Run
    runs: tuple[Run, ...]
    late: tuple[LateStart, ...]
    committed: tuple[Committed, ...]
    samples: tuple[SampleDifference, ...]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; what is not known is None."""
        plain: dict[str, Any] = _plain(dataclasses.asdict(self))
        return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def compare(paths: Sequence[str | Path]) -> Comparison:
    """Compare traces with the first of them. Raises `ProbeError` where they are not of the same data."""
    if len(paths) < 2:
        raise ProbeError("a comparison needs two traces at least: the reference first, then what is compared with it")
    with ExitStack() as stack:
        traces = [stack.enter_context(open_trace(p)) for p in paths]
        numbers, left_out, warnings = _common(traces)
        rows = [_rows(t, numbers) for t in traces]
        warnings += _same_data(traces, rows)
        held = [_Held.read(label, t, r) for label, t, r in zip(_labels(), traces, rows, strict=False)]
        return _compare(held, numbers, left_out, warnings)


def _labels() -> Any:
    """A, B, ... Z, AA, AB, ..."""
    letters = [chr(ord("A") + i) for i in range(26)]
    return itertools.chain(letters, (x + y for x in letters for y in letters), map(str, itertools.count()))


# -------------------------------------------------------------------- which samples, and whether they are the same


def _common(traces: Sequence[Trace]) -> tuple[list[int], int, list[str]]:
    """The numbers of samples that finished in all traces; how many others there are; what to say about it."""
    finished, known, warnings = [], [], []
    for trace in traces:
        failed = trace.array("failed")
        numbers = trace.samples.tolist()
        known.append(set(numbers))
        finished.append({n for n, reason in zip(numbers, failed, strict=True) if not reason})
        lost = len(numbers) - len(finished[-1])
        if trace.partial:
            warnings.append(f"{trace.path.name} is partial: its run has not finished")
        if lost:
            warnings.append(f"{lost} of {len(numbers)} samples failed in {trace.path.name}; they are left out")
    common = set.intersection(*finished)
    every = set.union(*known)
    if not common:
        held = "; ".join(f"{t.path.name} has {_some(f)}" for t, f in zip(traces, finished, strict=True))
        raise ProbeError(f"no sample finished in all traces ({held}); compare runs of the same samples")
    missing = [len(every - k) for k in known]
    if any(missing):
        told = ", ".join(f"{m} in {t.path.name}" for t, m in zip(traces, missing, strict=True) if m)
        warnings.append(f"samples are missing ({told}); only the {len(common)} that all traces have are compared")
    return sorted(common), len(every - common), warnings


def _some(numbers: set[int]) -> str:
    if not numbers:
        return "no finished sample"
    first = sorted(numbers)[:4]
    return f"sample {', '.join(map(str, first))}{', ...' if len(numbers) > len(first) else ''}"


def _rows(trace: Trace, numbers: Sequence[int]) -> list[int]:
    place = {n: i for i, n in enumerate(trace.samples.tolist())}
    return [place[n] for n in numbers]


_OF_DATA = {"sample_id": "is", "question": "asks", "reference": "expects"}
_OF_RUN = {
    "backbone": "the backbones differ", "weights_revision": "the weights differ", "dtype": "the number types differ",
    "attention_kernel": "the attention kernels differ", "seed": "the seeds differ",
    "device": "the devices differ, so seconds say nothing about the recipes",
}  # fmt: skip


def _same_data(traces: Sequence[Trace], rows: Sequence[Sequence[int]]) -> list[str]:
    """Warnings about runs that differ in more than the recipe; an error if they are of different data."""
    first, warnings = traces[0], []
    for trace, own in zip(traces[1:], rows[1:], strict=True):
        for name, verb in _OF_DATA.items():
            ours, theirs = first.array(name)[list(rows[0])], trace.array(name)[list(own)]
            for row, a, b in zip(own, ours.tolist(), theirs.tolist(), strict=True):
                if a != b:
                    raise ProbeError(
                        f"these traces are of different data: sample {trace.samples[row]} {verb} `{_short(a)}` in "
                        f"{first.path.name} and `{_short(b)}` in {trace.path.name}; run both recipes on the same data"
                    )
        if (first.array("metric")[list(rows[0])] != trace.array("metric")[list(own)]).any():
            warnings.append(f"{trace.path.name} is scored by other metrics than {first.path.name}")
        for name, what in _OF_RUN.items():
            a, b = getattr(first.header, name), getattr(trace.header, name)
            if a != b:
                warnings.append(
                    f"{what}: {_short(str(a)) or 'unknown'} in {first.path.name}, {_short(str(b)) or 'unknown'} in "
                    f"{trace.path.name}"
                )
    return warnings


def _short(text: str) -> str:
    return text if len(text) <= 48 else text[:45] + "..."


# -------------------------------------------------------------------- what is read


@dataclass(frozen=True, eq=False)
class _Held:
    """What is needed of one trace, for the samples compared, in order. Arrays are (n,), NaN where unknown."""

    label: str
    trace: Trace
    rows: list[int]
    predictions: list[str]
    score: np.ndarray
    flops: np.ndarray
    seconds: np.ndarray
    retention: np.ndarray
    retention_end: np.ndarray
    first: list[int | None]  # the nominal step of the intervention
    sightless: list[bool]  # no layer has a visual token from the intervention on
    recipe: Mapping[str, Any]

    @classmethod
    def read(cls, label: str, trace: Trace, rows: list[int]) -> _Held:
        score, flops, seconds = (_scalar(trace, name, rows) for name in ("score", "flops_total", "seconds_unrecorded"))
        retention, end, first, sightless = [], [], [], []
        for row in rows:
            kept, counts = (_array(trace, name, row) for name in ("visual_kept", "visual_tokens"))
            n_visual = unpruned_tokens(trace, row)
            alive = _share_alive(kept, counts, n_visual)
            retention.append(float(alive.mean()) if alive.size else NAN)
            end.append(float(alive[-1].mean()) if alive.size else NAN)
            place = first_intervened(kept, counts, n_visual)
            first.append(None if place is None else int(_nominal(trace, row)[place]))
            sightless.append(place is not None and bool(alive.size) and not alive[place:].any())
        return cls(
            label, trace, rows, [str(p) for p in trace.array("prediction")[rows]], score, flops, seconds,
            np.array(retention), np.array(end), first, sightless, recipe_of(trace),
        )  # fmt: skip

    def side(self, i: int) -> Side | None:
        """The steps of the i-th sample, or None if the trace does not hold them."""
        row = self.rows[i]
        token, commit = (_array(self.trace, name, row) for name in ("token", "commit_step"))
        if token is None or commit is None or not token.size:
            return None
        confidence, kl = (_array(self.trace, name, row) for name in ("confidence", "logit_kl"))
        return Side(token, commit, _nominal(self.trace, row), confidence, kl)

    def course(self, alike: bool) -> Course:
        """How its samples ended; nothing of them if its tokens are not those of the reference (not `alike`)."""
        finals: list[Final | None] = []
        for i, row in enumerate(self.rows):
            side = self.side(i) if alike else None
            places = _array(self.trace, "slot_place", row)
            finals.append(None if side is None else final_of(side, None if places is None else places[-1]))
        return Course(self.label, finals, self.first, self.sightless)

    @property
    def start(self) -> float | None:
        """The dial `start` as a share of the steps, if it is one or can be made one."""
        return _start(self.recipe)


def _array(trace: Trace, name: str, row: int) -> np.ndarray | None:
    """A variable of one sample, or None if the trace or the sample does not hold it."""
    if name not in trace.variables or trace.checksums(row).get(name, 0) < 0:
        return None
    return trace.row(name, row)


def _scalar(trace: Trace, name: str, rows: list[int]) -> np.ndarray:
    if name not in trace.variables:
        return np.full(len(rows), NAN)
    return trace.array(name)[rows].astype(np.float64)


def _nominal(trace: Trace, row: int) -> np.ndarray:
    """The nominal step of each step; their order, where the trace does not say."""
    nominal = _array(trace, "nominal_step", row)
    return np.arange(trace.extents(row).get("step", 0)) if nominal is None else nominal


def _share_alive(kept: np.ndarray | None, counts: np.ndarray | None, n_visual: int) -> np.ndarray:
    """`(step, layer)` share of the visual tokens; empty if the sample has none or the trace does not say."""
    if counts is not None and counts.size and n_visual:
        return counts / n_visual
    if kept is not None and kept.size:
        return np.asarray((kept == 1).mean(-1))
    return np.zeros((0, 0))


def recipe_of(trace: Trace) -> Mapping[str, Any]:
    """The recipe in the header as plain data; empty if it cannot be read."""
    try:
        data = read_yaml(trace.header.recipe_yaml, trace.path.name).data
    except ProbeError:
        return {}
    return data if isinstance(data, dict) else {}


def dials_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The dials of a recipe as plain data."""
    dials = recipe.get("dial")
    return dict(dials) if isinstance(dials, dict) else {}


def _start(recipe: Mapping[str, Any]) -> float | None:
    value = dials_of(recipe).get("start")
    try:
        share = as_share(value)
    except Wrong:
        return None
    if share is None and isinstance(value, int) and not isinstance(value, bool):
        steps = recipe["generate"].get("steps") if isinstance(recipe.get("generate"), dict) else None
        share = 0.0 if value == 0 else min(1.0, value / steps) if isinstance(steps, int) and steps > 0 else None
    return share


# -------------------------------------------------------------------- what is computed


def _compare(held: Sequence[_Held], numbers: list[int], left_out: int, warnings: list[str]) -> Comparison:
    base = held[0]
    sides = [base.side(i) for i in range(len(numbers))]
    runs, samples = [_run(base, base, None)], []
    apart: list[list[StepsApart | None]] = [[]]
    for other in held[1:]:
        same_words = other.trace.header.backbone == base.trace.header.backbone
        steps = [_apart(other, sides[i], i) if same_words else None for i in range(len(numbers))]
        apart.append(steps)
        runs.append(_run(base, other, _divergence(other, steps)))
        samples += _samples(base, other, numbers, steps)
    committed = _committed(held)
    warnings = [*warnings, *_budget(runs), *_strayed(committed, base.label)]
    return Comparison(
        len(numbers), left_out, runs[0], tuple(runs[1:]), _late(held, apart), committed, tuple(samples), tuple(warnings)
    )


def _committed(held: Sequence[_Held]) -> tuple[Committed, ...]:
    base = held[0]
    others = [h.course(h.trace.header.backbone == base.trace.header.backbone) for h in held[1:]]
    early = {held[late].label: held[zero].label for late, zero in _zeros(held).items() if late != zero}
    return decompose(base.course(True), others, end_tokens(base.trace), early)


def end_tokens(trace: Trace) -> list[int]:
    """The ids that end an answer, as the trace says; empty if it does not."""
    return [int(word) for word in str(trace.header.extra.get("end_tokens", "")).split()]


def _strayed(committed: Sequence[Committed], reference: str) -> list[str]:
    return [
        f"{c.strayed:.1%} of the slots that {c.label} committed before its cut differ from {reference}'s: the two runs "
        "parted before it (another seed or device?), so its shares are no clean decomposition"
        for c in committed
        if c.strayed
    ]


def _apart(other: _Held, reference: Side | None, i: int) -> StepsApart | None:
    side = other.side(i)
    if side is None or reference is None:
        return None
    first = other.first[i]
    return steps_apart(reference, side, int(side.nominal_step[0]) if first is None else first)


def _run(base: _Held, own: _Held, divergence: Divergence | None) -> Run:
    other = own is not base
    agreed = [agreement(a, b) for a, b in zip(base.predictions, own.predictions, strict=True)] if other else []
    seconds = np.stack([own.seconds, base.seconds])
    timed = ~np.isnan(seconds).any(0)
    flops = np.stack([own.flops, base.flops])
    counted = ~np.isnan(flops).any(0)
    return Run(
        label=own.label,
        path=str(own.trace.path),
        recipe=own.trace.header.recipe_name,
        dials=dials_of(own.recipe),
        backbone=own.trace.header.backbone,
        score=intervals.mean(own.score, within=(0, 1)),
        score_difference=intervals.mean(own.score - base.score, within=(-1, 1)) if other else Estimate(),
        agreement=intervals.mean(agreed, within=(0, 1)),
        flops=_mean(own.flops),
        flops_ratio=_ratio(flops[:, counted]) if other else NAN,
        seconds=_mean(own.seconds),
        seconds_ratio=_ratio(seconds[:, timed]) if other else NAN,
        retention=_mean(own.retention),
        retention_end=_mean(own.retention_end),
        start=own.start,
        divergence=divergence,
    )


def _ratio(values: np.ndarray) -> float:
    """`sum(values[0]) / sum(values[1])`."""
    return float(values[0].sum() / values[1].sum()) if values.shape[1] and values[1].sum() > 0 else NAN


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else NAN


def _divergence(other: _Held, steps: Sequence[StepsApart | None]) -> Divergence | None:
    """Over the samples that were intervened in; over all if none was (the runs may differ for other reasons)."""
    untouched = all(f is None for f in other.first)
    chosen = [s for s, f in zip(steps, other.first, strict=True) if s is not None and (untouched or f is not None)]
    if not chosen:
        return None
    first, last = (np.array([getattr(s, n) for s in chosen]) for n in ("kl_first", "kl_last"))
    return Divergence(
        n=0 if untouched else len(chosen),
        loss=intervals.mean(first, within=(0, math.inf)),
        left=intervals.mean(last, within=(0, math.inf)),
        restored=intervals.one_minus_ratio(last, first),
        changed=intervals.mean([s.changed / s.both if s.both else NAN for s in chosen], within=(0, 1)),
        stake=intervals.mean([_share(s.differs, s.compared & s.stake) for s in chosen], within=(0, 1)),
        ever=sum(s.ever for s in chosen),
        back=sum(s.back for s in chosen),
        by_step=_by_step(chosen),
    )


def _share(differs: np.ndarray, among: np.ndarray) -> float:
    return float((differs & among).sum() / among.sum()) if among.any() else NAN


def _by_step(chosen: Sequence[StepsApart]) -> tuple[StepDivergence, ...]:
    out = []
    for step in sorted({k for s in chosen for k in s.at}):
        values = np.array([s.at[step] for s in chosen if step in s.at], np.float64)
        tokens, confidence, kl = (_mean(values[:, c]) for c in range(3))
        out.append(StepDivergence(step, len(values), tokens, confidence, kl))
    return tuple(out)


def _samples(
    base: _Held, other: _Held, numbers: Sequence[int], steps: Sequence[StepsApart | None]
) -> list[SampleDifference]:
    ids, tasks = (base.trace.array(name)[base.rows] for name in ("sample_id", "task"))
    return [
        SampleDifference(
            sample=number,
            sample_id=str(ids[i]),
            task=str(tasks[i]),
            run=other.label,
            score=float(other.score[i]),
            score_reference=float(base.score[i]),
            agreement=agreement(base.predictions[i], other.predictions[i]),
            slots=s.both if s else 0,
            changed=s.changed if s else 0,
            first_step=-1 if other.first[i] is None else int(other.first[i] or 0),
            kl_first=s.kl_first if s else NAN,
            kl_last=s.kl_last if s else NAN,
        )
        for i, (number, s) in enumerate(zip(numbers, steps, strict=True))
    ]


def _budget(runs: Sequence[Run]) -> list[str]:
    warnings = []
    if runs[0].retention < 1:
        warnings.append(
            f"the reference {runs[0].label} keeps {runs[0].retention:.1%} of the visual tokens: it is no unpruned run"
        )
    known = [r for r in runs[1:] if not math.isnan(r.retention)]
    if len(known) > 1:
        low, high = (f(known, key=lambda r: r.retention) for f in (min, max))
        if high.retention - low.retention > EQUAL_BUDGET + 1e-9:
            warnings.append(
                f"unequal budgets: over all steps and layers {low.label} keeps {low.retention:.1%} of the visual "
                f"tokens and {high.label} {high.retention:.1%}; which prunes better cannot be read from them"
            )
    return warnings


def _late(held: Sequence[_Held], apart: Sequence[Sequence[StepsApart | None]]) -> tuple[LateStart, ...]:
    """The late starts among the runs whose pruner also runs from the first step on."""
    base = held[0]
    zeros = _zeros(held)
    out = []
    for k, own in enumerate(held):
        share, zero = own.start, zeros.get(k)
        if not k or not share or zero is None or share >= 1:
            continue
        scores = np.stack([own.score, held[zero].score, base.score])
        score, score_zero, score_base = scores[:, ~np.isnan(scores).any(0)]
        stake: list[float] = []
        stake_zero: list[float] = []
        for late, early, first in zip(apart[k], apart[zero], own.first, strict=True):
            if late is None or early is None or first is None:
                continue
            n = min(len(late.stake), len(early.differs))
            slots = late.stake[:n] & late.compared[:n] & early.compared[:n]
            stake.append(_share(late.differs[:n], slots))
            stake_zero.append(_share(early.differs[:n], slots))
        out.append(
            LateStart(
                label=own.label,
                zero=held[zero].label,
                start=share,
                score=_mean(score),
                line=share + (1 - share) * _mean(score_zero),
                line_reference=share * _mean(score_base) + (1 - share) * _mean(score_zero),
                surplus=intervals.mean(score - share * score_base - (1 - share) * score_zero),
                stake=intervals.mean(stake, within=(0, 1)),
                stake_zero=intervals.mean(stake_zero, within=(0, 1)),
            )
        )
    return tuple(sorted(out, key=lambda s: (s.zero, s.start)))


def _zeros(held: Sequence[_Held]) -> dict[int, int]:
    """Of every run the place of the first one with the same pruner from the first step on, where there is one."""
    first = {_pruner(h): k for k, h in reversed(list(enumerate(held))) if k and h.start == 0}
    return {k: first[_pruner(h)] for k, h in enumerate(held) if k and _pruner(h) in first}


def _pruner(held: _Held) -> str:
    """What two runs share that differ in their start only: all of the recipe but its start, data and bookkeeping."""
    aside = {"data", "trace", "run", "about", "backbone"}
    recipe = {k: v for k, v in held.recipe.items() if k not in aside}
    recipe["dial"] = {k: v for k, v in dials_of(held.recipe).items() if k != "start"}
    return json.dumps([held.trace.header.backbone, recipe], sort_keys=True, default=str)
