"""LaViDa's prefix cache with visual tokens cut against uncut: what fewer stored keys gain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from probe.bench import plain
from probe.bench.equality import TOLERANCE, same_answer
from probe.bench.line import Line, Target
from probe.bench.shapes import NOTHING, Bench, table_of
from probe.bench.turns import take_turns
from probe.compile import ProbeTable
from probe.decoding.caching import PrefixLM
from probe.generate import Generated

FASTER = Target("at least", 1.0)
PROPORTION = Target("at least", 0.9)
CUT = ["keep=0.25", "start=0.0"]


def run(bench: Bench) -> list[Line]:
    """Both sides store the prompt once; one of them a quarter of its visual tokens."""
    model = bench.model
    table = table_of(model, "prune/uniform", CUT)

    def answer(table: ProbeTable) -> Generated:
        return bench.answer(table, caching=PrefixLM())

    def check(results: Mapping[str, Any]) -> str:
        told = []
        with plain.kernel(model, "probe_eager"):
            for side, with_table in (("uncut", NOTHING), ("cut", table)):
                again, tolerance = answer(with_table).arrays, TOLERANCE[bench.dtype]
                told.append(same_answer("prefix", side, results[side].arrays, "the eager kernel", again, tolerance))
        return told[0] + " (eager kernel)"

    turns = take_turns({"uncut": lambda: answer(NOTHING), "cut": lambda: answer(table)}, bench.repeats, check)
    uncut, cut = (turns.results[side].arrays for side in ("uncut", "cut"))
    predicted = float(uncut["flops"].sum() / cut["flops"].sum())
    keys = uncut["visual_tokens"][-1, 0], cut["visual_tokens"][-1, 0]
    shared: dict[str, Any] = {
        "row": "prefix",
        "equal": turns.equal,
        "shape": f"{bench.told()}, prefix cache",
        "numbers": {
            "predicted": predicted,
            "seconds": turns.seconds("cut").median,
            "seconds_uncut": turns.seconds("uncut").median,
        },
    }
    return [
        Line(
            what="prefix cache, visual tokens uncut / cut to 25%",
            target=FASTER,
            value=turns.ratio("uncut", "cut"),
            cpu=turns.ratio("uncut", "cut", cpu=True),
            note=f"{keys[0]} and {keys[1]} visual keys",
            **shared,
        ),
        Line(
            what="the same over what executed FLOPs predict",
            target=PROPORTION,
            value=turns.ratio("uncut", "cut", scale=1 / predicted),
            cpu=turns.ratio("uncut", "cut", cpu=True, scale=1 / predicted),
            note=f"predicted {predicted:.2f}x",
            **shared,
        ),
    ]
