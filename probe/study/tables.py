"""Tables in the study's layout: rows are a pruner at a retention, columns are tasks, Avg. is against the unpruned row.

Pure functions of what finished traces contribute (`probe.study.finished`). `by_retention` is the layout of the study's
first two tables, `by_start` that of its third. Every cell may carry the number that the study prints in its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from probe import intervals
from probe.data.totals import relative_average, total
from probe.intervals import NAN, Estimate
from probe.study import printed
from probe.study.finished import Answer, Finished

PRIMARY: Mapping[str, float] = {
    "mme_total": 1,
    "anls": 100,
    "exact_match": 100,
    "relaxed_overall": 100,
    "pope_f1_score": 100,
    "mmmu_acc": 100,
    "gpt_eval_score": 1,
    "videomme_perception_score": 1,
}
"""Of a harness's numbers of one task the one that the study prints, and the factor to the study's scale."""
NOTHING = Estimate()


@dataclass(frozen=True)
class Cell:
    """One number: ours with its 95 % interval over `n` samples (NaN: not run), and the study's (NaN: none)."""

    ours: Estimate = NOTHING
    study: float = NAN


@dataclass(frozen=True)
class Row:
    """A line: who, how much was kept (percent: nominal, and over layers and steps), cells by column, the average."""

    label: str
    recipe: str
    keep: float
    kept: float
    cells: tuple[Cell, ...]
    average: Cell


@dataclass(frozen=True)
class Section:
    """The rows of one retention."""

    title: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Table:
    """A whole table. `study` is the backbone of the study whose numbers stand beside ours, empty if none do."""

    title: str
    layout: str
    columns: tuple[str, ...]
    sections: tuple[Section, ...]
    study: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Counted:
    """Traces of one row: shards, seeds and tasks of the same settings."""

    label: str
    recipe: str
    keep: float
    start: float
    traces: tuple[Finished, ...]


def tables(found: Sequence[Finished], study: str | None = None) -> list[Table]:
    """A table for each backbone (its weights, their number type) and way of decoding.

    By retention of what acts from the first step on, and by start of what begins later, where there is any.
    `study` names the study's backbone to stand beside; by default the likelier one of the two; `""` for none.
    """
    out = []
    for title, likelier, own in kinds_of(found):
        beside = likelier if study is None else study
        first = [f for f in own if f.unpruned or not f.start]
        late = [f for f in own if not f.unpruned and f.start]
        bare = [f for f in own if f.unpruned]
        if len(first) > len(bare) or not late:
            out.append(_by_retention(title, first, beside))
        if late:
            out.append(_by_start(title, [*bare, *late], beside))
    return out


def kinds_of(found: Sequence[Finished]) -> list[tuple[str, str, list[Finished]]]:
    """Traces that may share a table: its title, the study's backbone that is likely beside it, and they."""
    out = []
    kinds = sorted({_kind(f) for f in found})
    for kind in kinds:
        backbone = kind[0]
        differs = [part for i, part in enumerate(kind) if i and len({k[i] for k in kinds if k[0] == backbone}) > 1]
        title = backbone + (f" ({', '.join(part or 'as it comes' for part in differs)})" if differs else "")
        out.append((title, printed.backbone_of(backbone), [f for f in found if _kind(f) == kind]))
    return out


def _kind(one: Finished) -> tuple[str, str, str, str]:
    """What runs of one table share: the backbone, its weights, their number type, and how it decodes."""
    return one.backbone, one.revision, one.dtype, one.settings


def printed_tables() -> list[Table]:
    """The study's own three tables, the third one split by backbone."""
    out = []
    for backbone in printed.TABLES:
        late = _by_start(backbone, [], backbone)
        clock = ", ".join(f"{name} {time}" for name, time in printed.times(backbone).items())
        note = f"the unpruned backbone's total time as printed: {clock}"
        out += [_by_retention(backbone, [], backbone), replace(late, notes=(note,))]
    return out


# -------------------------------------------------------------------- from traces to rows


def runs_of(found: Iterable[Finished]) -> list[Counted]:
    """Traces by row. The unpruned ones are one row; dials tell apart what would otherwise share one."""
    rows: dict[tuple[str, float, float, str], list[Finished]] = {}
    found = list(found)
    for f in found:
        told = "" if f.unpruned else _told(f, [g for g in found if g.recipe == f.recipe and not g.unpruned])
        recipe = "" if f.unpruned else f.recipe
        rows.setdefault((recipe, f.keep, f.start, told), []).append(f)
    names: dict[str, set[str]] = {}
    for recipe, _, _, _ in rows:
        names.setdefault(printed.method_of(recipe) if recipe else "none", set()).add(recipe)
    out = []
    for (recipe, keep, start, told), traces in rows.items():
        label = printed.method_of(recipe) if recipe else "none"
        extra = [recipe] if len(names[label]) > 1 and label != recipe else []
        extra += [told] if told else []
        out.append(Counted(label, f"{label} ({', '.join(extra)})" if extra else label, keep, start, tuple(traces)))
    order = {name: i for i, name in enumerate(printed.METHODS)}
    return sorted(out, key=lambda r: (-r.keep, order.get(r.label, len(order)), r.recipe, r.start))


