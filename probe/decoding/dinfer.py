"""dInfer's parallel decoders (Ma et al., arXiv 2510.08666)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from probe.decoding import select
from probe.decoding.blocks import Blockwise, check_blocks
from probe.decoding.policy import Ask, Decision, State
from probe.decoding.propose import forbid
from probe.decoding.rule import Rule
from probe.registry import unmaskings


@unmaskings.register(name="dinfer_threshold")
@dataclass(frozen=True, kw_only=True)
class DinferThreshold(Blockwise):
    """dInfer: every candidate of at least `min(tau, best - 1e-5)`, never the mask token; until the block is done."""

    tau: float = 0.9

    def check(self, rule: Rule) -> None:
        """Blocks must divide the answer."""
        check_blocks(rule)

    def decide(self, state: State, ask: Ask, logits: Tensor) -> Decision:
        """With the mask token out of the race."""
        return super().decide(state, ask, forbid(logits, [state.rule.mask_id]))

    def choose(self, state: State, ask: Ask, score: Tensor, eligible: Tensor) -> Tensor:
        """The sure ones, or the best and its near-ties."""
        return select.threshold_or_best(score, eligible, self.tau)


@unmaskings.register(name="dinfer_hierarchy")
@dataclass(frozen=True, kw_only=True)
class DinferHierarchy(DinferThreshold):
    """dInfer: candidates above `tau`, the best of all, and of every run of adjacent masks its best if above `low`."""

    low: float = 0.4

    def choose(self, state: State, ask: Ask, score: Tensor, eligible: Tensor) -> Tensor:
        """Adjacent means next to each other among the slots of the pass."""
        return select.hierarchy(score, eligible, self.tau, self.low)
