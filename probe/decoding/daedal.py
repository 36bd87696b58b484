"""DAEDAL (Li et al., arXiv 2508.00819): the answer grows until the model expects its end, and where it is unsure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from probe.decoding import scores, select
from probe.decoding.blocks import noisy_argmax
from probe.decoding.policy import Ask, Change, Decision, Length, State, Unmasking
from probe.decoding.propose import forbid
from probe.decoding.rule import Rule
from probe.errors import ProbeError
from probe.registry import lengths, unmaskings
from probe.site import Phase


def tail_confidence(logits: Tensor, eos: int, tail: int) -> float:
    """How sure the model is that the answer ends: of `logits (slot, vocabulary)`, all slots in order.

    The probabilities of the end token, summed over the last `tail` slots whose arg-max it is, over `tail`: fewer such
    slots count as zeros.
    """
    ends = (logits.argmax(-1) == eos).nonzero()[:, 0].flip(0)[:tail]
    return float(logits[ends].softmax(-1)[:, eos].sum()) / tail


@lengths.register(name="daedal")
@dataclass(frozen=True, kw_only=True)
class DaedalLength(Length):
    """DAEDAL: masks are appended until the tail expects the end, and put in where a slot is very unsure.

    Before the first step `factor` masks are appended per probing pass until the tail's end confidence reaches `enough`,
    then half of `tail` end tokens are set behind. While decoding, as long as it is below `enough_later`, the least
    confident slot of the block below `low` that was not committed becomes `factor` masks. Up to `max_length` slots:
    what an insertion pushes beyond falls off the end.
    """

    max_length: int = 2048
    factor: int = 8
    tail: int = 32
    enough: float = 0.5
    enough_later: float = 0.9
    low: float = 0.1

    def after(self, state: State, ask: Ask, logits: Tensor, decision: Decision) -> Change | None:
        """Grow at the end, close the end, or grow within the block."""
        eos = state.rule.eos
        assert eos is not None
        slots = state.slots - state.first
        sure = tail_confidence(logits[0], eos, self.tail)
        room = max(0, self.max_length - slots)
        if ask.phase is Phase.PROBE:
            state.memory["ready"] = sure >= self.enough or not room
            if not state.memory["ready"]:
                return Change(insert=((state.slots, min(self.factor, room)),))
            ends = min(self.tail // 2, room)
            return Change(insert=((state.slots, ends),), fill={state.slots + i: eos for i in range(ends)})
        if sure >= self.enough_later or not room:
            return None
        left = torch.from_numpy(ask.eligible[0]).to(logits.device) & ~decision.commit[0]
        unsure = decision.confidence[0].masked_fill(~left, torch.inf)
        at = int(unsure.argmin())
        if not float(unsure[at]) < self.low:
            return None
        state.memory["grown"] = True
        column = int(ask.columns[at])
        more = min(self.factor - 1, self.max_length - (column - state.first) - 1)
        over = max(0, slots + more - self.max_length)  # what no longer fits falls off the end
        return Change(insert=((column, more),), delete=tuple(range(state.slots - over, state.slots)))


@unmaskings.register(name="daedal")
@dataclass(frozen=True, kw_only=True)
class Daedal(Unmasking):
    """DAEDAL's decoder: in the first unfinished block all candidates surer than `tau`, or the best; never the mask.

    Goes with `length: daedal`. One sample at a time.
    """

    tau: float = 0.9

    def check(self, rule: Rule) -> None:
        """The length policy, and an end token."""
        if not isinstance(rule.length, DaedalLength):
            raise ProbeError("unmask: daedal goes with length: daedal")
        if rule.eos is None:
            raise ProbeError("daedal looks for the end-of-sequence token, and this backbone names none")

    def passes(self, state: State) -> Iterator[Ask]:
        """Probe until long enough, then block by block, whose number grows."""
        size, step, i = state.rule.block_length, 0, 0
        while not state.memory.get("ready"):
            yield state.ask(
                np.zeros_like(state.masked),
                [0] * state.batch,
                columns=np.arange(state.first, state.slots),
                step=0,
                window=(state.first, state.slots),
                phase=Phase.PROBE,
            )
        block = 0
        while True:
            low = state.first + block * size
            high = min(low + size, state.slots)
            if low >= state.slots:
                return
            if not state.masked[:, low:high].any():
                block, i = block + 1, 0
                continue
            eligible = state.masked.copy()
            eligible[:, :low] = False
            eligible[:, high:] = False
            state.memory["grown"] = False
            yield state.ask(
                eligible,
                [1] * state.batch,
                columns=np.arange(state.first, state.slots),
                step=step,
                block=block,
                step_in_block=i,
                window=(low, high),
            )
            step, i = step + 1, i + 1
            if not (state.memory["grown"] or state.memory["chosen"]):
                return

    def decide(self, state: State, ask: Ask, logits: Tensor) -> Decision:
        """The sure ones, or the best."""
        candidate = noisy_argmax(state, logits)
        eligible = torch.from_numpy(ask.eligible).to(logits.device)
        if not (eligible & (candidate != state.rule.mask_id)).any():
            logits = forbid(logits, [state.rule.mask_id])
            candidate = logits.argmax(-1)
        sure = scores.confidence(logits.double().softmax(-1), candidate)
        eligible = eligible & (candidate != state.rule.mask_id)
        commit = select.above(sure, eligible, self.tau)
        commit = torch.where(commit.any(1, keepdim=True), commit, select.top_k(sure, eligible, ask.counts))
        state.memory["chosen"] = bool(commit.any())
        return Decision(candidate, sure, sure, commit)
