"""Arithmetic on plans: who stands where, what was merged into what."""

from __future__ import annotations

import torch
from torch import Tensor

from probe.operations.options import Ordering


def standing(kept: Tensor, order: Ordering, part: Tensor | None = None) -> Tensor:
    """The kept tokens `(k,)` in the order in which they shall stand."""
    if order == "raster":
        return kept.sort().values
    if order == "parts" and part is not None:
        return torch.cat([kept[part == p].sort().values for p in part.unique()]) if kept.numel() else kept
    return kept.sort().values if order == "parts" else kept


def places(stand: Tensor, n: int) -> Tensor:
    """Where each of n tokens stands, `(n,)` int64: its place among the kept ones, -1 for the others."""
    here = torch.arange(stand.shape[0], device=stand.device)
    return torch.full((n,), -1, dtype=torch.int64, device=stand.device).scatter_(0, stand, here)


def dropped(stand: Tensor, n: int) -> Tensor:
    """The tokens that are not kept, in raster order."""
    gone = torch.ones(n, dtype=torch.bool, device=stand.device)
    gone[stand] = False
    return gone.nonzero()[:, 0]


def sums(values: Tensor, into: Tensor, k: int) -> Tensor:
    """Sums of `values (n, ...)` by their place `into (n,)`; place -1 counts for nothing. `(k, ...)`."""
    out = values.new_zeros(k + 1, *values.shape[1:])
    return out.index_add_(0, torch.where(into < 0, k, into), values)[:k]


def unmerge(values: Tensor, into: Tensor) -> Tensor:
    """Give every original token `(n,)` the value of what it was merged into: `(n, ...)`; zeros where it is gone."""
    with_nothing = torch.cat([values, values.new_zeros(1, *values.shape[1:])])
    return with_nothing[torch.where(into < 0, values.shape[0], into)]


def sources(into: Tensor, k: int) -> Tensor:
    """Which tokens stand behind each of the k places: `(k, n)` bool (ToMe's source map, from a plan's `into`)."""
    return torch.arange(k, device=into.device)[:, None] == into
