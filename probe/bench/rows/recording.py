"""What recording at every step and layer costs: against none, and against an eager run that forms the square maps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from probe.bench import plain
from probe.bench.equality import TOLERANCE, same_answer, same_tokens, same_values
from probe.bench.line import Line, Target
from probe.bench.shapes import Bench, table_of
from probe.bench.turns import take_turns
from probe.heap import by_default

RECIPE = """
schema: 1
name: everything
probes:
  - at: {site: layer.attention, layers: all, steps: all}
    record: [attention_mass, visual_importance]
  - at: {site: logits, steps: all}
    record: [confidence, entropy]
"""
RECORDING = Target("at most", 1.08)
EAGER = Target("at least", 1.4)
EAGER_LONG = Target("at least", 2.0)
LONG = 4096


def run(bench: Bench) -> list[Line]:
    """Recording everything against nothing; tokens must be the same, bit for bit what decided them."""
    table = table_of(bench.model, RECIPE, [])

    def check(results: Mapping[str, Any]) -> str:
        on, off = (results[side].arrays for side in ("recording", "none"))
        return same_answer("recording", "recording", on, "no recording", off, 0.0)

    turns = take_turns({"recording": lambda: bench.answer(table), "none": bench.answer}, bench.repeats, check)
    return [
        Line(
            row="recording",
            what="recording mass, importance, confidence, entropy at every step and layer / none",
            target=RECORDING,
            value=turns.ratio("recording", "none"),
            cpu=turns.ratio("recording", "none", cpu=True),
            equal=turns.equal,
            shape=bench.told(),
            numbers={"seconds": turns.seconds("recording").median, "seconds_none": turns.seconds("none").median},
        )
    ]


def run_eager(bench: Bench) -> list[Line]:
    """An eager run with `output_attentions=True` and the same reductions, against our recording."""
    out = _eager(bench, EAGER)
    if bench.published is None and bench.shape.width >= 512:
        changed = bench.sized(visual=LONG, steps=1, layers=min(bench.shape.layers, 2 if bench.quick else 4))
        out += _eager(replace_shape(bench, changed), EAGER_LONG)
    return out


def replace_shape(bench: Bench, shape: Any) -> Bench:
    """The same conditions with another shape."""
    return replace(bench, shape=shape, memo={})


def _eager(bench: Bench, target: Target) -> list[Line]:
    model, shape, prompt = bench.model, bench.shape, bench.prompt()
    table, tolerance = table_of(model, RECIPE, []), TOLERANCE[bench.dtype]

    def stacked(values: list[list[torch.Tensor]]) -> np.ndarray:
        return torch.stack([torch.stack(v) for v in values]).float().cpu().numpy()

    def check(results: Mapping[str, Any]) -> str:
        ours, theirs = results["ours"].arrays, results["eager"]
        told = [same_tokens("eager", "the engine", ours["token"], "the eager loop", theirs.tokens)]
        pairs = {
            "attention_mass": (ours["attention_mass"][:, :, 0], stacked(theirs.mass)),
            "visual_importance": (ours["visual_importance"], stacked(theirs.importance)),
            "confidence": (ours["confidence"], torch.stack(theirs.confidence).cpu().numpy()),
            "entropy": (ours["entropy"], torch.stack(theirs.entropy).cpu().numpy()),
        }
        told += [same_values("eager", name, a, b, tolerance) for name, (a, b) in pairs.items()]
        return ", ".join(told)

    def eager() -> plain.Looked:
        return plain.eager(model, prompt, shape.answer, shape.steps)

    def as_it_is() -> plain.Looked:
        with by_default():
            return eager()

    sides = {"ours": lambda: bench.answer(table), "eager": as_it_is, "eager, our heap": eager}
    turns = take_turns(sides, bench.repeats, check)
    what = f"eager with output_attentions and the same reductions / ours, {shape.visual:,} visual tokens"
    return [
        Line(
            row="eager",
            what=what + more,
            target=bound,
            value=turns.ratio(side, "ours"),
            cpu=turns.ratio(side, "ours", cpu=True),
            equal=turns.equal,
            shape=bench.told(),
            numbers={"seconds": turns.seconds("ours").median, "seconds_eager": turns.seconds(side).median},
        )
        for side, more, bound in (
            ("eager", "", target),
            ("eager, our heap", ", if it also kept freed memory", Target("reported")),
        )
    ]
