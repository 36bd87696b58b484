"""What the encoder's patches see, and where each would stand: views before they are pooled, joined or trimmed.

`patches_of(layout)` answers for every kind of `layout`; it is what probes in the encoder know of a picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor

from probe.backbones.anyres import Geometry
from probe.backbones.layout import Clip, Layout, Plain, Tiled, boxes
from probe.errors import ProbeError


@dataclass(frozen=True)
class Patches:
    """The patches of the views that one layout consumes.

    `box (views, patches, 4)` float32 as in `Cells`; `picture (views,)` int16, from 0 within the layout; `base[v]`:
    whether a view shows its picture whole; `token (views, patches)` int64: which of the layout's tokens shows the place
    that a patch sees (the nearest one, where the patch is trimmed away).
    """

    box: Tensor
    picture: Tensor
    base: tuple[bool, ...]
    token: Tensor


@singledispatch
def patches_of(layout: Layout) -> Patches:
    """The patches of a layout."""
    raise ProbeError(f"nothing is known of the patches of a {type(layout).__name__}")


@patches_of.register
def _tiled(layout: Tiled) -> Patches:
    """The base view's patches, then every tile's; the black margin of the canvas is taken away from the boxes."""
    tiling, geometry = layout.tiling, layout.tiling.geometry
    edges, cells = _edges(geometry), _cells(geometry)
    x0, y0, x1, y1 = tiling.pasted
    box, token = [boxes(edges / geometry.tile, edges / geometry.tile)], [_grid(cells, cells, geometry.side)]
    rows, columns = tiling.shape
    for tile in range(tiling.views - 1):
        down, across = divmod(tile, tiling.grid[0])
        x = ((edges + across * geometry.tile - x0) / (x1 - x0)).clamp(0, 1)
        y = ((edges + down * geometry.tile - y0) / (y1 - y0)).clamp(0, 1)
        box.append(boxes(x, y))
        # rows and columns of the joined map, then of the trimmed and shrunk one
        row = _shown(down * geometry.side + _middles(geometry), tiling.trim[0], tiling.trimmed[0], rows)
        column = _shown(across * geometry.side + _middles(geometry), tiling.trim[1], tiling.trimmed[1], columns)
        token.append((geometry.side**2 + _grid(row, column, columns + 1)).clamp(max=layout.count - 1))
    base = tuple(v == 0 for v in range(tiling.views))
    picture = torch.zeros(tiling.views, dtype=torch.int16)
    return Patches(torch.stack(box).flatten(1, 2).float(), picture, base, torch.stack(token).flatten(1))


@patches_of.register
def _plain(layout: Plain) -> Patches:
    """The patches of the one view."""
    cells = _cells(layout.geometry)
    token = _grid(cells, cells, layout.geometry.side).flatten()
    box = layout.boxes(_edges(layout.geometry))
    return Patches(box[None], torch.zeros(1, dtype=torch.int16), (True,), token[None])


@patches_of.register
def _clip(layout: Clip) -> Patches:
    """Every frame's patches, unpooled."""
    edges, n = _edges(layout.geometry) / layout.geometry.tile, layout.side
    box = boxes(edges, edges).flatten(0, 1).float().expand(layout.frames, -1, -1)
    cells, wide = _cells(layout.pooled), n + (layout.newlines == "grid")
    frame = torch.arange(layout.frames)[:, None] * (n * wide + (layout.newlines == "frame"))
    token = frame + _grid(cells, cells, wide).flatten()
    return Patches(box, torch.arange(layout.frames, dtype=torch.int16), (True,) * layout.frames, token)


def _edges(geometry: Geometry) -> Tensor:
    """First and last pixel edge of each patch along a view's side: `(n, 2)` float64."""
    edges = torch.arange(geometry.patches + 1).double() * geometry.patch
    return torch.stack([edges[:-1], edges[1:]], -1)


def _middles(geometry: Geometry) -> Tensor:
    """Where the middle of each patch lies along a view's side, in tokens: `(n,)` float64."""
    patches = geometry.seen // geometry.patch
    middles = (torch.arange(geometry.patches).double() + 0.5) * geometry.side / patches
    return middles.clamp(max=geometry.side - 1e-6)  # averaging leaves the last patch of an odd side out


def _cells(geometry: Geometry) -> Tensor:
    """The token of each patch along a view's side: `(n,)` int64."""
    return _middles(geometry).floor().long()


def _shown(middles: Tensor, trim: int, trimmed: int, shown: int) -> Tensor:
    """Where middles along the joined map come to lie in the map that is left of it: `(n,)` int64."""
    return ((middles - trim) * shown / max(trimmed, 1)).floor().long().clamp(0, max(shown - 1, 0))


def _grid(rows: Tensor, columns: Tensor, wide: int) -> Tensor:
    """Flat index of every (row, column) in a map of `wide` tokens per row."""
    return rows[:, None] * wide + columns[None, :]
