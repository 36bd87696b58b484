"""Fast-dLLM's parallel decoding (Wu et al., arXiv 2505.22618): as many tokens per pass as are sure enough."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from probe.decoding import select
from probe.decoding.blocks import Blockwise, check_blocks
from probe.decoding.policy import Ask, State
from probe.decoding.rule import Rule
from probe.registry import unmaskings


@unmaskings.register(name="threshold")
@dataclass(frozen=True, kw_only=True)
class Threshold(Blockwise):
    """Fast-dLLM: every candidate with a confidence of at least `tau`, and always the best; until the block is done."""

    tau: float = 0.9

    def check(self, rule: Rule) -> None:
        """Blocks must divide the answer."""
        check_blocks(rule)

    def choose(self, state: State, ask: Ask, score: Tensor, eligible: Tensor) -> Tensor:
        """The best and all that reach `tau`."""
        return select.threshold(score, eligible, self.tau)


@unmaskings.register(name="factor")
@dataclass(frozen=True, kw_only=True)
class Factor(Blockwise):
    """Fast-dLLM: the longest run of ranks r with a confidence of at least `1 - f / (r + 1)`; until the block is done.

    `last_rank_free`: as in the reference code, the last rank goes along when it is the first to fail. LLaDA-V's
    Fast-dLLM hook calls `f` its threshold.
    """

    f: float = 1.0
    last_rank_free: bool = True

    def check(self, rule: Rule) -> None:
        """Blocks must divide the answer."""
        check_blocks(rule)

    def choose(self, state: State, ask: Ask, score: Tensor, eligible: Tensor) -> Tensor:
        """The ranks before the first that fails."""
        return select.factor(score, eligible, self.f, last_rank_free=self.last_rank_free)
