"""Late pruning over many runs: scores on either side of the line, and why its answers stayed what they were.

For every run of a folder that begins to prune late: the score of the unpruned run, of the same pruner from the first
step on and of the run itself, the line of `docs/compare.md` with what lies above it, and the shares of answer slots
that were committed before the cut, guessed without sight, kept, harmed and lost. Numbers are `probe.compare`'s, of all
traces that answer the same questions in the same way, paired by sample.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from probe.compare import Comparison, LateStart, Run, compare
from probe.compare_committed import Committed, Kind, Shares
from probe.errors import ProbeError
from probe.intervals import NAN, Estimate
from probe.recipe import Recipe, parse_recipe
from probe.study.finished import settings_of
from probe.trace import open_trace


@dataclass(frozen=True)
class Late:
    """One run that begins to prune behind its first step. `start` is a share of the steps (NaN: not known).

    `zero` is the score of the same pruner from the first step on (NaN: not among the runs); `line` is start *
    unpruned + (1 - start) * zero, and `surplus` the score above it, paired by sample. `blind`: whether a blind run
    with the same cut was among them, without which shares say less. `alike`, `alike_zero`: share of each kind of slots
    that end as in the unpruned run, here and in the run from the first step on: the score's counterpart in slots.
    """

    backbone: str
    data: str
    settings: str
    pruner: str
    recipe: str
    dials: Mapping[str, Any]
    start: float
    n: int
    unpruned: Estimate
    zero: float
    score: Estimate
    line: float
    surplus: Estimate
    blind: bool
    shares: Mapping[Kind, Shares]
    alike: Mapping[Kind, float]
    alike_zero: Mapping[Kind, float]


@dataclass(frozen=True)
class _Held:
    path: Path
    samples: int
    hash: str
    unpruned: bool
    kind: tuple[str, str, str, str, str, str]  # backbone, revision, dtype, data, settings, seed


def restoration(paths: Iterable[str | Path]) -> list[Late]:
    """The late runs among finished traces, by backbone, data, settings and pruner.

    Raises `ProbeError` if there is none, or none with an unpruned run beside it.
    """
    groups: dict[tuple[str, ...], list[_Held]] = {}
    for path in paths:
        held = _held(Path(path))
        groups.setdefault(held.kind, []).append(held)
    found: list[Late] = []
    models = {kind[:3] for kind in groups}
    for kind, several in groups.items():
        largest = _largest(several)
        base = next((held for held in largest if held.unpruned), None)
        others = [held.path for held in largest if not held.unpruned]
        if base is not None and others:
            found += _late(compare([base.path, *others]), _model(kind, models), kind[3:])
    if not found:
        raise ProbeError(
            "none of these traces begins to prune behind the first step with an unpruned run of the same questions "
            "beside it; `probe sweep study/restoration` makes such runs"
        )
    return _named(found)


def _held(path: Path) -> _Held:
    with open_trace(path) as trace:
        head = trace.header
        recipe = parse_recipe(head.recipe_yaml, source=str(path))
        kind = (
            head.backbone,
            head.weights_revision,
            head.dtype,
            recipe.data.source,
            settings_of(recipe),
            str(head.seed),
        )
        return _Held(path, trace.n_samples, _same(recipe), all(p.do is None for p in recipe.probes), kind)


def _same(recipe: Recipe) -> str:
    """What shards and repetitions of one run have in common."""
    return recipe.hash if any(p.do is not None for p in recipe.probes) else "unpruned"


def _largest(several: Sequence[_Held]) -> list[_Held]:
    """Of shards and repetitions the trace with the most samples, in the order of the paths."""
    best: dict[str, _Held] = {}
    for held in several:
        if held.hash not in best or held.samples > best[held.hash].samples:
            best[held.hash] = held
    return list(best.values())


def _model(kind: tuple[str, ...], models: set[tuple[str, ...]]) -> str:
    """The backbone, with its revision and number type where those of one backbone differ."""
    same = [model for model in models if model[0] == kind[0]]
    told = [kind[i] or "as it comes" for i in (1, 2) if len({model[i] for model in same}) > 1]
    return kind[0] + (f" ({', '.join(told)})" if told else "")


def _late(comparison: Comparison, backbone: str, how: tuple[str, ...]) -> list[Late]:
    lines = {late.label: late for late in comparison.late}
    runs = {run.label: run for run in comparison.runs}
    data, settings, seed = how
    said = ", ".join([*([settings] if settings else []), *([f"seed {seed}"] if seed != "0" else [])])
    return [
        _one((backbone, data, said), comparison, runs[one.label], one, lines.get(one.label))
        for one in comparison.committed
        if one.cuts[1] > 0
    ]


def _one(where: tuple[str, str, str], comparison: Comparison, run: Run, one: Committed, line: LateStart | None) -> Late:
    backbone, data, settings = where
    zero = NAN if line is None else next(r.score.value for r in comparison.runs if r.label == line.zero)
    early = next((c for c in comparison.committed if c.label == one.early), None)
    return Late(
        backbone=backbone,
        data=data,
        settings=settings,
        pruner=run.recipe,
        recipe=run.recipe,
        dials=run.dials,
        start=NAN if run.start is None else run.start,
        n=comparison.n,
        unpruned=comparison.reference.score,
        zero=zero,
        score=run.score,
        line=NAN if line is None else line.line_reference,
        surplus=Estimate() if line is None else line.surplus,
        blind=bool(one.blind),
        shares=one.shares,
        alike=_alike(one),
        alike_zero=dict.fromkeys(one.shares, NAN) if early is None else _alike(early),
    )


def _alike(one: Committed) -> dict[Kind, float]:
    return {kind: shares.committed.value + shares.agrees.value for kind, shares in one.shares.items()}


def _named(found: Sequence[Late]) -> list[Late]:
    """Pruners with `keep`, and with the dials in which runs of one recipe differ."""
    out = []
    for one in found:
        same = [other.dials for other in found if other.recipe == one.recipe]
        told = [
            f"{name} {value}"
            for name, value in one.dials.items()
            if name != "start" and (name == "keep" or any(dials.get(name) != value for dials in same))
        ]
        out.append(replace(one, pruner=" ".join([one.recipe.rpartition("/")[2], ", ".join(told)]).strip()))
    return sorted(out, key=lambda o: (o.backbone, o.data, _numbers(o.settings), o.pruner, o.start))


def _numbers(text: str) -> list[tuple[bool, float, str]]:
    """A text to sort by, in which 8 stands before 12."""
    parts = re.split(r"(\d+)", text)
    return [(i % 2 == 1, float(part) if i % 2 else 0.0, part) for i, part in enumerate(parts)]
