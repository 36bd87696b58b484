"""Prophet's early commit (Li et al., arXiv 2508.19982): stop once the answer's arg-max is settled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

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
