"""From the encoder's views to a run of visual tokens, and what each token sees. Pure functions on tensors.

A layout belongs to one picture (or clip). It consumes `views` rows of the projected features
`(views, patches, width)` and yields `count` rows: `tokens(...)` the embeddings, `cells()` their description.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from probe.backbones.anyres import POOL_STRIDE, Geometry, Tiling
from probe.errors import ProbeError

NEWLINE_MODES = ("grid", "frame", "one_token", "no_token")


@dataclass(frozen=True)
class Cells:
    """What each of V visual tokens is.

    `newline (V,)` bool; `box (V, 4)` float32: (x0, y0, x1, y1) as fractions of the picture, NaN for
    newlines, without area for a token that sees only padding; `view (V,)` int16, counted from 0 within the
    layout (a newline belongs to the view of the token before it); `picture (V,)` int16, likewise from 0.
    """

    newline: Tensor
    box: Tensor
    view: Tensor
    picture: Tensor


class Layout(Protocol):
    """How one picture's views are laid out."""

    @property
    def views(self) -> int:
        """Views consumed."""
        ...

    @property
    def pictures(self) -> int:
        """Pictures (frames) described."""
        ...

    @property
    def count(self) -> int:
        """Visual tokens produced, newlines included."""
        ...

    def tokens(self, projected: Tensor, newline: Tensor) -> Tensor:
        """`projected (views, patches, width)` and the newline embedding `(width,)` to `(count, width)`."""
        ...

    def cells(self) -> Cells:
        """Description of the `count` tokens."""
        ...


