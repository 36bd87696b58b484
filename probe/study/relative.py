"""How much of the unpruned score is left: by retention from the first step on, and by the step where pruning begins.

What the study's figure 1 is about: short and long answers apart, for each pruner and backbone, the mean over tasks of
score / unpruned score (the study's Avg.). `series_of` takes finished traces, `printed_series` the study's tables.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from probe.intervals import NAN, Estimate
from probe.study import printed
from probe.study.finished import Finished
from probe.study.tables import Counted, kinds_of, measured, runs_of

Length = Literal["short", "long"]
SHORT = 8
"""Answers of at most so many slots are short: the study's have 2 or 4, its long ones 16 and more."""


@dataclass(frozen=True)
class Series:
    """One pruner on one backbone, with answers of one length. Values are percent of the unpruned score.

    `by_keep`: retention (0 to 1, 1 is unpruned) from the first step on; `by_start`: share of the steps before pruning
    (0 to 1), at the retention `keep`, which most of the late runs have. `study`: the study's backbone beside it.
    """

    backbone: str
    method: str
    length: Length
    study: str
    by_keep: Mapping[float, Estimate]
    by_start: Mapping[float, Estimate]
    keep: float = NAN
    tasks: tuple[str, ...] = ()
    samples: int = 0


@dataclass
class _Points:
    keeps: dict[float, Estimate] = field(default_factory=dict)
    late: dict[tuple[float, float], Estimate] = field(default_factory=dict)


def series_of(found: Sequence[Finished]) -> list[Series]:
    """Every pruner, backbone and length of answer that has an unpruned run and a pruned one."""
    out = []
    for title, beside, own in kinds_of(found):
        bare = next((run for run in runs_of(own) if run.label == "none"), None)
        if bare is None:
            continue
        # apart, so that a method that has one recipe to begin with and one for later steps is one method
        runs = [*runs_of([f for f in own if not f.start]), *runs_of([f for f in own if f.start])]
        for length, tasks in _tasks(own).items():
            base = {task: measured(bare.traces, task) for task in tasks}
            base = {task: score for task, score in base.items() if score.value > 0}
            by_method: dict[str, _Points] = {}
            for run in runs:
                left = None if run.label == "none" else _left(run, base)
                if left is None:
                    continue
                points = by_method.setdefault(run.recipe, _Points())
                if run.start:
                    points.late[run.keep, run.start] = left
                else:
                    points.keeps[run.keep] = left
            samples = sum(score.n for score in base.values())
            for method, points in by_method.items():
                out.append(_series((title, method, length, beside), points, tuple(base), samples))
    return out


def _tasks(found: Sequence[Finished]) -> dict[Length, list[str]]:
    """The scored tasks by the length of their answers."""
    slots: dict[str, int] = {}
    for one in found:
        for answer in one.answers:
            if not math.isnan(answer.score):
                slots[answer.task] = max(slots.get(answer.task, 0), one.slots)
    short = sorted(task for task, n in slots.items() if n <= SHORT)
    return {"short": short, "long": sorted(set(slots) - set(short))}


def _left(run: Counted, base: Mapping[str, Estimate]) -> Estimate | None:
    """The mean over tasks of score / unpruned score, in percent; None where one of the tasks was not run.

    Its interval takes the unpruned scores as given and the tasks as independent.
    """
    own = {task: measured(run.traces, task) for task in base}
    if not own or any(math.isnan(score.value) for score in own.values()):
        return None
    value = sum(100 * own[task].value / base[task].value for task in own) / len(own)
    halves = [50 * (own[task].high - own[task].low) / base[task].value for task in own]
    half = math.sqrt(sum(h * h for h in halves)) / len(halves)
    return Estimate(value, max(0.0, value - half), value + half, sum(score.n for score in own.values()))


def _series(who: tuple[str, str, Length, str], points: _Points, tasks: tuple[str, ...], samples: int) -> Series:
    title, method, length, beside = who
    counts = Counter(keep for keep, _ in points.late)
    keep = max(counts, key=lambda k: (counts[k], -k)) if counts else NAN
    by_start = {start: left for (k, start), left in sorted(points.late.items()) if k == keep}
    if by_start and keep in points.keeps:
        by_start = {0.0: points.keeps[keep], **by_start}
    whole = Estimate(100.0, n=samples)
    by_keep = dict(sorted((points.keeps | {1.0: whole}).items(), reverse=True)) if points.keeps else {}
    return Series(title, method, length, beside, by_keep, by_start, keep, tasks, samples)


def printed_series(method: str) -> list[Series]:
    """The same of the study's printed numbers, as far as it prints them; a benchmark is as long as its answers there.

    What begins late is of the benchmarks that are also among those pruned from the first step on, so that a start of 0
    stands beside it; where there are none (long answers), of all benchmarks that the study prunes late.
    """
    out = []
    for backbone in printed.TABLES:
        rows = (*printed.by_retention(backbone), *printed.by_start(backbone))
        for length in ("short", "long"):
            of_length = [p for p in rows if _length(backbone, p.benchmark) == length]
            base = {p.benchmark: p.score for p in of_length if p.method == "none"}
            own = [p for p in of_length if p.method == method]
            begun_late = {p.benchmark for p in own if p.start}
            common = begun_late & {p.benchmark for p in own if not p.start} or begun_late
            points = _Points()
            for keep in dict.fromkeys(p.retention for p in own if not p.start):
                points.keeps[keep / 100] = _ratio([p for p in own if (p.retention, p.start) == (keep, 0)], base)
            for keep, start in dict.fromkeys((p.retention, p.start) for p in own if p.benchmark in common):
                some = [p for p in own if (p.retention, p.start) == (keep, start) and p.benchmark in common]
                points.late[keep / 100, start / 100] = _ratio(some, base)
            if any(start for _, start in points.late):
                keep = next(keep for keep, start in points.late if start)
                late = {start: left for (k, start), left in sorted(points.late.items()) if k == keep}
            else:
                keep, late = NAN, {}
            by_keep = {1.0: Estimate(100.0), **points.keeps} if points.keeps else {}
            if by_keep or late:
                out.append(Series(backbone, method, length, backbone, by_keep, late, keep, tuple(base)))
    return out


def _length(backbone: str, benchmark: str) -> Length | None:
    settings = printed.generation_of(backbone, benchmark)
    return None if settings is None else "short" if settings.gen_length <= SHORT else "long"


def _ratio(rows: Sequence[printed.Printed], base: Mapping[str, float]) -> Estimate:
    shares = [100 * row.score / base[row.benchmark] for row in rows]
    return Estimate(sum(shares) / len(shares), n=len(shares))