_OF_ROWS = ("keep", "start", "when", "done")
"""Dials that a table's rows and columns already say."""


def _told(one: Finished, same: Sequence[Finished]) -> str:
    """The dials of a trace in which traces of the same recipe differ, beside retention and start."""
    differing = [
        name for name in one.dials if name not in _OF_ROWS and len({repr(other.dials.get(name)) for other in same}) > 1
    ]
    return ", ".join(f"{name} {one.dials[name]}" for name in differing)


def _answers(traces: Iterable[Finished], task: str) -> list[Answer]:
    """All answers to a task; where traces repeat a sample under one seed, the first one counts."""
    found: dict[tuple[int, int], Answer] = {}
    for trace in traces:
        for answer in trace.answers:
            if answer.task == task and not math.isnan(answer.score):
                found.setdefault((trace.seed, answer.sample), answer)
    return list(found.values())


def measured(traces: Sequence[Finished], task: str) -> Estimate:
    """A task's number over the traces of a row, in the study's scale; an interval where it is a mean."""
    answers = _answers(traces, task)
    whole = _harness_number(traces, task)
    if not answers:
        return whole
    value = whole.value
    if math.isnan(value):
        told = [(a.sample_id, a.prediction, a.references, a.score) for a in answers]
        value = total(answers[0].metric, told)
    mean = intervals.mean([a.score for a in answers], within=(0, 1))
    if math.isclose(value, 100 * mean.value, abs_tol=1e-9):
        return Estimate(value, 100 * mean.low, 100 * mean.high, mean.n)
    return Estimate(value, n=len(answers))


def _harness_number(traces: Sequence[Finished], task: str) -> Estimate:
    """What a harness made of all answers, which may be more than a mean: of each seed the largest run's, averaged.

    Nothing where no trace has it, or none has a number that the study prints.
    """
    largest: dict[int, Mapping[str, float]] = {}
    for trace in traces:
        numbers = trace.totals.get(task, {})
        if numbers and numbers.get("n", 0) >= largest.get(trace.seed, {}).get("n", 0):
            largest[trace.seed] = numbers
    name = next((name for name in PRIMARY if any(name in numbers for numbers in largest.values())), None)
    if name is None:
        return NOTHING
    known = [numbers for numbers in largest.values() if name in numbers]
    value = PRIMARY[name] * sum(numbers[name] for numbers in known) / len(known)
    return Estimate(value, n=int(sum(numbers.get("n", 0) for numbers in known)))


def _tasks(found: Iterable[Finished]) -> list[str]:
    """The tasks that have scores, in the study's order of benchmarks, then by name."""
    found = list(found)
    names = {a.task for f in found for a in f.answers if not math.isnan(a.score)}
    names |= {task for f in found for task, numbers in f.totals.items() if numbers.keys() & PRIMARY.keys()}
    order = {short: i for i, short in enumerate(printed.BENCHMARKS)}
    return sorted(names, key=lambda task: (order.get(printed.benchmark_of(task) or "", len(order)), task))


# -------------------------------------------------------------------- the two layouts


def _by_retention(title: str, found: Sequence[Finished], study: str) -> Table:
    """Rows by retention, as in the study's tables 1 and 2."""
    numbers = {(p.method, p.retention, p.benchmark): p.score for p in (printed.by_retention(study) if study else ())}
    tasks = _tasks(found)
    shorts = [name for name in dict.fromkeys(b for _, _, b in numbers) if name != printed.AVERAGE]
    columns = [(task, printed.benchmark_of(task) or task) for task in tasks] or [(name, name) for name in shorts]
    runs = runs_of(found) or _study_rows(numbers)
    unpruned = next((run for run in runs if run.label == "none"), None)
    notes = _notes(found, tasks, unpruned)

    def row(run: Counted) -> Row:
        percent = round(100 * run.keep)
        cells = tuple(
            Cell(measured(run.traces, task), numbers.get((run.label, percent, short), NAN)) for task, short in columns
        )
        average = Cell(
            Estimate(_average(run, unpruned, tasks)), numbers.get((run.label, percent, printed.AVERAGE), NAN)
        )
        return Row(run.recipe, _recipe(run), 100 * run.keep, 100 * _kept(run), cells, average)

    rows = [row(run) for run in runs]
    sections = _sections(rows)
    return Table(title, "retention", tuple(short for _, short in columns), sections, study if numbers else "", notes)


