"""Operations: what becomes of the visual tokens that a selection did not keep.

An operation turns kept indices into a `Plan`; surgery carries it out. The options that all of them share:

- `positions: keep | compact`: survivors keep their rotary positions, or are renumbered 0..n-1.
- `order: raster | score`: survivors stand as they stood, or in the order of the selection.
- `lasts: forward | generation`: the tokens are back at the next step (and the choice is made anew there), or gone
  for good.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from probe.registry import operations
from probe.site import Fate, Plan
from probe.surgery import Positions

Order = Literal["raster", "score"]

Lasts = Literal["forward", "generation"]


@operations.register
def drop(kept: Tensor, *, positions: Positions = "keep", order: Order = "raster", lasts: Lasts = "forward") -> Plan:
    """Take the other tokens out of the sequence."""
    return Plan(kept.sort().values if order == "raster" else kept, Fate.DROPPED)


@operations.register(default_select="none")
def withdraw(kept: Tensor, *, positions: Positions = "keep", lasts: Lasts = "forward") -> Plan:
    """Take all visual tokens out from this site on (VTW, Lin et al., AAAI 2025). Needs no selection."""
    return Plan(kept, Fate.WITHDRAWN)


@operations.register
def mask(kept: Tensor, *, lasts: Lasts = "forward") -> Plan:
    """Hide the keys of the other tokens, remove nothing: the logits of `drop` with positions kept, no saving."""
    return Plan(kept, Fate.MASKED)
