"""A published shape at full size: milliseconds per step, speed-ups, and the share of the device's matrix peak.

Meant for a GPU, where `--backbone NAME --random-weights` makes the weights on the device; it runs anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.benchmark import timer

from probe.bench import plain
from probe.bench.equality import TOLERANCE, same_answer
from probe.bench.line import Line, Target
from probe.bench.rows.recording import RECIPE, RECORDING
from probe.bench.shapes import NOTHING, Bench, table_of
from probe.bench.turns import Turns, spread, take_turns
from probe.compile import ProbeTable
from probe.decoding.caching import NoCache, PrefixLM
from probe.decoding.policy import Caching
from probe.errors import ProbeError
from probe.generate import Generated
from probe.site import Fate

STUDY = Target("at least", 1.44)
"""What the study reports for DivPrune to 25% from half of the steps on (arXiv 2511.15098)."""
REPORTED = Target("reported")
SPEEDUP = Target("at least", 0.9)


@dataclass(frozen=True)
class Way:
    """One way to run: a recipe with its dials (none: unpruned)."""

    name: str
    recipe: str = ""
    dials: tuple[str, ...] = ()
    compact: bool = False
    """Whether survivors are numbered anew."""


RECORDS = Way("recording mass, importance, confidence, entropy at every step and layer", RECIPE)
PRUNED = (
    Way("DivPrune to 25% from 50% of the steps", "prune/divprune", ("keep=0.25", "start=0.5"), compact=True),
    Way("FastV to 25%", "prune/fastv", ("keep=0.25", "start=0.0")),
    Way("VTW from half of the layers", "prune/vtw", ("layer=50%", "start=0.0")),
)
PREFIX = (Way("DivPrune to 25% before the prefill", "prune/divprune", ("keep=0.25", "start=0.0")),)


def run(bench: Bench) -> list[Line]:
    """The whole table for a backbone; LaViDa also with its prefix cache, where attention cannot prune."""
    peak = matrix_peak(bench)
    lines = _family(bench, NoCache(), PRUNED, peak, "")
    if "prefix" in bench.model.defaults.cache:
        lines += _family(bench, PrefixLM(), PREFIX, peak, "prefix cache: ")
    return lines


def _family(bench: Bench, caching: Caching, ways: tuple[Way, ...], peak: float, said: str) -> list[Line]:
    model = bench.model
    tables = {w.name: table_of(model, w.recipe, list(w.dials)) for w in (RECORDS, *ways)}

    def side(table: ProbeTable) -> Callable[[], Generated]:
        return lambda: bench.answer(table, caching=caching)

    def check(results: Mapping[str, Any]) -> str:
        off, tolerance = results["unpruned"].arrays, TOLERANCE[bench.dtype]
        recorded = results[RECORDS.name].arrays
        told = [same_answer("full", "recording", recorded, "no recording", off, 0.0) + " with recording"]
        if isinstance(caching, NoCache):
            by_hand = plain.minimal(model, bench.prompt(), bench.shape.answer, bench.shape.steps)
            told.append(same_answer("full", "the engine", off, "a hand-written loop", by_hand, tolerance) + " by hand")
        for way in ways:
            got = results[way.name].arrays
            if isinstance(caching, NoCache):
                there = torch.from_numpy(got["visual_kept"] == int(Fate.KEPT))
                sizes = bench.shape.answer, bench.shape.steps
                theirs = plain.without(model, bench.prompt(), *sizes, there, compact=way.compact)
                same_answer("full", way.name, got, "rows cut out by hand", theirs, tolerance)
            else:
                again = side(tables[way.name])().arrays
                same_answer("full", way.name, got, "the same again", again, tolerance)
        last = "rows cut out by hand" if isinstance(caching, NoCache) else "the same again"
        return ", ".join([*told, f"pruned runs and {last}"])

    sides = {"unpruned": side(NOTHING), **{name: side(table) for name, table in tables.items()}}
    turns = take_turns(sides, bench.repeats, check)
    shared: dict[str, Any] = {"row": "full", "equal": turns.equal, "shape": bench.told()}
    lines = [_speed(bench, turns, "unpruned", peak, said, shared)]
    lines.append(
        Line(
            what=f"{said}{RECORDS.name} / none",
            target=RECORDING,
            value=turns.ratio(RECORDS.name, "unpruned"),
            note=_pace(turns, RECORDS.name, peak),
            **shared,
        )
    )
    for way in ways:
        flops = _flops(turns, "unpruned") / _flops(turns, way.name)
        study = isinstance(caching, NoCache) and way is PRUNED[0]
        lines += [
            Line(
                what=f"{said}unpruned / {way.name}",
                target=STUDY if study else REPORTED,
                value=turns.ratio("unpruned", way.name),
                note=_pace(turns, way.name, peak),
                numbers={"predicted": flops},
                **shared,
            ),
            Line(
                what=f"{said}{way.name}: realised / predicted speed-up",
                target=SPEEDUP,
                value=turns.ratio("unpruned", way.name, scale=1 / flops),
                note=f"predicted {flops:.2f}x",
                **shared,
            ),
        ]
    return lines


def _speed(bench: Bench, turns: Turns, name: str, peak: float, said: str, shared: dict[str, Any]) -> Line:
    passes = len(turns.results[name].arrays["nominal_step"])
    milliseconds = spread([1e3 * s / passes for s in turns.wall[name]])
    return Line(
        what=f"{said}{name}, per pass",
        target=Target("reported", unit="ms"),
        value=milliseconds,
        note=f"{_pace(turns, name, peak)}; peak {peak / 1e12:.3g} TFLOP/s, measured",
        numbers={"peak_flops": peak, "memory": float(turns.results[name].arrays["peak_memory"])},
        **shared,
    )


def _flops(turns: Turns, name: str) -> float:
    return float(turns.results[name].arrays["flops"].sum())


def _pace(turns: Turns, name: str, peak: float) -> str:
    arrays, seconds = turns.results[name].arrays, turns.seconds(name).median
    passes, rate = len(arrays["nominal_step"]), _flops(turns, name) / seconds
    memory = float(arrays["peak_memory"]) / 2**30
    return f"{1e3 * seconds / passes:.1f} ms per pass, {rate / peak:.0%} of the matrix peak, at most {memory:.1f} GiB"


def matrix_peak(bench: Bench) -> float:
    """FLOP/s of one large square product in the type that is measured: the most that the device gives in practice."""
    n = 8192 if bench.device != "cpu" else 1024
    dtype = getattr(torch, bench.dtype)
    if not isinstance(dtype, torch.dtype):
        raise ProbeError(f"there is no dtype `{bench.dtype}`")
    with torch.inference_mode():
        a, b = (torch.randn(n, n, device=bench.device).to(dtype) for _ in range(2))
        times = []
        for turn in range(8):
            started = timer()
            for _ in range(4):
                a @ b
            if turn >= 3:
                times.append((timer() - started) / 4)
    return 2 * n**3 / spread(times).median
