"""PC-Sampler (Huang et al., arXiv 2508.13021), the baselines of its repository, and EB-Sampler."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from probe.decoding import scores, select
from probe.decoding.blocks import noisy_argmax, nothing_new
from probe.decoding.confidence import EvenSteps
from probe.decoding.policy import Ask, Decision, State, Unmasking
from probe.registry import unmaskings


@unmaskings.register(name="pc")
@dataclass(frozen=True, kw_only=True)
class PositionAware(EvenSteps):
    """PC-Sampler: early slots first, common tokens late; a fixed number of tokens per step.

    `frequency` maps token ids to their share of a corpus; ids that it lacks count as `unseen`. `mix: product` is the
    paper's `exp(-decay j) min(cap, -p ln f)`; `linear` blends the position with the calibrated score, scaled to 0..1.
    """

    looks_back: ClassVar[bool] = False
    decay: float = 0.25
    cap: float = 10.0
    mix: Literal["product", "linear"] = "product"
    frequency: dict[int, float] = field(default_factory=dict)
    unseen: float = 1e-9

    def wanted(self, state: State, eligible: np.ndarray, window: tuple[int, int]) -> np.ndarray:
        """The linear variant scales by all slots of the block, filled ones included."""
        return np.arange(*window) if self.mix == "linear" else super().wanted(state, eligible, window)

    def _frequency(self, candidate: Tensor, vocabulary: int) -> Tensor:
        table = torch.full((vocabulary,), self.unseen)
        if self.frequency:
            table[torch.tensor(list(self.frequency))] = torch.tensor(list(self.frequency.values()))
        return table.to(candidate.device)[candidate]

    def score(self, state: State, ask: Ask, logits: Tensor, candidate: Tensor, confidence: Tensor) -> Tensor:
        """The calibrated score."""
        masked = torch.from_numpy(state.masked[:, ask.columns]).to(logits.device)
        shown = torch.from_numpy(state.tokens[:, ask.columns]).to(logits.device)
        frequency = self._frequency(torch.where(masked, candidate, shown), logits.shape[-1])
        low, high = ask.window
        offset = torch.from_numpy(ask.columns - low).to(logits.device)
        if self.mix == "product":
            return scores.position_aware(confidence, frequency, offset, self.decay, self.cap)
        return scores.position_mixed(confidence, frequency, offset, high - low, self.decay, self.cap)


@unmaskings.register(name="whole_answer")
@dataclass(frozen=True, kw_only=True)
class WholeAnswer(EvenSteps):
    """Negative entropy or margin, over all masks of the answer whatever the block (PC-Sampler's baselines).

    Steps are counted per block from the block's own masks, so that with several blocks masks are left at the end: the
    published behaviour. With one block it is a plain entropy or margin decoder.
    """

    runs_dry: ClassVar[bool] = True
    looks_ahead: ClassVar[bool] = True
    score_by: Literal["entropy", "margin", "confidence"] = "entropy"

    def score(self, state: State, ask: Ask, logits: Tensor, candidate: Tensor, confidence: Tensor) -> Tensor:
        """Of the softmax in float64."""
        if self.score_by == "confidence":
            return confidence
        probability = logits.double().softmax(-1)
        return scores.margin(probability) if self.score_by == "margin" else scores.negative_entropy(probability)


@unmaskings.register(name="entropy_bound")
@dataclass(frozen=True, kw_only=True)
class EntropyBound(Unmasking):
    """EB-Sampler (Ben-Hamu et al., arXiv 2505.24857): as many low-entropy slots, anywhere, as share a bound.

    Committed is the longest run of lowest entropies whose sum without the largest is at most `gamma` nats.
    """

    gamma: float = 0.01

    def passes(self, state: State) -> Iterator[Ask]:
        """Until nothing is masked, or a pass shows nothing new."""
        step = 0
        while state.masked.any():
            yield state.ask(
                state.masked, [0] * state.batch, step=step, step_in_block=step, window=(state.first, state.slots)
            )
            step += 1
            if nothing_new(state):
                return

    def decide(self, state: State, ask: Ask, logits: Tensor) -> Decision:
        """The run within the bound."""
        candidate = noisy_argmax(state, logits)
        probability = logits.double().softmax(-1)
        score = scores.negative_entropy(probability)
        eligible = torch.from_numpy(ask.eligible).to(logits.device)
        commit = select.entropy_bound(-score, eligible, self.gamma)
        return Decision(candidate, scores.confidence(probability, candidate), score, commit)
