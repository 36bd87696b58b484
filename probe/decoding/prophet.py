"""Prophet's early commit (Li et al., arXiv 2508.19982): stop once the answer's arg-max is settled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from probe.decoding.confidence import Llada
from probe.decoding.policy import Ask, Decision, State
from probe.decoding.rule import Rule
from probe.errors import ProbeError
from probe.registry import unmaskings

EARLY_END, MIDDLE_END = 0.33, 0.67
"""Progress (passes made over passes planned) at which the thresholds change."""


@dataclass(frozen=True)
class Thresholds:
    """Gaps of raw logits that suffice, by progress."""

    early: float = 7.5
    mid: float = 5.0
    late: float = 2.5

    @classmethod
    def of(cls, table: Mapping[str, float]) -> Thresholds:
        """From a mapping with any of those names."""
        return cls(**table)


def gap(logits: Tensor) -> Tensor:
    """Mean over slots of best minus second best raw logit: `(..., slot, vocabulary)` to `(...)`."""
    best = logits.topk(2, dim=-1).values
    return (best[..., 0] - best[..., 1]).mean(-1)


def should_exit(passes: int, planned: int, mean_gap: float, thresholds: Thresholds | None = None) -> bool:
    """Whether to commit everything after `passes` (1-based, this one included) of `planned` passes."""
    limits = thresholds or Thresholds()
    progress = passes / planned
    limit = limits.early if progress < EARLY_END else limits.mid if progress < MIDDLE_END else limits.late
    return mean_gap >= limit


@unmaskings.register(name="prophet")
@dataclass(frozen=True, kw_only=True)
class Prophet(Llada):
    """LLaDA's decoder that commits every mask of every block at once when the answer's arg-max is settled.

    Looked at are the raw logits of `answer_length` slots from `answer_start` (a slot; negative: from the end), masked
    or not. One sample at a time leaves early; a batch leaves when every sample may.
    """

    early: float = 7.5
    mid: float = 5.0
    late: float = 2.5
    answer_start: int = -5
    answer_length: int = 5

    def check(self, rule: Rule) -> None:
        """The region lies within the answer."""
        super().check(rule)
        start = self.answer_start % rule.gen_length
        if self.answer_length < 1 or start + self.answer_length > rule.gen_length or start < 0:
            raise ProbeError(
                f"prophet looks at {self.answer_length} slots from {self.answer_start}, outside the {rule.gen_length} "
                "slots of the answer"
            )

    def _region(self, state: State) -> np.ndarray:
        return state.first + self.answer_start % state.rule.gen_length + np.arange(self.answer_length)

    def wanted(self, state: State, eligible: np.ndarray, window: tuple[int, int]) -> np.ndarray:
        """Every mask, and the region."""
        return np.union1d(np.flatnonzero(state.masked.any(0)), self._region(state))

    def decide(self, state: State, ask: Ask, logits: Tensor) -> Decision:
        """LLaDA's decision, or everything."""
        usual = super().decide(state, ask, logits)
        region = torch.from_numpy(np.searchsorted(ask.columns, self._region(state))).to(logits.device)
        gaps = gap(logits[:, region]).tolist()
        limits = Thresholds(self.early, self.mid, self.late)
        if not all(should_exit(state.passes, state.rule.steps, g, limits) for g in gaps):
            return usual
        state.finished = True
        masked = torch.from_numpy(state.masked[:, ask.columns]).to(logits.device)
        return replace(usual, commit=masked)
