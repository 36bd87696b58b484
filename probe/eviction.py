"""Columns that leave a cache because its policy finds them unimportant (Sparse-dLLM), whatever they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from probe.surgery import Layout


def kept_places(
    layout: Layout,
    query: Tensor,
    key: Tensor,
    block: Sequence[Sequence[int]],
    choose: Callable[[Tensor, Tensor], Tensor],
) -> tuple[list[Tensor], int]:
    """Where the columns stand that each sample keeps, `(n,)` ascending, and how many columns were judged in all.

    `query (batch, head, row, size)` and `key (batch, key head, row, size)` of the rows of `layout`, a pass that
    computes all of them; `block[b]` the rows of the block, which stay. `choose` gets one sample's queries of the block
    and keys of the other columns (hidden ones are none), and says which of these stay.
    """
    places, judged = [], 0
    for b, rows in enumerate(block):
        inside = layout.locate_in(b, torch.tensor(list(rows), dtype=torch.int64, device=query.device))
        out = torch.zeros(layout.width, dtype=torch.bool, device=query.device)
        out[layout.length[b] :] = True
        out[inside] = True
        n = layout.length[b] - len(rows)
        if layout.hidden_key is not None:
            n -= int((layout.hidden_key[b] & ~out).sum())
            out = out | layout.hidden_key[b]
        outside = out.int().sort(stable=True).indices[:n]  # ascending; the count is known, so nothing waits
        judged += n
        chosen = choose(query[b : b + 1, :, inside], key[b : b + 1, :, outside])[0]
        places.append(torch.cat([outside[chosen], inside]).sort().values)
    return places, judged
