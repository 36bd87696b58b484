"""What a backbone is told of some rows of a sequence, to say who sees whom and what its layers get besides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Some rows of a batch: those that a pass computes, or the columns that they may attend to.

    `position (batch, length[, axes])` rotary positions; `place (batch, length)` their order among the columns;
    `row (batch, length)` their numbers on the canvas (-1: padding); `visual (batch, length)` the original visual index
    or -1; `real (batch, length)` false at padding and hidden keys, None where all are real; `window[b]` the canvas rows
    [low, high) of the block being decoded; `pictures[b] (V,)` the picture of every visual index.
    """

    position: Tensor
    place: Tensor
    row: Tensor
    visual: Tensor
    real: Tensor | None
    window: Sequence[tuple[int, int]]
    pictures: Sequence[Tensor]

    @property
    def picture(self) -> Tensor:
        """`(batch, length)` int64: the picture that a row is a token of, -1 for all others."""
        out = torch.full_like(self.visual, -1)
        for b, pictures in enumerate(self.pictures):
            if pictures.shape[0]:
                own = pictures.to(out.device).long()[self.visual[b].clamp(min=0)]
                out[b] = torch.where(self.visual[b] >= 0, own, -1)
        return out

    @property
    def open(self) -> Tensor:
        """`(batch, length)` bool: whether a row stands in the block that is being decoded."""
        edges = torch.tensor(self.window, device=self.row.device)
        return (self.row >= edges[:, :1]) & (self.row < edges[:, 1:])
