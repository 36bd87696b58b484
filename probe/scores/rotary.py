"""What rotary positions alone would make of attention: the correction of SparseVLM+."""

from __future__ import annotations

import torch
from torch import Tensor


def ones_attention(cos_q: Tensor, sin_q: Tensor, cos_k: Tensor, sin_k: Tensor) -> Tensor:
    """Attention of query rows if all queries and keys were vectors of ones, rotated to their positions.

    `cos_q`, `sin_q (query, size)` and `cos_k`, `sin_k (key, size)` are rotary tables in the halves convention; returns
    `(query, key)` float32, softmax over all keys. Averaged over the queries and cut to the visual keys it is the
    `rotary_received` of `attention` with `correct: rotary`.
    """
    queries, keys = _rotated_ones(cos_q, sin_q), _rotated_ones(cos_k, sin_k)
    return (queries @ keys.T * cos_q.shape[-1] ** -0.5).softmax(-1)


def _rotated_ones(cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1] // 2
    turned = torch.cat([-torch.ones_like(sin[..., :half]), torch.ones_like(sin[..., half:])], -1)
    return cos.float() + turned.float() * sin.float()
