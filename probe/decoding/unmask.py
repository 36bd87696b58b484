"""What each masked slot would become, how sure that is, and which slots are committed.

Rows are candidates only: `(batch, row, vocabulary)` logits of slots, never of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from probe.upload import upload

Remasking = Literal["low_confidence", "random"]


def suppress(logits: Tensor, ids: Sequence[int]) -> Tensor:
    """`logits` with the given vocabulary entries at -inf (in place)."""
    if ids:
        logits.index_fill_(-1, upload(list(ids), logits.device), -torch.inf)
    return logits


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance on logits: `u + (scale + 1) (c - u)`."""
    return unconditional + (scale + 1) * (conditional - unconditional)


def propose(logits: Tensor, temperature: float, uniform: Tensor | None) -> Tensor:
    """The candidate token of each row: arg-max, or Gumbel-max in float64.

    With temperature T > 0: `argmax exp(l) / (-ln u)^T`, `uniform` of the shape of `logits`, float64.
    Zheng et al., arXiv 2409.02908: lower precision would sharpen the distribution.
    """
    if temperature == 0 or uniform is None:
        return logits.argmax(-1)
    noise = (-torch.log(uniform)) ** temperature
    return (logits.double().exp() / noise).argmax(-1)


def confidence(logits: Tensor, candidate: Tensor) -> Tensor:
    """Softmax probability of each row's candidate, from the noise-free logits, in float64. `(batch, row)`."""
    return logits.double().softmax(-1).gather(-1, candidate[..., None])[..., 0]


def select(score: Tensor, eligible: Tensor, counts: Sequence[int]) -> Tensor:
    """Which slots to commit: per sample the `counts[b]` eligible slots of highest score; ties go to the lowest slot.

    `score (batch, slot)`; `eligible` likewise, boolean. Never more than are eligible. A slot whose score is NaN is
    never committed: its candidate is no prediction, and the slot stays masked.
    """
    ranked = score.masked_fill(~eligible | score.isnan(), -torch.inf)
    order = ranked.sort(dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    budget = torch.tensor(counts, device=score.device)[:, None]
    return (rank < budget) & eligible & ~score.isnan()
