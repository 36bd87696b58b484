"""What pruning gains: realised over predicted speed-up of every pruner, and the time spent in the pruner itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from probe.backbones.base import Backbone
from probe.bench import plain
from probe.bench.equality import TOLERANCE, same_answer
from probe.bench.line import Line, Target
from probe.bench.shapes import ENCODER_LAYERS, PATCH, Bench, table_of
from probe.bench.turns import Spread, Turns, spread, take_turns
from probe.compile import ProbeTable
from probe.encoder import encode_with_probes
from probe.generate import Generated, generate
from probe.site import Fate
from probe.timing import PHASES, Stopwatch

SPEEDUP = Target("at least", 0.9)
PRUNER = Target("at most", 0.03, "%")
KEEP = 0.25
MERGE = """
schema: 1
name: merge
dial: {keep: 0.25, start: 0.0}
probes:
  - at: {site: before_lm, steps: {from: $start}}
    score: {features: {space: embedding}}
    select: {bipartite: {keep: $keep, rounds: until}}
    do: {merge: {mode: size_mean, order: raster, positions: keep, lasts: generation}}
"""


@dataclass(frozen=True)
class Case:
    """A pruner at a quarter of the visual tokens: its recipe, and the dials that say so from a share of the steps on.

    `compact`: survivors are numbered anew. `by_hand`: whether a plain loop can follow it by cutting rows out (what
    merges or recycles has new values, which it cannot know).
    """

    name: str
    recipe: str
    dials: Callable[[float, int], list[str]]
    compact: bool = False
    by_hand: bool = True


def _start(*more: str) -> Callable[[float, int], list[str]]:
    return lambda start, steps: [f"start={start}", *more]


def _done(start: float, steps: int) -> list[str]:
    """`done: [x]` acts after the pass that completes the share x: after the first one, where it is to begin at once."""
    return [f"keep={KEEP}", f"at=[{max(start, 1 / steps)}]"]


CASES = (
    Case("FastV", "prune/fastv", _start(f"keep={KEEP}")),
    Case("SparseVLM", "prune/sparsevlm", _start(f"keep=[{KEEP}, {KEEP}, {KEEP}]"), by_hand=False),
    Case("VTW", "prune/vtw", _start("layer=25%")),
    Case("DivPrune", "prune/divprune", _start(f"keep={KEEP}"), compact=True),
    Case("layer_skip", "prune/layer_skip", _start("layer={from: 25%, to: 100%}")),
    Case("progressive", "prune/progressive", _done, compact=True),
    Case("ToMe's matching before the LM", MERGE, _start(f"keep={KEEP}"), by_hand=False),
)


@dataclass(frozen=True)
class Measured:
    """One pruner's turns beside the unpruned run's, and what the ledger says of both."""

    name: str
    start: float
    turns: Turns
    predicted: float
    spent: Spread
    shape: str


def run(bench: Bench) -> list[Line]:
    """Realised over predicted speed-up of every pruner, from the first step on and from half of the steps on."""
    return [
        Line(
            row="speedup",
            what=f"{m.name} at keep {KEEP} from {m.start:.0%} of the steps: realised / predicted speed-up",
            target=SPEEDUP,
            value=m.turns.ratio("unpruned", _side(m.start), scale=1 / m.predicted),
            cpu=m.turns.ratio("unpruned", _side(m.start), cpu=True, scale=1 / m.predicted),
            equal=m.turns.equal,
            shape=m.shape,
            note=f"{m.turns.ratio('unpruned', _side(m.start)).median:.2f}x of {m.predicted:.2f}x",
            numbers={
                "predicted": m.predicted,
                "seconds": m.turns.seconds(_side(m.start)).median,
                "seconds_unpruned": m.turns.seconds("unpruned").median,
            },
        )
        for m in measured(bench)
    ]


def run_pruner(bench: Bench) -> list[Line]:
    """The share of each run that the recipe's probes take, pruned from the first step on: the largest it gets."""
    out = [_in_pruner(bench, case) for case in CASES]
    if bench.published is None:
        found = measured(replace(bench, shape=bench.sized(steps=2)), only_tome=True)
        out += [_spent(m.name, m.spent, m.turns.equal, m.shape) for m in found]
    return out


def _in_pruner(bench: Bench, case: Case) -> Line:
    table = table_of(bench.model, case.recipe, case.dials(0.0, bench.shape.steps))
    equal = _check(bench, case, table, bench.answer(table))
    shares = spread([share_of_probe(bench.answer(table)) for _ in range(bench.repeats)])
    return _spent(case.name, shares, equal, bench.told())


def _spent(name: str, shares: Spread, equal: str, shape: str) -> Line:
    what = f"{name} at keep {KEEP} from the first step on: time in the pruner, of the run"
    return Line("pruner", what, PRUNER, shares, equal=equal, shape=shape)


def measured(bench: Bench, *, only_tome: bool = False) -> list[Measured]:
    """Every pruner; ToMe in the encoder, which has no steps, once for both rows."""
    if "tome" not in bench.memo and bench.published is None:
        bench.memo["tome"] = _tome(bench)
    last: list[Measured] = bench.memo.get("tome", [])
    return last if only_tome else [m for case in CASES for m in _one(bench, case)] + last


def _side(start: float) -> str:
    return f"from {start:.0%}"


