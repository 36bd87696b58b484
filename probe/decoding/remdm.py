"""Remasking loops: fill, take back the least probable tokens, fill again (ReMDM, Wang et al., arXiv 2503.00307)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from probe.decoding import scores, select
from probe.decoding.blocks import noisy_argmax, nothing_new
from probe.decoding.policy import Ask, Decision, State, Unmasking
from probe.registry import unmaskings
from probe.site import Phase


@unmaskings.register(name="remdm")
@dataclass(frozen=True, kw_only=True)
class Remdm(Unmasking):
    """ReMDM's loop: fill a share of the answer, then `loops` times mask the least probable tokens again and refill.

    `per_pass` tokens are committed, and masked again, in a pass. A pass that looks for tokens to take back commits
    nothing, so that a loop takes two passes. At the end the rest is filled.
    """

    init_ratio: float = 0.75
    per_pass: int = 2
    loops: int = 3

    def passes(self, state: State) -> Iterator[Ask]:
        """Fill, loop, finish."""
        slots = state.slots - state.first
        unfilled = slots - int(self.init_ratio * slots)
        step = 0
        while state.masked.sum(1).max() > unfilled:
            yield self._fill(state, step, int(state.masked.sum(1).max()) - unfilled)
            step += 1
        for _ in range(self.loops):
            filled = ~state.masked
            filled[:, : state.first] = False
            yield state.ask(filled, [0] * state.batch, step=step, window=(state.first, state.slots), phase=Phase.VERIFY)
            yield self._fill(state, step, self.per_pass)
            step += 1
        while state.masked.any():
            yield self._fill(state, step, self.per_pass)
            step += 1
            if nothing_new(state):
                return

    def _fill(self, state: State, step: int, most: int) -> Ask:
        counts = [min(self.per_pass, most)] * state.batch
        return state.ask(state.masked, counts, step=step, step_in_block=step, window=(state.first, state.slots))

    def decide(self, state: State, ask: Ask, logits: Tensor) -> Decision:
        """The surest candidates; or the least probable of the tokens that stand there, to be masked."""
        probability = logits.double().softmax(-1)
        eligible = torch.from_numpy(ask.eligible).to(logits.device)
        if ask.phase is not Phase.VERIFY:
            candidate = noisy_argmax(state, logits)
            sure = scores.confidence(probability, candidate)
            return Decision(candidate, sure, sure, select.top_k(sure, eligible, ask.counts))
        shown = torch.from_numpy(state.tokens[:, ask.columns]).to(logits.device)
        sure = scores.confidence(probability, shown)
        back = select.top_k(-sure, eligible, [self.per_pass] * state.batch)
        return Decision(shown, sure, -sure, torch.zeros_like(eligible), remask=back)
