"""Canvases that are re-noised instead of masked: what a step accepts, what stands next, and when a canvas is done.

DiffusionGemma's sampler (Google, 2026; the entropy bound is that of Ben-Hamu et al., arXiv 2505.24857). A canvas begins
as uniform noise. Each pass samples every slot, accepts the surest samples, and fills the others with new noise; nothing
that is accepted stays accepted. What is handed out in the end is the arg-max of the last pass.
"""

from __future__ import annotations

import torch
from torch import Tensor


def temperature(step: int, steps: int, low: float, high: float) -> float:
    """The temperature of step 0..steps-1: from `high` down, never quite to `low`. Rounded to float32, as published."""
    return float(low + (high - low) * (torch.tensor(steps - step, dtype=torch.int32) / steps))


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of the distribution of `logits (..., vocabulary)`; impossible tokens count as nothing.

    Computed as `torch.distributions.Categorical` does, to the last bit: slots are ranked by it.
    """
    likely = logits - logits.logsumexp(-1, keepdim=True)
    return -(likely.clamp(min=torch.finfo(likely.dtype).min) * likely.softmax(-1)).sum(-1)


def accept(uncertainty: Tensor, bound: float) -> Tensor:
    """Which slots are accepted, `(batch, slot)` bool, from their entropies.

    In the order of their entropies, slots are accepted as long as the entropies before them sum up to at most
    `bound`: then the accepted ones are nearly independent of each other. The surest slot always is.
    """
    ordered, order = uncertainty.sort(-1)
    few = ordered.cumsum(-1) - ordered <= bound
    return torch.zeros_like(few).scatter(-1, order, few)


def settled(history: Tensor, top: Tensor, uncertainty: Tensor, threshold: float) -> Tensor:
    """Which canvases are done, `(batch,)` bool: unchanged and sure.

    `top (batch, slot)` is this pass's arg-max and `history (passes, batch, slot)` those of the passes that it must
    equal (-1 where there was none); the mean of `uncertainty (batch, slot)` must be below `threshold`.
    """
    return (history == top).all(-1).all(0) & (uncertainty.mean(-1) < threshold)
