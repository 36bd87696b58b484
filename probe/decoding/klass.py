"""KLASS (Kim et al., arXiv 2511.05664): tokens are ready once their distribution has stopped moving."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from probe.decoding import select
from probe.decoding.confidence import EvenSteps
from probe.decoding.policy import Ask, State
from probe.registry import unmaskings


def divergence(now: Tensor, before: Tensor, floor: float = 1e-12) -> Tensor:
    """Kullback-Leibler divergence of two distributions `(..., vocabulary)`, in nats. `(...)`."""
    return (now * ((now + floor).log() - (before + floor).log())).sum(-1)


@unmaskings.register(name="klass")
@dataclass(frozen=True, kw_only=True)
class Klass(EvenSteps):
    """KLASS: every slot whose last `history` step-to-step divergences are small and whose candidate is sure.

    If there is none, the usual number of tokens. A block counts its divergences anew.
    """

    confidence: float = 0.9
    divergence: float = 0.01
    history: int = 2

    def wanted(self, state: State, eligible: np.ndarray, window: tuple[int, int]) -> np.ndarray:
        """Every mask: later blocks are compared with the last pass of this one."""
        return np.flatnonzero(state.masked.any(0))

    def score(self, state: State, ask: Ask, logits: Tensor, candidate: Tensor, confidence: Tensor) -> Tensor:
        """The confidence; remembers how far each slot's distribution moved."""
        now = logits.double().softmax(-1)
        memory = state.memory.get("klass", {})
        moved = {}
        for i, column in enumerate(ask.columns.tolist()):
            before, past = memory.get(column, (torch.zeros_like(now[:, i]), []))
            past = [] if ask.step_in_block == 0 else past
            moved[column] = (now[:, i], [*past, divergence(now[:, i], before)][-self.history :])
        state.memory["klass"] = moved
        return confidence

    def choose(self, state: State, ask: Ask, score: Tensor, eligible: Tensor) -> Tensor:
        """The ready ones, or the usual number."""
        moved = state.memory["klass"]
        still = []
        for column in ask.columns.tolist():
            past = moved[column][1]
            calm = torch.stack(past).lt(self.divergence).all(0) if len(past) == self.history else None
            still.append(torch.zeros(len(score), dtype=torch.bool, device=score.device) if calm is None else calm)
        ready = torch.stack(still, 1) & (score > self.confidence) & eligible
        return torch.where(ready.any(1, keepdim=True), ready, select.top_k(score, eligible, ask.counts))
