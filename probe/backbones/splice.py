"""Puts visual tokens into the places that a prompt marks for them. Pure functions on tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from probe.errors import ProbeError

IMAGE = -200
"""Stands in a sequence of ids where a picture's tokens go; it is never embedded."""
NOTHING = -1
"""Stands in `Spliced.ids` at padding and in `Spliced.visual` wherever no visual token stands."""


@dataclass(frozen=True)
class Spliced:
    """A batch of prompts as embeddings.

    `embeds (batch, length, width)`, zero at padding; `mask (batch, length)` bool, true at real positions;
    `ids (batch, length)` int64: token ids, `IMAGE` at visual tokens, `NOTHING` at padding;
    `visual (batch, length)` int64: row of the concatenated features, `NOTHING` elsewhere.
    """

    embeds: Tensor
    mask: Tensor
    ids: Tensor
    visual: Tensor


def splice(
    ids: Tensor,
    mask: Tensor | None,
    features: Sequence[Tensor],
    embed: Callable[[Tensor], Tensor],
    *,
    side: str = "right",
    limit: int | None = None,
) -> Spliced:
    """Replace every `IMAGE` of `ids (batch, length)` by the next of `features`, each `(tokens, width)`.

    Positions where `mask (batch, length)` is false are removed first. Pictures are used in the order of
    their places through the whole batch; the last one is used again when there are more places than
    pictures. Each row is cut to `limit` positions, then rows are padded on `side`.
    """
    if side not in ("left", "right"):
        raise ProbeError(f"padding side {side!r}; known: left, right")
    if not features and bool((ids == IMAGE).any()):
        raise ProbeError("the prompt has a place for a picture, but no picture is given")
    starts = [0]
    for feature in features:
        starts.append(starts[-1] + feature.shape[0])
    rows: list[tuple[Tensor, Tensor]] = []
    used = 0
    for row, keep in zip(ids, ids.new_ones(ids.shape) if mask is None else mask, strict=True):
        row_ids, row_visual = [], []
        for run in _runs(row[keep.bool()]):
            if int(run[0]) != IMAGE:
                row_ids.append(run)
                row_visual.append(torch.full_like(run, NOTHING))
                continue
            which = min(used, len(features) - 1)
            used += 1
            span = torch.arange(starts[which], starts[which + 1], device=ids.device)
            row_ids.append(torch.full_like(span, IMAGE))
            row_visual.append(span)
        blank = ids.new_zeros(0)
        rows.append((torch.cat([blank, *row_ids])[:limit], torch.cat([blank, *row_visual])[:limit]))
    length = max(r.shape[0] for r, _ in rows)
    out_ids = torch.stack([_pad(r, length, side) for r, _ in rows])
    out_visual = torch.stack([_pad(v, length, side) for _, v in rows])
    text = embed(out_ids.clamp(min=0))
    if starts[-1]:
        seen = torch.cat(list(features)).to(text.dtype)
        text = torch.where(out_visual[..., None] >= 0, seen[out_visual.clamp(min=0)], text)
    real = out_ids != NOTHING
    return Spliced(text * real[..., None].to(text.dtype), real, out_ids, out_visual)


def _runs(ids: Tensor) -> list[Tensor]:
    """Cut ids into runs of text and single marks."""
    marks = (ids == IMAGE).nonzero().flatten().tolist()
    cuts = sorted({0, ids.shape[0], *marks, *(m + 1 for m in marks)})
    return [ids[a:b] for a, b in pairwise(cuts)]


def _pad(row: Tensor, length: int, side: str) -> Tensor:
    filler = row.new_full((length - row.shape[0],), NOTHING)
    return torch.cat([row, filler] if side == "right" else [filler, row])
