"""What the engine's loop costs over one written by hand, and what the published way of decoding costs over ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from probe.bench import plain
from probe.bench.equality import TOLERANCE, same_answer
from probe.bench.line import Line, Target
from probe.bench.shapes import Bench
from probe.bench.turns import take_turns
from probe.heap import by_default

TARGET = Target("at most", 1.01)
MINIATURE = Target("reported")
PUBLISHED = Target("at least", 1.3)
RATIO = 126_464 / 4_096
"""LLaDA-V's vocabulary over its width."""


def run(bench: Bench) -> list[Line]:
    """The loop without a probe, against a minimal one; the same on the embedded miniature, where Python shows most."""
    out = [_loop(bench, "loop", "loop without a probe / a minimal hand-written loop", TARGET)]
    if bench.published is None and bench.shape.width >= 512:
        small = Bench(
            shape=bench.sized(visual=192, question=20, answer=32, steps=16),
            device=bench.device,
            dtype=bench.dtype,
            repeats=2 * bench.repeats,
            published="miniature",
        )
        out.append(_loop(small, "loop", "the same on the embedded miniature (6 layers of 192)", MINIATURE))
    return out


def _loop(bench: Bench, row: str, what: str, target: Target) -> Line:
    model, shape, prompt = bench.model, bench.shape, bench.prompt()

    def check(results: Mapping[str, Any]) -> str:
        ours, theirs = results["engine"].arrays, results["by hand"]
        return same_answer(row, "the engine", ours, "the loop", theirs, TOLERANCE[bench.dtype])

    turns = take_turns(
        {
            "engine": bench.answer,
            "by hand": lambda: plain.minimal(model, prompt, shape.answer, shape.steps),
        },
        bench.repeats,
        check,
    )
    ours, theirs = turns.seconds("engine").median, turns.seconds("by hand").median
    return Line(
        row=row,
        what=what,
        target=target,
        value=turns.ratio("engine", "by hand"),
        cpu=turns.ratio("engine", "by hand", cpu=True),
        equal=turns.equal,
        shape=bench.told(),
        note=f"{1e3 * (ours - theirs) / shape.steps:+.2f} ms per step of {1e3 * theirs / shape.steps:.1f}",
        numbers={"seconds": ours, "seconds_by_hand": theirs},
    )


def run_published(bench: Bench) -> list[Line]:
    """Every row through the head and a float64 softmax of all of them, against ours."""
    if bench.published is None:
        shape = bench.sized(vocabulary=round(bench.shape.width * RATIO))
        bench = Bench(shape=shape, device=bench.device, dtype=bench.dtype, repeats=bench.repeats, seed=bench.seed)
    model, shape, prompt = bench.model, bench.shape, bench.prompt()

    def check(results: Mapping[str, Any]) -> str:
        ours, theirs = results["ours"].arrays, results["theirs"]
        return same_answer("published", "the engine", ours, "theirs", theirs, TOLERANCE[bench.dtype])

    def theirs() -> plain.Looked:
        return plain.published(model, prompt, shape.answer, shape.steps)

    def as_it_is() -> plain.Looked:
        with by_default():
            return theirs()

    turns = take_turns({"ours": bench.answer, "theirs": as_it_is, "our heap": theirs}, bench.repeats, check)
    return [
        Line(
            row="published",
            what="published loop (every row through the head, float64 softmax) / ours" + more,
            target=bound,
            value=turns.ratio(side, "ours"),
            cpu=turns.ratio(side, "ours", cpu=True),
            equal=turns.equal,
            shape=bench.told(),
            numbers={"seconds": turns.seconds("ours").median, "seconds_published": turns.seconds(side).median},
        )
        for side, more, bound in (
            ("theirs", "", PUBLISHED),
            ("our heap", ", if it also kept freed memory", Target("reported")),
        )
    ]
