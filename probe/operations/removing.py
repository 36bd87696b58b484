"""Operations that only take tokens out."""

from __future__ import annotations

from torch import Tensor

from probe.operations.options import QUIET, AnswerPositions, Lasts, OnCache, Ordering, Protect, reading
from probe.operations.plans import standing
from probe.registry import operations
from probe.site import Fate, Plan
from probe.surgery import Positions


@operations.register(reads=reading("kept"), quiet=QUIET)
def drop(
    kept: Tensor,
    part: Tensor | None,
    *,
    positions: Positions = "keep",
    order: Ordering = "raster",
    lasts: Lasts = "forward",
    answer_positions: AnswerPositions = "original",
    on_cache: OnCache = "refresh",
    protect: Protect = (),
) -> Plan:
    """Take the other tokens out of the sequence."""
    return Plan(standing(kept, order, part), Fate.DROPPED)


@operations.register(default_select="none", quiet=QUIET)
def withdraw(
    kept: Tensor,
    *,
    positions: Positions = "keep",
    lasts: Lasts = "forward",
    answer_positions: AnswerPositions = "original",
    on_cache: OnCache = "refresh",
) -> Plan:
    """Take all visual tokens out from this site on (VTW, Lin et al., AAAI 2025). Needs no selection."""
    return Plan(kept.sort().values, Fate.WITHDRAWN)
