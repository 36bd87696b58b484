"""LLaDA's decoder: blocks from left to right, a fixed schedule, the most confident candidates first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from probe.decoding import schedule, scores
from probe.decoding.blocks import Blockwise, check_steps, random_score
from probe.decoding.policy import Ask, State
from probe.decoding.rule import Rule
from probe.registry import unmaskings


@dataclass(frozen=True, kw_only=True)
class EvenSteps(Blockwise):
    """Blocks with LLaDA's budget: `steps / blocks` passes each, the same number of tokens in every one."""

    def check(self, rule: Rule) -> None:
        """Blocks must divide the answer, and steps the blocks."""
        check_steps(rule)

    def budget(self, masked: int, rule: Rule) -> list[int] | None:
        """The remainder goes one each to the first steps."""
        return schedule.linear(masked, rule.steps // rule.n_blocks)

    def step(self, rule: Rule, block: int, step_in_block: int, ran: int) -> int:
        """Steps that a block leaves out count as done."""
        return block * (rule.steps // rule.n_blocks) + step_in_block


@unmaskings.register(name="confidence")
@dataclass(frozen=True, kw_only=True)
class Confidence(EvenSteps):
    """LLaDA and LLaDA-V: blocks left to right, a fixed number of tokens per step, the most confident first.

    Within a block of `block_length` slots, `steps / blocks` passes each commit the candidates of highest softmax
    probability (float64, noise-free), or random ones (`remasking: random`). Masks left behind in earlier blocks stay
    eligible; after a stop string only slots before it are (Nie et al., arXiv 2502.09992; You et al., arXiv 2505.16933).
    """

    decodes_prompt = True

    def score(self, state: State, ask: Ask, logits: Tensor, candidate: Tensor, confidence: Tensor) -> Tensor:
        """Confidence, or a random number."""
        return random_score(state, confidence) if state.rule.remasking == "random" else confidence


@unmaskings.register(name="llada")
@dataclass(frozen=True, kw_only=True)
class Llada(Confidence):
    """LLaDA as its own repository has it: the steps of a block run to the end, whether or not it holds a mask.

    `last`: ids whose confidence counts as nothing once they are the candidate, so that they are committed after all
    others (the repository's flag for end of sequence and end of turn).
    """

    runs_dry: ClassVar[bool] = True
    last: tuple[int, ...] = ()

    def score(self, state: State, ask: Ask, logits: Tensor, candidate: Tensor, confidence: Tensor) -> Tensor:
        """Confidence without the `last` ids, or a random number."""
        if self.last and state.rule.remasking != "random":
            kept = logits.clone()
            kept[..., list(self.last)] = -torch.inf
            return scores.confidence(kept.double().softmax(-1), candidate)
        return super().score(state, ask, logits, candidate, confidence)


@unmaskings.register(name="left_to_right")
@dataclass(frozen=True, kw_only=True)
class LeftToRight(EvenSteps):
    """A fixed number of tokens per step, the leftmost masked slots first: the order of an autoregressive model."""

    def score(self, state: State, ask: Ask, logits: Tensor, candidate: Tensor, confidence: Tensor) -> Tensor:
        """Minus the column."""
        return -torch.from_numpy(ask.columns).to(confidence).expand_as(confidence)
