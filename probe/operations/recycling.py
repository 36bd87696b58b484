"""Recycling of dropped tokens: SparseVLM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from probe.operations.options import QUIET, AnswerPositions, Lasts, OnCache, Ordering, Protect, reading
from probe.operations.plans import dropped, places, standing, sums
from probe.registry import operations
from probe.selections.clustering import clusters
from probe.selections.ranking import ranked
from probe.site import Fate, Plan
from probe.surgery import Positions


@operations.register(reads=reading("kept", "hidden", "size", "score", "noise"), quiet=QUIET)
def recycle(
    kept: Tensor,
    part: Tensor | None,
    hidden: Tensor,
    size: Tensor,
    score: Tensor,
    noise: Callable[[int], Tensor],
    *,
    share: Annotated[float, Field(ge=0, le=1)] = 0.3,
    divisor: Annotated[int, Field(ge=1)] = 10,
    recycled: Lasts = "forward",
    carry_size: bool = False,
    positions: Positions = "compact",
    order: Ordering = "raster",
    lasts: Lasts = "forward",
    answer_positions: AnswerPositions = "original",
    on_cache: OnCache = "refresh",
    protect: Protect = (),
) -> Plan:
    """Take the other tokens out, and put the best of them back as the means of a few clusters, behind the kept ones.

    SparseVLM (Zhang et al., ICML 2025, arXiv 2410.04417): of D dropped tokens the `int(share * D) + 1 = m` with the
    highest score are clustered into `int(m / divisor) + 1` (its paper speaks of sums, its code takes means). The other
    dropped ones are gone. `recycled: forward` lets the new tokens live for this forward pass only, whatever `lasts`
    says of the dropped ones (the study's release).
    """
    n, stand = hidden.shape[0], standing(kept, order, part)
    k, gone = stand.shape[0], dropped(stand, n)
    into = places(stand, n)
    if gone.numel() == 0:
        return Plan(stand, Fate.MERGED, into, hidden[stand], size[stand].float() if carry_size else None)
    m = min(int(share * gone.shape[0]) + 1, gone.shape[0])
    best = gone[ranked(score[gone])[:m]]
    found = clusters(hidden[best], int(m / divisor) + 1, noise(m).to(hidden.device))
    into = into.index_copy(0, best, k + found.assignment)
    values = torch.cat([hidden[stand], found.merged.to(hidden.dtype)])
    count = values.shape[0]
    sizes = sums(size.float(), into, count) if carry_size else None
    return Plan(stand, Fate.MERGED, into, values, sizes, count - k)
