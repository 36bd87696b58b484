"""Sparse-dLLM (Song et al., arXiv 2508.02558): which cached columns a block keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from probe.errors import ProbeError


def importance(query: Tensor, key: Tensor, kernel: int | None = 3) -> Tensor:
    """Importance of every cached column to a block, `(batch, column)`.

    The block's mean query of each head, times every key, averaged over heads, then the maximum over `kernel`
    neighbouring columns (odd; None: no pooling). No softmax, no scaling.
    `query (batch, head, row, size)` of the block's rows, `key (batch, key head, column, size)`, both rotated.
    """
    if kernel is not None and kernel % 2 == 0:
        raise ProbeError(f"pooling kernel {kernel} is even; it must be odd to stay centred (or None)")
    groups = query.shape[1] // key.shape[1]
    mean = query.mean(2, keepdim=True)
    raw = (mean @ key.repeat_interleave(groups, 1).transpose(2, 3))[:, :, 0].mean(1)
    if kernel is None:
        return raw
    return torch.nn.functional.max_pool1d(raw[:, None], kernel, stride=1, padding=kernel // 2)[:, 0]


def keep(score: Tensor, ratio: float) -> Tensor:
    """The `int(ratio n)` most important of n columns, as sorted indices `(batch, kept)`; ties to the lowest."""
    count = int(ratio * score.shape[1])
    return score.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values
