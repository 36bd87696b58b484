"""What a finished trace contributes to a table: who ran, how much was kept from when on, and every answer's score."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from probe.compare_steps import first_intervened
from probe.errors import ProbeError
from probe.recipe import Recipe, parse_recipe
from probe.recipe_at import Steps, as_share
from probe.recipe_words import Wrong
from probe.study.printed import backbone_of, generation_of
from probe.trace import Trace, open_trace
from probe.trace_summary import unpruned_tokens

RATIOS = (0.5, 0.25, 0.1, 0.0)
SNAP = 0.02
"""A measured retention this near to one of the study's ratios stands in its row."""


@dataclass(frozen=True)
class Answer:
    """One answer of a run. `score` is from 0 to 1, NaN where there was nothing to compare with."""

    task: str
    sample: int
    sample_id: str
    metric: str
    score: float
    prediction: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Finished:
    """One trace. Shares are from 0 to 1.

    `unpruned`: nothing intervened. `keep`: nominal retention, what the recipe's dial says, 0 where it selects `none`,
    else the smallest share of the visual tokens in any layer and step. `start`: share of the steps before the
    intervention. `kept`: mean share of the visual tokens over layers and steps, which is what the run cost. `totals`:
    numbers of a harness by task. `slots`: of the longest answer.
    """

    path: Path
    recipe: str
    backbone: str
    revision: str
    dtype: str
    settings: str
    dials: Mapping[str, Any]
    seed: int
    unpruned: bool
    keep: float
    start: float
    kept: float
    flops: float
    answers: tuple[Answer, ...]
    failed: int
    totals: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    slots: int = 0


def in_folder(folder: str | Path) -> list[Path]:
    """The finished traces in a folder and the folders inside it, sorted."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ProbeError(f"there is no folder {folder}; name one with traces, such as runs")
    return sorted(folder.rglob("*.trace.h5"))


def read(paths: Iterable[str | Path]) -> list[Finished]:
    """Each trace's contribution. One that is no run of a recipe raises `ProbeError`."""
    found = []
    for path in paths:
        with open_trace(path) as trace:
            found.append(finished(trace))
    return found


def finished(trace: Trace) -> Finished:
    """What one trace contributes."""
    recipe = parse_recipe(trace.header.recipe_yaml, source=str(trace.path))
    failed = trace.array("failed") != ""
    rows = np.flatnonzero(~failed).tolist()
    edits = [probe for probe in recipe.probes if probe.do is not None]
    whole, least, first = _retention(trace, rows)
    keep = stated_keep(recipe.dial)
    if keep is None and any(probe.select is not None and probe.select.name == "none" for probe in edits):
        keep = 0.0
    if keep is None:
        keep = next((ratio for ratio in RATIOS if abs(ratio - least) <= SNAP), least)
    unpruned = not edits or keep == 1.0
    starts = [_start(p.at.steps, first, trace, rows) if not p.at.when else first for p in edits]
    flops = trace.array("flops_total")[rows] if "flops_total" in trace.variables and rows else np.array([np.nan])
    return Finished(
        path=trace.path,
        recipe=recipe.name.removesuffix("/baseline"),
        backbone=trace.header.backbone,
        revision=trace.header.weights_revision,
        dtype=trace.header.dtype,
        settings=settings_of(recipe),
        dials=dict(recipe.dial),
        seed=trace.header.seed,
        unpruned=unpruned,
        keep=1.0 if unpruned else keep,
        start=0.0 if unpruned else min(starts),
        kept=whole,
        flops=float(np.nanmean(flops)) if not np.isnan(flops).all() else float("nan"),
        answers=_answers(trace, rows, recipe),
        failed=int(failed.sum()),
        totals=_totals(trace.path),
        slots=max((trace.extents(row).get("position", 0) for row in rows), default=0),
    )


def stated_keep(dials: Mapping[str, Any]) -> float | None:
    """The share that the dial `keep` (or its `share`) names; None where it names none, or a number of tokens."""
    value = dials.get("keep")
    value = value.get("share") if isinstance(value, dict) else value
    try:
        return as_share(value)
    except Wrong:
        return None


def _retention(trace: Trace, rows: list[int]) -> tuple[float, float, float]:
    """Means over samples: share over layers and steps; and over those that lost a token, for an answer may end before a
    pruner comes: the smallest share; share of the steps before the first loss."""
    if "visual_tokens" not in trace.variables:
        return float("nan"), float("nan"), 0.0
    whole, least, first = [], [], []
    for row in rows:
        total, counts = unpruned_tokens(trace, row), trace.row("visual_tokens", row)
        if not total or not counts.size:
            continue
        whole.append(counts.mean() / total)
        place = first_intervened(None, counts, total)
        if place is not None:
            first.append(place / len(counts))
            least.append(counts.min() / total)
    share = float(np.mean(whole)) if whole else float("nan")
    return share, float(np.mean(least)) if least else min(share, 1.0), float(np.mean(first)) if first else 0.0


def _start(steps: Steps, measured: float, trace: Trace, rows: list[int]) -> float:
    """The share of the steps that a probe's `steps` leave alone; a step's number becomes a share of the steps run."""
    points = (steps.span.start,) if steps.exactly is None else steps.exactly
    out = []
    for point in points:
        if point in ("first", "prefill") or point == 0:
            out.append(0.0)
        elif isinstance(point, float):
            out.append(point)
        elif isinstance(point, int) and rows:
            longest = max(trace.extents(row).get("step", 0) for row in rows)
            out.append(min(1.0, point / longest) if longest else measured)
        else:
            out.append(measured)
    return min(out)


def _answers(trace: Trace, rows: list[int], recipe: Recipe) -> tuple[Answer, ...]:
    names = ("task", "sample_id", "metric", "prediction", "reference")
    texts = {name: trace.array(name).tolist() for name in names}
    samples, scores = trace.samples.tolist(), trace.array("score").tolist()
    own = Path(recipe.data.source).stem
    return tuple(
        Answer(
            task=own if texts["task"][i] == "own" else texts["task"][i],
            sample=samples[i],
            sample_id=texts["sample_id"][i],
            metric=texts["metric"][i],
            score=scores[i],
            prediction=texts["prediction"][i],
            references=tuple(json.loads(texts["reference"][i] or "[]")),
        )
        for i in rows
    )


def settings_of(recipe: Recipe) -> str:
    """How a recipe decodes, in one line, without its seed: only runs that decode alike share a table.

    What the study sets for the recipe's benchmark is not said: a table has benchmarks of short and of long answers.
    """
    said = {k: v for k, v in recipe.generate.model_dump(mode="json").items() if v is not None and k != "seed"}
    usual = generation_of(backbone_of(recipe.backbone), recipe.data.lmms_eval or "")
    if usual is not None:
        own = {"gen_length": usual.gen_length, "block_length": usual.block_length, "steps": usual.steps}
        own |= {"think": True} if usual.think else {}
        if all(said.get(key) == value for key, value in own.items()):
            said = {key: value for key, value in said.items() if key not in own}
    return ", ".join(f"{k} {v if isinstance(v, str | int | float) else json.dumps(v)}" for k, v in said.items())


def _totals(trace: Path) -> dict[str, dict[str, float]]:
    """What a harness wrote beside a trace: numbers by task and metric."""
    path = totals_file(trace)
    return json.loads(path.read_text(encoding="utf-8"))["results"] if path.is_file() else {}


def totals_file(trace: Path) -> Path:
    """Where a harness's numbers of a trace are written."""
    return trace.with_name(trace.name.removesuffix(".trace.h5") + ".lmms_eval.json")
