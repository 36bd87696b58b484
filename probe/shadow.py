"""A second look at a block: rows behind the sequence that stand for its slots, all masks, seen by no other row.

Each stands at its slot's position and sees everything but that slot (WINO, Hong et al., arXiv 2507.18578).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from probe.site import Role
from probe.surgery import Layout, extend, take


def places_of(layout: Layout, window: Sequence[Sequence[int]]) -> Tensor:
    """`(batch, n)`: where the slots of the block stand."""
    return layout.locate(torch.tensor([list(rows) for rows in window], device=layout.row.device))


def with_shadow(layout: Layout, window: Sequence[Sequence[int]]) -> Layout:
    """The layout with the shadow's rows behind it; their numbers are the highest."""
    places = places_of(layout, window)
    batch, n = places.shape
    first = layout.length_at_start
    number = (first + torch.arange(n, device=places.device)).expand(batch, n)
    none = torch.empty(0, dtype=torch.int64, device=places.device)
    rows = replace(
        layout,
        row=number,
        role=torch.full_like(number, int(Role.PAD), dtype=torch.int8),
        position=take(layout.position, places),
        visual=torch.full_like(number, -1),
        visual_rows=(none,) * batch,
        other_rows=(torch.arange(n, device=places.device),) * batch,
        length=(n,) * batch,
        length_at_start=first + n,
        tail=(n,) * batch,
        hidden_key=None,
        size=None,
        pristine=False,
    )
    return extend(layout, rows)


def aligned(layout: Layout, window: Sequence[Sequence[int]]) -> Layout:
    """The shadow's rows at the positions of their slots again, after positions were counted anew."""
    slots = take(layout.position, places_of(layout, window))
    n = slots.shape[1]
    return replace(layout, position=torch.cat([layout.position[:, :-n], slots], 1))


def blind(masks: Sequence[Tensor | None], layout: Layout, window: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
    """The masks `(batch, 1, row, key)` of a sequence with a shadow: who may attend to whom."""
    places = places_of(layout, window)
    batch, n = places.shape
    width = layout.width
    may = torch.ones(batch, 1, width, width, dtype=torch.bool, device=places.device)
    may[:, :, : width - n, width - n :] = False
    own = torch.zeros(batch, n, width, dtype=torch.bool, device=places.device).scatter_(2, places[..., None], True)
    may[:, 0, width - n :] &= ~own
    out = []
    for mask in masks:
        if mask is None:
            out.append(may)
        elif mask.dtype == torch.bool:
            out.append(mask & may)
        else:
            out.append(mask.expand(batch, 1, width, width).masked_fill(~may, torch.finfo(mask.dtype).min / 2))
    return tuple(out)