def _by_start(title: str, found: Sequence[Finished], study: str) -> Table:
    """Columns are a task and a start, as in the study's table 3; rows are a pruner at its retention."""
    numbers = {
        (p.method, p.retention, p.benchmark, p.start): p.score for p in (printed.by_start(study) if study else ())
    }
    tasks = _tasks(found)
    starts = sorted({round(100 * f.start) for f in found if not f.unpruned})
    columns = [(task, printed.benchmark_of(task) or task, start) for task in tasks for start in starts]
    if not found:
        cut = dict.fromkeys((b, s) for method, _, b, s in numbers if method != "none")
        columns = [(b, b, round(s)) for b, s in sorted(cut, key=lambda c: (list(printed.BENCHMARKS).index(c[0]), c[1]))]
    runs = runs_of(found) or _study_rows(numbers)
    unpruned = next((run for run in runs if run.label == "none"), None)
    rows: list[Row] = []
    for name in dict.fromkeys((run.recipe, run.keep, run.label) for run in runs):
        same = [run for run in runs if (run.recipe, run.keep, run.label) == name]
        cells = []
        for task, short, start in columns:
            at = [r for r in same if r.label == "none" or round(100 * r.start) == start]
            traces = [trace for run in at for trace in run.traces]
            place = 0 if name[2] == "none" else start
            cells.append(Cell(measured(traces, task), numbers.get((name[2], round(100 * name[1]), short, place), NAN)))
        kept = [_kept(run) for run in same if not math.isnan(_kept(run))]
        whole = 100 * sum(kept) / len(kept) if kept else NAN
        rows.append(Row(name[0], _recipe(same[0]), 100 * name[1], whole, tuple(cells), Cell()))
    heads = tuple(f"{short} {start}%" for _, short, start in columns)
    return Table(title, "start", heads, _sections(rows), study if numbers else "", _notes(found, tasks, unpruned))


def _study_rows(numbers: Iterable[tuple[object, ...]]) -> list[Counted]:
    """The study's own rows, in its order."""
    keys = dict.fromkeys((str(key[0]), float(str(key[1]))) for key in numbers)
    return [Counted(method, method, retention / 100, 0.0, ()) for method, retention in keys]


def _recipe(run: Counted) -> str:
    return run.traces[0].recipe if run.traces and run.label != "none" else ""


def _kept(run: Counted) -> float:
    """Mean share of the visual tokens over layers, steps and samples."""
    known = [(t.kept, len(t.answers)) for t in run.traces if not math.isnan(t.kept) and t.answers]
    return sum(k * n for k, n in known) / sum(n for _, n in known) if known else NAN


def _sections(rows: Sequence[Row]) -> tuple[Section, ...]:
    """Rows of one retention together, unpruned first."""
    by_title: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda r: -r.keep):
        bare = row.label == "none" or row.label.startswith("none (")
        by_title.setdefault("" if bare else f"Retention ratio = {row.keep:.0f}%", []).append(row)
    return tuple(Section(title, tuple(rows)) for title, rows in by_title.items())


def _average(run: Counted, unpruned: Counted | None, tasks: Sequence[str]) -> float:
    """The study's Avg. over the tasks that the unpruned row has; NaN if this row lacks one of them."""
    if unpruned is None or not unpruned.traces:
        return NAN
    score: Callable[[Counted, str], float] = lambda r, task: measured(r.traces, task).value  # noqa: E731
    base = {task: score(unpruned, task) for task in tasks}
    base = {task: value for task, value in base.items() if not math.isnan(value) and value}
    own = {task: score(run, task) for task in base}
    return relative_average(own, base) if base and not any(map(math.isnan, own.values())) else NAN


def _notes(found: Sequence[Finished], tasks: Sequence[str], unpruned: Counted | None) -> tuple[str, ...]:
    """What a reader must know before comparing: different samples, failures, averages that are not to be had."""
    notes = []
    for task in tasks:
        sizes = {len(_answers(run.traces, task)) for run in runs_of(found)} - {0}
        if len(sizes) > 1:
            notes.append(
                f"{task}: rows have between {min(sizes)} and {max(sizes)} samples, so they are of different ones"
            )
    if failed := sum(f.failed for f in found):
        notes.append(f"{failed} samples failed and are left out")
    if found and unpruned is None:
        notes.append("no unpruned run is among these traces, so there is no average")
    elif unpruned is not None and unpruned.traces:
        zero = [task for task in tasks if not measured(unpruned.traces, task).value]
        notes += [f"{task}: the unpruned run scores 0, so the average leaves it out" for task in zero]
    return tuple(notes)
