"""LaViDa-LLaDA's decoder (Li et al., arXiv 2505.16839): tables of its own, three scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from probe.decoding import schedule, scores
from probe.decoding.blocks import Blockwise, check_blocks, random_score
from probe.decoding.policy import Ask, State
from probe.decoding.rule import Rule
from probe.errors import ProbeError
from probe.registry import unmaskings


@unmaskings.register(name="lavida_llada")
@dataclass(frozen=True, kw_only=True)
class LavidaLlada(Blockwise):
    """LaViDa-LLaDA: steps per block by `step_ratio` or `step_per_block`, a schedule that may be front- or back-loaded.

    Without either ratio a block takes as many steps as it has slots (the rule's `steps` are ignored, as published).
    Steps without a mask left are skipped. `shift` below 1 commits many tokens early.
    """

    score_by: Literal["confidence", "margin", "entropy", "random"] = "confidence"
    schedule: schedule.Curve | None = None
    shift: float = 3.0
    step_ratio: float | None = None
    step_per_block: int | None = None

    def check(self, rule: Rule) -> None:
        """Blocks must divide the answer; only one of the two ways to ask for steps."""
        check_blocks(rule)
        if self.step_ratio is not None and self.step_per_block is not None:
            raise ProbeError("lavida_llada takes step_ratio or step_per_block, not both")
        if self.steps_per_block(rule) < 1:
            raise ProbeError(f"lavida_llada: a block of {rule.block_length} slots is asked to take no step")

    def steps_per_block(self, rule: Rule) -> int:
        """Passes that a block of masks asks for."""
        if self.step_ratio is not None:
            return int(rule.block_length * self.step_ratio)
        return min(self.step_per_block or rule.block_length, rule.block_length)

    def nominal_steps(self, rule: Rule) -> int:
        """Steps of all blocks."""
        return self.steps_per_block(rule) * rule.n_blocks

    def budget(self, masked: int, rule: Rule) -> list[int] | None:
        """The table of a block."""
        return schedule.lavida(masked, self.steps_per_block(rule), self.schedule, self.shift)

    def score(self, state: State, ask: Ask, logits: Tensor, candidate: Tensor, confidence: Tensor) -> Tensor:
        """Confidence, margin or negative entropy of the softmax in float64, or a random number."""
        if self.score_by == "margin":
            return scores.margin(logits.double().softmax(-1))
        if self.score_by == "entropy":
            return scores.negative_entropy(logits.double().softmax(-1))
        if self.score_by == "random":
            return random_score(state, confidence)
        return confidence
