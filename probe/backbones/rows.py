"""What is known of rows of a sequence when it is decided which keys they may see. Tensors only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Facts of some rows, each `(batch, length)`, in the order in which the rows stand.

    `position` int64, the rotary position (or `(batch, length, axes)`); `picture` int64, whose soft token stands
    there, -1 for none; `open` bool, true in the block that is being decoded; `real` bool, false at padding and at
    rows that no query may see, or None when every row may be seen (the host knows: no synchronisation); `place` int64,
    the order of rows among the columns that they attend to.
    """

    position: Tensor
    picture: Tensor
    open: Tensor
    real: Tensor | None = None
    place: Tensor | None = None

    @property
    def first_axis(self) -> Tensor:
        """`(batch, length)`: the position in time, where positions have several axes."""
        return self.position if self.position.ndim == 2 else self.position[..., 0]

    def take(self, index: Tensor) -> Rows:
        """These rows at `index (batch, new length)`."""
        batch = torch.arange(index.shape[0], device=index.device)[:, None]
        real = None if self.real is None else self.real[batch, index]
        return Rows(self.position[batch, index], self.picture[batch, index], self.open[batch, index], real)

    def then(self, other: Rows) -> Rows:
        """These rows with others behind them: stored keys, then those of the rows of a pass."""
        real = None
        if self.real is not None or other.real is not None:
            real = torch.cat([torch.ones_like(r.open) if r.real is None else r.real for r in (self, other)], 1)
        pairs = ((self.position, other.position), (self.picture, other.picture), (self.open, other.open))
        position, picture, opened = (torch.cat(pair, 1) for pair in pairs)
        return Rows(position, picture, opened, real)
