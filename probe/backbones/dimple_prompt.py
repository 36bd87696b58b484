"""Questions and pictures to Dimple's prompt: chat messages, places of pictures, positions on three axes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probe.backbones.layout import Cells, boxes
from probe.backbones.prompt import PLACE, USER
from probe.backbones.splice import IMAGE
from probe.errors import ProbeError

NAMED_PLACE = re.compile(r"<image (\d+)>")
"""Where an interleaved question names a picture, counted from 1."""


@dataclass(frozen=True)
class Grid:
    """One picture at its own size: `rows` x `columns` visual tokens, row by row."""

    rows: int
    columns: int

    @property
    def count(self) -> int:
        """Visual tokens."""
        return self.rows * self.columns

    @property
    def times(self) -> int:
        """Grids of tokens: one."""
        return 1

    @property
    def time_ids(self) -> Tensor:
        """`(times,)` int64: when the grids stand, from 0."""
        return torch.zeros(1, dtype=torch.int64)

    def cells(self, picture: int) -> Cells:
        """What each token sees: an even share of the picture, which is also the view."""
        x, y = (torch.arange(n + 1).double() / n for n in (self.columns, self.rows))
        box = boxes(torch.stack([x[:-1], x[1:]], -1), torch.stack([y[:-1], y[1:]], -1)).flatten(0, 1).float()
        which = torch.full((self.count,), picture, dtype=torch.int16)
        return Cells(torch.zeros(self.count, dtype=torch.bool), box, which, which)


@dataclass(frozen=True)
class ClipGrid(Grid):
    """A clip whose frames have one size: `times` grids of tokens one after the other, each of `depth` frames.

    The last one repeats the last frame where `frames` are too few. Grids are `interval` time ids apart, rounded down.
    """

    frames: int
    depth: int
    interval: float

    @property
    def times(self) -> int:
        """Grids of tokens."""
        return -(-self.frames // self.depth)

    @property
    def count(self) -> int:
        """Visual tokens."""
        return self.times * self.rows * self.columns

    @property
    def time_ids(self) -> Tensor:
        """`(times,)` int64: when the grids stand, from 0."""
        return (torch.arange(self.times) * self.interval).long()

    def cells(self, picture: int) -> Cells:
        """What each token sees: a share of its frames; `picture` is the first of them, `view` counts the grids."""
        one = super().cells(0)
        still = one.newline.repeat(self.times), one.box.repeat(self.times, 1)
        view = torch.arange(self.times).repeat_interleave(self.rows * self.columns)
        return Cells(*still, (picture + view).to(torch.int16), (picture + view * self.depth).to(torch.int16))


def cells_of(grids: Sequence[Grid], order: Sequence[int]) -> Cells:
    """The cells of the pictures `order`, one after the other, each with its own number."""
    each = [grids[i].cells(i) for i in order]
    return Cells(
        *(torch.cat(part) for part in zip(*((c.newline, c.box, c.view, c.picture) for c in each), strict=True))
    )


def user_turn(question: str, pictures: int, *, interleave: bool) -> tuple[list[dict[str, Any]], list[int]]:
    """The user's turn as chat messages, and which picture each of its picture parts shows.

    The mark `<image>` is deleted, wherever it stands. Pictures come first, or with `interleave` in the places
    `<image 1>`, `<image 2>`, ... of the question; a number beyond the pictures names the last one, and a picture that
    no place names is not shown. That is what the published evaluation does. The system turn is the template's own.
    """
    text = question.replace(PLACE, "")
    picture = {"type": "image"}
    if not interleave:
        parts = [*[picture] * pictures, {"type": "text", "text": text}]
        return [{"role": USER, "content": parts}], list(range(pictures))
    parts, order = [], []
    for i, piece in enumerate(NAMED_PLACE.split(text)):
        if i % 2 == 0:
            parts += [{"type": "text", "text": piece}] if piece else []
        elif pictures:
            parts.append(picture)
            order.append((min(int(piece), pictures) - 1) % pictures)
    return [{"role": USER, "content": parts}], order


def mark_places(ids: Sequence[int], image: int, pictures: int) -> list[int]:
    """`IMAGE` for the id `image`, which stands once for each picture that is shown; raises where the numbers differ."""
    found = list(ids).count(image)
    if found != pictures:
        counted = f"{found} places for {pictures} pictures"
        raise ProbeError(f"the prompt has {counted}; a question must not contain the picture's own token")
    return [IMAGE if token == image else token for token in ids]


def positions(ids: Sequence[int], grids: Sequence[Grid]) -> Tensor:
    """M-RoPE positions `(length, 3)` int64 (time, row, column) of the sequence in which `IMAGE`s become visual tokens.

    Text counts up on all axes alike. A picture that begins at count c stands at time c, rows c, c+1, ... and columns
    c, c+1, ...; what comes after it goes on at the largest of its rows and columns plus one, also behind a clip, whose
    times may be beyond that.
    """
    count, left = 0, iter(grids)
    pieces: list[Tensor] = []
    for token in ids:
        if token == IMAGE:
            grid = next(left)
            cell = torch.cartesian_prod(grid.time_ids, torch.arange(grid.rows), torch.arange(grid.columns))
            pieces.append(cell.view(-1, 3) + count)
            count += max(grid.rows, grid.columns)
        else:
            pieces.append(torch.full((1, 3), count))
            count += 1
    return torch.cat(pieces)
