"""Heads that are split over processes (tensor parallelism), brought together where something looks at all of them.

Each process computes the attention of its own heads; hidden states are the same in every process. What probes are given
and what caches decide by must be the same as well, so heads are gathered before anything is said of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_GROUP = "_probe_heads_of"


def share_heads(attention: nn.Module, group: Any) -> None:
    """Say that an attention module computes this process's part of the heads, in the order of ranks."""
    attention.__dict__[_GROUP] = group


def whole(attention: nn.Module, part: Tensor, axis: int = 1) -> Tensor:
    """All heads along `axis`, from this process's part of them; the part itself where nothing is split."""
    group = attention.__dict__.get(_GROUP)
    if group is None:
        return part
    size = torch.distributed.get_world_size(group)
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(size)]
    torch.distributed.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, axis)


def own(attention: nn.Module, mask: Tensor | None, heads: int) -> Tensor | None:
    """This process's part of a mask `(batch, 1 or head, row, key)`, given how many heads it computes."""
    group = attention.__dict__.get(_GROUP)
    if group is None or mask is None or mask.ndim != 4 or mask.shape[1] in (1, heads):
        return mask
    return mask[:, heads * torch.distributed.get_rank(group) :][:, :heads]
