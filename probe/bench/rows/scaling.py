"""Time per step against the number of visual tokens, dropped to a quarter: as the FLOPs say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from probe.bench import plain
from probe.bench.equality import TOLERANCE, same_answer
from probe.bench.line import Line, Target
from probe.bench.shapes import Bench, table_of
from probe.bench.turns import take_turns
from probe.site import Fate

TARGET = Target("at least", 0.9)
SIZES = (256, 512, 1024, 2048, 4096)


def run(bench: Bench) -> list[Line]:
    """Speed-up of dropping to 25% before the first layer, over that of the FLOPs, at every number of visual tokens."""
    return [_at(bench, n) for n in SIZES if bench.shape.width >= 512 or n <= 8 * bench.shape.visual]


def _at(bench: Bench, visual: int) -> Line:
    layers = min(bench.shape.layers, 2 if visual > 1024 else 8) if bench.quick else bench.shape.layers
    here = replace(bench, shape=bench.sized(visual=visual, layers=layers, steps=min(bench.shape.steps, 2)), memo={})
    if bench.published is not None:
        here.__dict__["model"] = bench.model
    model, shape = here.model, here.shape
    table = table_of(model, "prune/uniform", ["keep=0.25", "start=0.0"])

    def check(results: Mapping[str, Any]) -> str:
        there = torch.from_numpy(results["dropped"].arrays["visual_kept"] == int(Fate.KEPT))
        theirs = plain.without(model, here.prompt(), shape.answer, shape.steps, there, compact=False)
        got, tolerance = results["dropped"].arrays, TOLERANCE[bench.dtype]
        told = same_answer("scaling", "dropping", got, "rows cut out by hand", theirs, tolerance)
        return f"{told} (rows cut out by hand)"

    turns = take_turns({"all": here.answer, "dropped": lambda: here.answer(table)}, here.repeats, check)
    flops = {side: float(turns.results[side].arrays["flops"].sum()) for side in ("all", "dropped")}
    predicted = flops["all"] / flops["dropped"]
    milliseconds = {side: 1e3 * turns.seconds(side).median / shape.steps for side in flops}
    rate = {side: flops[side] / shape.steps / milliseconds[side] / 1e6 for side in flops}
    return Line(
        row="scaling",
        what=f"{visual:,} visual tokens dropped to 25%: realised / predicted speed-up",
        target=TARGET,
        value=turns.ratio("all", "dropped", scale=1 / predicted),
        cpu=turns.ratio("all", "dropped", cpu=True, scale=1 / predicted),
        equal=turns.equal,
        shape=here.told(),
        note=(
            f"{milliseconds['all']:.1f} to {milliseconds['dropped']:.1f} ms per step, "
            f"{rate['all']:.0f} and {rate['dropped']:.0f} GFLOP/s"
        ),
        numbers={"predicted": predicted, "ms_per_step": milliseconds["all"], "ms_dropped": milliseconds["dropped"]},
    )
