"""A batch of eight against eight samples one by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from probe.bench.equality import TOLERANCE, same_answer
from probe.bench.line import Line, Target
from probe.bench.shapes import NOTHING, Bench
from probe.bench.turns import take_turns
from probe.generate import Generated, generate

ON_CPU = Target("at least", 1.0)
ELSEWHERE = Target("reported")
SAMPLES = 8


def run(bench: Bench) -> list[Line]:
    """Time of eight batches of one over time of one batch of eight."""
    if bench.quick and bench.published is None:
        bench = replace(bench, shape=bench.sized(layers=min(bench.shape.layers, 4)), memo={})
    model = bench.model
    prompts, rule = [bench.prompt(sample=i) for i in range(SAMPLES)], bench.rule()

    def together() -> list[Generated]:
        return generate(model, prompts, rule, NOTHING)

    def alone() -> list[Generated]:
        return [generate(model, [p], rule, NOTHING, samples=[i])[0] for i, p in enumerate(prompts)]

    def check(results: Mapping[str, Any]) -> str:
        pairs = zip(results["together"], results["alone"], strict=True)
        tolerance = TOLERANCE[bench.dtype]
        told = [same_answer("batch", "the batch", a.arrays, "one by one", b.arrays, tolerance) for a, b in pairs]
        return f"{told[0]}, {len(told)} samples"

    turns = take_turns({"alone": alone, "together": together}, bench.repeats, check)
    return [
        Line(
            row="batch",
            what=f"{SAMPLES} samples one by one / in one batch",
            target=ON_CPU if bench.device == "cpu" else ELSEWHERE,
            value=turns.ratio("alone", "together"),
            cpu=turns.ratio("alone", "together", cpu=True),
            equal=turns.equal,
            shape=bench.told(),
            numbers={"seconds": turns.seconds("together").median, "seconds_alone": turns.seconds("alone").median},
        )
    ]
