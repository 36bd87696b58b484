"""Decoders and windowed caches on a model: identities that hold whatever the weights, and a policy from outside."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from probe.backbones.llada_v import LladaV
from probe.canvas import make_canvas
from probe.compile import ProbeTable
from probe.decoding import select
from probe.decoding.confidence import Confidence
from probe.decoding.dpad import Dpad
from probe.decoding.draw import draws
from probe.decoding.eos import EosFill
from probe.decoding.fast_cache import Dkv, FastDual, FastPrefix
from probe.decoding.fast_dllm import Factor, Threshold
from probe.decoding.flexmdm import FlexMdm, FlexMdmLength
from probe.decoding.policy import Ask, Caching, Decision, Length, State, Unmasking
from probe.errors import ProbeError
from probe.loop import Finished, Rule, Step, denoise
from probe.registry import unmaskings
from probe.tracer import Tracer

NOT_ALONE = ("autoregressive", "wino", "daedal", "dreamon", "flexmdm", "renoise", "test_twice")
"""Need logits that predict the next slot, a shadow of the block, noise tokens, or a length policy of their own."""
SELF_CONTAINED = sorted(e.name for e in unmaskings if e.name not in NOT_ALONE)


@torch.inference_mode()
def run(
    model: LladaV, prompts: Any, unmasking: Unmasking, caching: Caching | None = None, **rule: Any
) -> tuple[list[Step], Finished, Tracer]:
    settled = {"gen_length": 8, "block_length": 4, "steps": 8, **rule}
    said = Rule(
        **settled,
        mask_id=model.special.mask,
        suppressed=(model.special.mask,),
        eos=model.special.eos,
        unmasking=unmasking,
        caching=caching or Caching(),
    )
    canvas = make_canvas(prompts, model.embed(torch.tensor(said.mask_id)), said.gen_length)
    tracer = Tracer(model, ProbeTable(()), canvas, seeds=list(range(len(prompts))))
    *steps, end = denoise(canvas, tracer, said, model.embed, draws(0, list(range(len(prompts)))))
    assert isinstance(end, Finished)
    return steps, end, tracer  # type: ignore[return-value]


def same(a: list[Step], b: list[Step]) -> None:
    """Bit for bit."""
    assert [s.slots for s in a] == [s.slots for s in b]
    assert all(torch.equal(x.logits, y.logits) for x, y in zip(a, b, strict=True))
    assert all((x.tokens == y.tokens).all() for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", SELF_CONTAINED)
def test_every_decoder_ends(name: str, tiny: LladaV, prompts_for: Any) -> None:
    prompts = prompts_for(tiny, 1)
    steps, end, _ = run(tiny, prompts, unmaskings[name].function())
    assert end.passes == len(steps) <= 64
    left = [t for t in end.output[0] if t == tiny.special.mask]
    assert not left or name == "whole_answer"  # which publishes that it leaves masks where there are several blocks


@pytest.mark.parametrize("unmasking", [Confidence(), Threshold(tau=0.3), Factor(f=2.0)])
def test_a_batch_is_its_samples(unmasking: Unmasking, tiny: LladaV, prompts_for: Any) -> None:
    prompts = prompts_for(tiny, 3)
    _, together, _ = run(tiny, prompts, unmasking)
    alone = [run(tiny, [p], unmasking)[1].output[0] for p in prompts]
    assert together.output == alone


def test_no_threshold_is_one_pass_a_block_and_an_unreachable_one_a_token(tiny: LladaV, prompts_for: Any) -> None:
    prompts = prompts_for(tiny, 1)
    assert run(tiny, prompts, Threshold(tau=0.0))[1].passes == 2
    steps, end, _ = run(tiny, prompts, Threshold(tau=1.1))
    assert end.passes == 8
    same(steps, run(tiny, prompts, Confidence())[0])


@pytest.mark.parametrize("caching", [FastPrefix(refresh=1), FastDual(refresh=1), Dkv(refresh=1), Dpad(scale=100.0)])
def test_what_leaves_nothing_out_is_no_cache(caching: Caching, tiny: LladaV, prompts_for: Any) -> None:
    prompts = prompts_for(tiny, 2)
    same(run(tiny, prompts, Confidence(), caching)[0], run(tiny, prompts, Confidence())[0])


@unmaskings.register(name="test_twice")
@dataclass(frozen=True, kw_only=True)
class Twice(Unmasking):
    """A policy from outside: looks at the answer `looks` times, then commits all of it."""

    looks: int = 3

    def passes(self, state: State) -> Iterator[Ask]:
        for step in range(self.looks):
            yield state.ask(
                state.masked, [0] * state.batch, step=step, step_in_block=step, window=(state.first, state.slots)
            )

    def decide(self, state: State, ask: Ask, logits: Tensor) -> Decision:
        candidate = logits.argmax(-1)
        sure = logits.double().softmax(-1).amax(-1)
        last = torch.full_like(candidate, ask.step == self.looks - 1, dtype=torch.bool)
        return Decision(candidate, sure, sure, last)


@pytest.mark.parametrize("caching", [FastPrefix(), FastDual(), Dkv()])
def test_stored_rows_are_good_while_nothing_is_committed(caching: Caching, tiny: LladaV, prompts_for: Any) -> None:
    prompts = prompts_for(tiny, 2)
    steps, end, tracer = run(tiny, prompts, unmaskings["test_twice"].function(looks=3), caching, block_length=8)
    assert [s.work.refresh for s in steps] == [True, isinstance(caching, Dkv), False]
    assert tracer.rows[-1] == (8, 8)
    for step in steps[1:]:
        torch.testing.assert_close(step.logits, steps[0].logits, atol=2e-5, rtol=1e-5)
    assert end.passes == 3


def test_a_window_cuts_off_what_was_left_behind(tiny: LladaV, prompts_for: Any) -> None:
    """Masks of an earlier block are decided only in passes that compute their rows."""

    class Leaver(Twice):
        def passes(self, state: State) -> Iterator[Ask]:
            for block, step in ((0, 0), (1, 0), (1, 1)):
                window = (state.first + 4 * block, state.first + 4 * block + 4)
                yield state.ask(state.masked, [0], step=2 * block + step, step_in_block=step, window=window)

    steps, _, _ = run(tiny, prompts_for(tiny, 1), Leaver(looks=9), FastPrefix())
    assert [s.slots for s in steps] == [list(range(8)), list(range(8)), [4, 5, 6, 7]]


def test_the_answer_ends_with_its_block(tiny: LladaV, prompts_for: Any) -> None:
    """Without the end token nothing changes; with it all behind the block is end tokens, and no pass is spent there."""

    class Says(Threshold):
        def decide(self, state: State, ask: Ask, logits: Tensor) -> Decision:
            logits = logits.clone()
            logits[:, -1, state.rule.eos] = 1e4
            return super().decide(state, ask, logits)

    prompts = prompts_for(tiny, 2)
    steps, end, _ = run(tiny, prompts, Says(tau=0.0), length=EosFill())
    assert end.passes == 1
    assert all(row[3:] == [tiny.special.eos] * 5 for row in end.output)
    assert steps[0].written is not None and steps[0].written.all() and not steps[0].masked.any()  # type: ignore[union-attr]
    assert run(tiny, prompts, Threshold(tau=0.0))[1].passes == 2


class Gaps(FlexMdmLength):
    """Expects `per_gap` tokens in every gap, as a length head would say."""

    def expected(self, state: State, logits: Tensor) -> Tensor:
        return torch.full((state.slots - state.first + 1,), 0.6)


def test_flexmdm_inserts_until_its_last_step(tiny: LladaV, prompts_for: Any) -> None:
    prompts = prompts_for(tiny, 1)
    with pytest.raises(ProbeError, match="length head"):
        run(tiny, prompts, FlexMdm(), length=FlexMdmLength())
    with pytest.raises(ProbeError, match="length: flexmdm"):
        run(tiny, prompts, FlexMdm(), length=Length())
    steps, end, _ = run(tiny, prompts, FlexMdm(), length=Gaps(max_length=24), steps=6, gen_length=8)
    assert len(steps) == 6
    lengths = [s.tokens.shape[1] for s in steps]
    assert lengths == sorted(lengths) and 8 < lengths[-1] <= 24
    assert tiny.special.mask not in end.output[0]


scores = st.lists(st.floats(0, 1), min_size=1, max_size=12)


@given(scores, st.data())
@settings(max_examples=200, deadline=None)
def test_selections_only_grow_with_their_dial(values: list[float], data: Any) -> None:
    score = torch.tensor([values], dtype=torch.float64)
    eligible = torch.tensor([data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))])
    low, high = sorted(data.draw(st.tuples(st.floats(0, 3), st.floats(0, 3))))
    rules = [
        lambda x: select.factor(score, eligible, x, last_rank_free=False),
        lambda x: select.threshold(score, eligible, 1 - x),
        lambda x: select.threshold_or_best(score, eligible, 1 - x),
        lambda x: select.hierarchy(score, eligible, 1 - x, 0.4),
        lambda x: select.entropy_bound(score, eligible, x),
        lambda x: select.top_k(score, eligible, [int(x * 4)]),
    ]
    for i, rule in enumerate(rules):
        few, many = rule(low), rule(high)
        assert not (few & ~many).any() and not (many & ~eligible).any()
        if i < len(rules) - 1:  # at least the best, if there is one
            assert bool(few.any()) == bool(eligible.any())
    assert np.array_equal(select.above(score, eligible, low).numpy(), ((score > low) & eligible).numpy())