def _one(bench: Bench, case: Case) -> list[Measured]:
    model, steps = bench.model, bench.shape.steps
    tables = {
        start: table_of(model, case.recipe, case.dials(start, steps))
        for start in ((0.0, 0.5) if steps > 1 else (0.0,))
    }  # fmt: skip

    def side(table: ProbeTable) -> Callable[[], Generated]:
        return lambda: bench.answer(table)

    def check(results: Mapping[str, Any]) -> str:
        return " and ".join(dict.fromkeys(_check(bench, case, tables[s], results[_side(s)]) for s in tables))

    turns = take_turns(
        {"unpruned": bench.answer, **{_side(s): side(t) for s, t in tables.items()}}, bench.repeats, check
    )
    full = float(turns.results["unpruned"].arrays["flops"].sum())
    return [
        Measured(
            case.name,
            start,
            turns,
            full / float(turns.results[_side(start)].arrays["flops"].sum()),
            spread([share_of_probe(turns.results[_side(start)])]),
            bench.told(),
        )
        for start in tables
    ]


def share_of_probe(result: Generated) -> float:
    """Of a run's seconds, those in its probes."""
    seconds = result.arrays["seconds"][:, PHASES.index("probe")].sum()
    return float(seconds / result.arrays["seconds_total"])


def _check(bench: Bench, case: Case, table: ProbeTable, result: Generated) -> str:
    """A pruned run gives what a plain loop gives with the same tokens cut out by hand; or the plain kernel, through it.

    Raises `ProbeError` where it does not.
    """
    model, shape, tolerance = bench.model, bench.shape, TOLERANCE[bench.dtype]
    fates = result.arrays["visual_kept"]
    if not (fates != int(Fate.KEPT)).any():
        raise AssertionError(f"{case.name} left every token where it was")
    if case.by_hand:
        there = torch.from_numpy(fates == int(Fate.KEPT))
        theirs = plain.without(model, bench.prompt(), shape.answer, shape.steps, there, compact=case.compact)
        told = same_answer("speedup", case.name, result.arrays, "rows cut out by hand", theirs, tolerance)
        return f"{told} (rows cut out by hand)"
    with plain.kernel(model, "probe_eager"):
        again = bench.answer(table).arrays
    told = same_answer("speedup", case.name, result.arrays, "the eager kernel", again, tolerance)
    return f"{told} (eager kernel)"


def _tome(bench: Bench) -> list[Measured]:
    """ToMe as published acts in the image encoder, before the first step: encoding and decoding together."""
    patches = 16 if bench.shape.width >= 512 and bench.shape.visual > 256 else 4
    shape = bench.sized(tile=patches * PATCH, question=bench.shape.question)
    model = bench.medium(shape)
    merged, left = [], patches**2
    for layer in range(ENCODER_LAYERS):  # to a quarter, in as even shares as halving allows
        goal = round(patches**2 * KEEP ** ((layer + 1) / ENCODER_LAYERS))
        merged.append(left - goal)
        left = goal
    table = table_of(model, "prune/tome", [f"r={merged}"])
    pixels = torch.rand(2 * shape.tile, 2 * shape.tile, 3, generator=torch.Generator().manual_seed(bench.seed))
    image = Image.fromarray((pixels * 255).byte().numpy())
    flops: dict[str, float] = {}
    spent: list[float] = []

    def seen(table: ProbeTable, side: str) -> Callable[[], Generated]:
        def go() -> Generated:
            watch = Stopwatch(model.device)
            with watch.section("encode"):
                found = encode_with_probes(model, [image], table, watch=watch)
                prompt = with_question(model, shape.question, found.features, bench.seed)
            encoding = watch.drain()
            in_probe = sum(s for (_, phase), s in encoding.items() if phase == "probe")
            result = generate(model, [prompt], bench.rule(shape, model=model), ProbeTable(()))[0]
            flops[side] = found.flops + found.probe_flops + float(result.arrays["flops"].sum())
            if side != "unpruned":
                spent.append(in_probe / (sum(encoding.values()) + float(result.arrays["seconds_total"])))
            return result

        return go

    def check(results: Mapping[str, Any]) -> str:
        with plain.kernel(model, "probe_eager"):
            again = seen(table, _side(0.0))()
        spent.clear()
        got, tolerance = results[_side(0.0)].arrays, TOLERANCE[bench.dtype]
        return same_answer("speedup", "ToMe", got, "the eager kernel", again.arrays, tolerance) + " (eager kernel)"

    sides = {"unpruned": seen(ProbeTable(()), "unpruned"), _side(0.0): seen(table, _side(0.0))}
    turns = take_turns(sides, bench.repeats, check)
    n = turns.results["unpruned"].arrays["visual_kept"].shape[-1]
    told = f"{bench.told(bench.sized(visual=n))}, encoder {ENCODER_LAYERS} x 256 on 5 views of {patches**2} patches"
    predicted = flops["unpruned"] / flops[_side(0.0)]
    return [Measured("ToMe in the encoder", 0.0, turns, predicted, spread(spent), told)]


def with_question(model: Backbone, question: int, features: Any, seed: int) -> Any:
    """A prompt of a picture and random ids behind it, for a model without a tokenizer."""
    from probe.backbones.splice import IMAGE

    drawn = torch.randint(3, model.facts.vocabulary, (question,), generator=torch.Generator().manual_seed(seed))
    made: Any = model
    return made.with_pictures([IMAGE, *drawn.tolist()], features)