@dataclass(frozen=True)
class Tiled:
    """One picture under `anyres`: the base view row by row, then the joined tiles with a newline per row."""

    tiling: Tiling
    pictures: int = 1

    @property
    def views(self) -> int:
        """The base view and the tiles."""
        return self.tiling.views

    @property
    def count(self) -> int:
        """Visual tokens, newlines included."""
        return self.tiling.count

    def tokens(self, projected: Tensor, newline: Tensor) -> Tensor:
        """`(views, patches, width)` to `(count, width)`."""
        side, (across, down) = self.tiling.geometry.side, self.tiling.grid
        views = pool(projected, self.tiling.geometry)
        base, tiles = views[0], views[1:]
        grid = tiles.reshape(down, across, side, side, -1)  # tile row, tile column, row, column, width
        joined = grid.transpose(1, 2).reshape(*self.tiling.full, -1)
        rows, columns = self.tiling.trim
        trimmed = joined[rows : joined.shape[0] - rows, columns : joined.shape[1] - columns]
        shown = resize(trimmed, self.tiling.shape) if self.tiling.shrunk else trimmed
        return torch.cat([base, close_rows(shown, newline).flatten(0, 1)])

    def coordinates(self) -> tuple[Tensor, Tensor]:
        """Centres of the map's token rows and of its token columns, in patches of the joined map, float64."""
        pairs = zip(self.tiling.trim, self.tiling.trimmed, self.tiling.shape, strict=True)
        rows, columns = (trim + (torch.arange(n).double() + 0.5) * old / n - 0.5 for trim, old, n in pairs)
        return rows, columns

    def cells(self) -> Cells:
        """Description of the tokens; the black margin of the canvas is taken away from the boxes."""
        geometry, (rows, columns) = self.tiling.geometry, self.tiling.shape
        x0, y0, x1, y1 = self.tiling.pasted
        base_x = base_y = view_edges(geometry, geometry.side) / geometry.tile
        map_x = ((_edges(geometry, self.tiling, 1) - x0) / (x1 - x0)).clamp(0, 1)
        map_y = ((_edges(geometry, self.tiling, 0) - y0) / (y1 - y0)).clamp(0, 1)
        centre_y, centre_x = ((c + 0.5).floor().long() // geometry.side for c in self.coordinates())
        view = 1 + centre_y[:, None] * self.tiling.grid[0] + centre_x[None, :]
        view = torch.cat([view, view[:, -1:]], 1).flatten() if columns else view.new_zeros(rows)
        newline = torch.zeros(rows, columns + 1, dtype=torch.bool)
        newline[:, -1:] = True
        box = torch.full((rows, columns + 1, 4), math.nan, dtype=torch.float64)
        box[:, :-1] = boxes(map_x, map_y)
        base = geometry.side**2
        return Cells(
            torch.cat([torch.zeros(base, dtype=torch.bool), newline.flatten()]),
            torch.cat([boxes(base_x, base_y).flatten(0, 1), box.flatten(0, 1)]).float(),
            torch.cat([torch.zeros(base, dtype=torch.long), view]).to(torch.int16),
            torch.zeros(self.count, dtype=torch.int16),
        )


@dataclass(frozen=True)
class Plain:
    """One picture as one view, padded to a square: its patches row by row, `closed` by one newline or not."""

    geometry: Geometry
    width: int
    height: int
    closed: bool = False
    views: int = 1
    pictures: int = 1

    @property
    def count(self) -> int:
        """Visual tokens, newline included."""
        return self.geometry.side**2 + self.closed

    def tokens(self, projected: Tensor, newline: Tensor) -> Tensor:
        """`(1, patches, width)` to `(count, width)`."""
        view = pool(projected, self.geometry)[0]
        return torch.cat([view, newline[None]]) if self.closed else view

    def cells(self) -> Cells:
        """Description of the tokens; the grey margin of the square is taken away from the boxes."""
        box = self.boxes(view_edges(self.geometry, self.geometry.side))
        newline = torch.zeros(self.count, dtype=torch.bool)
        if self.closed:
            newline[-1] = True
            box = torch.cat([box, torch.full((1, 4), math.nan)])
        zeros = torch.zeros(self.count, dtype=torch.int16)
        return Cells(newline, box, zeros, zeros)

    def boxes(self, edges: Tensor) -> Tensor:
        """Edges in pixels of the view, the same across and down, to what lies between them: `(tokens, 4)`."""
        side = max(self.width, self.height)
        edges = edges / self.geometry.tile * side
        left, top = (side - self.width) // 2, (side - self.height) // 2
        box = boxes(((edges - left) / self.width).clamp(0, 1), ((edges - top) / self.height).clamp(0, 1))
        return box.flatten(0, 1).float()


@dataclass(frozen=True)
class Clip:
    """Frames of a video, pooled to half their side in any case; newlines per row, per frame, once, or not at all."""

    geometry: Geometry
    frames: int
    newlines: str = "grid"

    def __post_init__(self) -> None:
        if self.newlines not in NEWLINE_MODES:
            raise ProbeError(f"`mm_newline_position` is {self.newlines!r}; known: {', '.join(NEWLINE_MODES)}")

    @property
    def views(self) -> int:
        """One view per frame."""
        return self.frames

    @property
    def pictures(self) -> int:
        """One picture per frame."""
        return self.frames

    @property
    def pooled(self) -> Geometry:
        """The geometry with its pooling, or bilinear pooling where pictures are not pooled."""
        return replace(self.geometry, pool=self.geometry.pool or "bilinear")

    @property
    def side(self) -> int:
        """Tokens along one side of a pooled frame."""
        return self.pooled.side

    @property
    def count(self) -> int:
        """Visual tokens, newlines included."""
        n = self.side
        extra = {"grid": self.frames * n, "frame": self.frames, "one_token": 1, "no_token": 0}[self.newlines]
        return self.frames * n * n + extra

    def tokens(self, projected: Tensor, newline: Tensor) -> Tensor:
        """`(frames, patches, width)` to `(count, width)`."""
        pooled = pool(projected, self.pooled).unflatten(1, (self.side, self.side))
        if self.newlines == "grid":
            return close_rows(pooled.flatten(0, 1), newline).flatten(0, 1)
        flat = pooled.flatten(1, 2)
        if self.newlines == "frame":
            return close_rows(flat, newline).flatten(0, 1)
        ends = [newline[None]] if self.newlines == "one_token" else []
        return torch.cat([flat.flatten(0, 1), *ends])

    def cells(self) -> Cells:
        """Description of the tokens; frames are squashed, so boxes are fractions of the frame at once."""
        n = self.side
        edges = view_edges(self.pooled, n) / self.geometry.tile
        box = boxes(edges, edges).expand(self.frames, n, n, 4)
        frame = torch.arange(self.frames).view(-1, 1, 1).expand(self.frames, n, n)
        # The same arrangement as in `tokens`, with NaN in the place of the newline embedding.
        described = torch.cat([box, frame[..., None].double()], -1)
        nothing = torch.full((5,), math.nan, dtype=torch.float64)
        if self.newlines == "grid":
            table = close_rows(described.flatten(0, 1), nothing).flatten(0, 1)
        elif self.newlines == "frame":
            table = close_rows(described.flatten(1, 2), nothing).flatten(0, 1)
        else:
            table = described.flatten(0, 2)
            table = torch.cat([table, nothing[None]]) if self.newlines == "one_token" else table
        newline = table[:, 0].isnan()
        before = torch.where(newline, table[:, 4].roll(1), table[:, 4]).to(torch.int16)
        return Cells(newline, table[:, :4].float(), before, before)


def resize(grid: Tensor, shape: tuple[int, int]) -> Tensor:
    """`(rows, columns, width)` to `(*shape, width)`, bilinearly, edges aligned, without smoothing."""
    channels = grid.permute(2, 0, 1)[None]
    return interpolate(channels, size=shape, mode="bilinear", align_corners=False)[0].permute(1, 2, 0)


def pool(projected: Tensor, geometry: Geometry) -> Tensor:
    """`(views, patches, width)` to `(views, tokens, width)` as the geometry's `pool` says, after the projector."""
    if geometry.pool is None:
        return projected
    maps = projected.unflatten(1, (geometry.patches, geometry.patches))
    if geometry.pool == "average":
        return avg_pool2d(maps.permute(0, 3, 1, 2), POOL_STRIDE).flatten(2).transpose(1, 2)
    return torch.stack([resize(m, (geometry.side, geometry.side)) for m in maps]).flatten(1, 2)


def close_rows(rows: Tensor, newline: Tensor) -> Tensor:
    """`(rows, columns, width)` to `(rows, columns + 1, width)`: the newline embedding after every row."""
    return torch.cat([rows, newline.expand(rows.shape[0], 1, -1)], 1)


def boxes(x: Tensor, y: Tensor) -> Tensor:
    """`x (columns, 2)` and `y (rows, 2)`, first and last edge of each, to `(rows, columns, 4)`."""
    rows, columns = y.shape[0], x.shape[0]
    wide, high = x.expand(rows, columns, 2), y[:, None].expand(rows, columns, 2)
    return torch.stack([wide[..., 0], high[..., 0], wide[..., 1], high[..., 1]], -1)


def view_edges(geometry: Geometry, n: int) -> Tensor:
    """First and last pixel edge of each of `n` tokens along a view's side: `(n, 2)` float64."""
    edges = torch.arange(n + 1).double() * geometry.seen / n
    return torch.stack([edges[:-1], edges[1:]], -1)


def _edges(geometry: Geometry, tiling: Tiling, axis: int) -> Tensor:
    """Pixel edges on the canvas of the map's rows (axis 0) or columns (axis 1): `(n, 2)` float64."""
    n, old, offset = tiling.shape[axis], tiling.trimmed[axis], tiling.trim[axis]
    cuts = offset + torch.arange(n + 1).double() * old / n if n else torch.zeros(1, dtype=torch.float64)
    # A tile's last pixels belong to no patch, so an edge on a seam is at one place for the token that ends
    # there and at another for the token that begins there.
    first, last = (cuts[:-1] / geometry.side + 1e-9).floor(), (cuts[1:] / geometry.side - 1e-9).ceil() - 1
    scale = geometry.seen / geometry.side
    starts = first * geometry.tile + (cuts[:-1] - first * geometry.side) * scale
    ends = last * geometry.tile + (cuts[1:] - last * geometry.side) * scale
    return torch.stack([starts, ends], -1)
