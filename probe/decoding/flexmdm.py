"""FlexMDM (Kim et al., arXiv 2509.01025): masks are inserted while others are filled, both by chance.

Needs a checkpoint with a length head, which says how many tokens every gap is still expected to take: a backbone that
has one hands a subclass of `FlexMdmLength` its `expected`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from probe.decoding import scores, select
from probe.decoding.policy import Ask, Change, Decision, Length, State, Unmasking
from probe.decoding.rule import Rule
from probe.errors import ProbeError
from probe.registry import lengths, unmaskings


def rate(step: int, steps: int) -> float:
    """Events per mask (or per expected token of a gap) in one step of the linear schedule: `dt / (1 - t)`."""
    return 1 / (steps - step)


def nearest_masks(eligible: Tensor, count: int) -> Tensor:
    """The first `count` masks of each row, `(batch, slot)` bool."""
    return eligible & (eligible.cumsum(1) <= count)


@lengths.register(name="flexmdm")
@dataclass(frozen=True, kw_only=True)
class FlexMdmLength(Length):
    """FlexMDM: a Poisson number of masks in every gap of the answer, none where they would exceed `max_length`."""

    max_length: int = 1024

    def expected(self, state: State, logits: Tensor) -> Tensor:
        """Tokens that every gap is expected to take, `(slots + 1,)` float: gap c stands before slot c."""
        raise ProbeError("length: flexmdm needs a checkpoint with a length head, and this backbone has none")

    def after(self, state: State, ask: Ask, logits: Tensor, decision: Decision) -> Change | None:
        """Insertions, by what was expected before this pass filled anything; none in the last step."""
        if ask.step >= state.rule.steps - 1:
            return None
        counts = state.draw[0].poisson(self.expected(state, logits) * rate(ask.step, state.rule.steps)).long()
        if state.slots - state.first + int(counts.sum()) > self.max_length:
            return None
        return Change(insert=tuple((state.first + i, int(n)) for i, n in enumerate(counts.tolist()) if n))


@unmaskings.register(name="flexmdm")
@dataclass(frozen=True, kw_only=True)
class FlexMdm(Unmasking):
    """FlexMDM's decoder: a Poisson number of masks per step, of largest margin among the leftmost; the last takes all.

    Looked at are the first `min(alpha k, window)` masks for k to fill. Goes with `length: flexmdm`.
    """

    alpha: float = 5.0
    window: int = 32

    def check(self, rule: Rule) -> None:
        """The length policy."""
        if not isinstance(rule.length, FlexMdmLength):
            raise ProbeError("unmask: flexmdm goes with length: flexmdm")

    def passes(self, state: State) -> Iterator[Ask]:
        """Every step."""
        for step in range(state.rule.steps):
            masks = state.masked.sum(1)
            if step == state.rule.steps - 1:
                counts = masks.tolist()
            else:
                share = rate(step, state.rule.steps)
                drawn = [d.poisson(torch.tensor([n * share])) for d, n in zip(state.draw, masks.tolist(), strict=True)]
                counts = [int(x) for x in drawn]
            yield state.ask(state.masked, counts, step=step, step_in_block=step, window=(state.first, state.slots))

    def decide(self, state: State, ask: Ask, logits: Tensor) -> Decision:
        """The arg-max of those with the largest margin."""
        probability = logits.double().softmax(-1)
        candidate, margin = logits.argmax(-1), scores.margin(probability)
        eligible = torch.from_numpy(ask.eligible).to(logits.device)
        if ask.step == state.rule.steps - 1:
            commit = eligible
        else:
            reach = [min(int(self.alpha * k), self.window) for k in ask.counts]
            near = torch.cat([nearest_masks(row[None], n) for row, n in zip(eligible, reach, strict=True)])
            commit = select.top_k(margin, near, ask.counts)
        return Decision(candidate, scores.confidence(probability, candidate), margin, commit)
