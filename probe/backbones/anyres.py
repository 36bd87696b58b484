"""Which tiles a picture is cut into, and how many visual tokens come of it. No pixels, no tensors.

The arithmetic is that of the LLaVA family ("any resolution"): a picture is fitted onto the best of a list of
canvases, the canvas is cut into tiles, each tile becomes a square of tokens, the squares are joined to one
map, the map is trimmed to the picture's shape and, when it is too large, shrunk. Sizes are (width, height),
maps are (rows, columns).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from probe.errors import ProbeError

SHRINK_ABOVE = 1.1
"""A map is shrunk only when its side exceeds the limit by more than this factor."""
POOL_STRIDE = 2
POOLS = ("bilinear", "average")
"""`bilinear` rounds the halved side up (27 patches to 14 tokens), `average` takes whole squares (27 to 13)."""


@dataclass(frozen=True)
class Geometry:
    """Sizes that decide a layout: tile, patch and canvases in pixels, `limit` in views."""

    tile: int
    patch: int
    pinpoints: tuple[tuple[int, int], ...]
    limit: int | None = None
    pool: str | None = None
    """How a view's patches become half as many tokens along each side: one of `POOLS`, or None: they do not."""
    digits: int | None = None
    """Decimal digits to which a fitted side is rounded before it rounds down, where an original does so."""

    @property
    def patches(self) -> int:
        """Patches along one side of a view."""
        return self.tile // self.patch

    @property
    def side(self) -> int:
        """Tokens along one side of a view."""
        if self.pool is None:
            return self.patches
        return self.patches // POOL_STRIDE if self.pool == "average" else math.ceil(self.patches / POOL_STRIDE)

    @property
    def seen(self) -> int:
        """Pixels of a tile's side that any token covers (the remainder of a division is invisible)."""
        patches = self.side * POOL_STRIDE if self.pool == "average" else self.patches
        return patches * self.patch


@dataclass(frozen=True)
class Tiling:
    """Everything that follows from one picture's size."""

    geometry: Geometry
    width: int
    height: int

    @cached_property
    def canvas(self) -> tuple[int, int]:
        """Width and height of the chosen canvas in pixels."""
        return best_canvas(self.width, self.height, self.geometry.pinpoints)

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles across and down."""
        return self.canvas[0] // self.geometry.tile, self.canvas[1] // self.geometry.tile

    @property
    def views(self) -> int:
        """Views through the encoder: the whole picture, then every tile."""
        return 1 + self.grid[0] * self.grid[1]

    @property
    def pasted(self) -> tuple[int, int, int, int]:
        """Where the resized picture lies on the canvas: (x0, y0, x1, y1) in pixels."""
        width, height = fitted(self.width, self.height, *self.canvas)
        left, top = (self.canvas[0] - width) // 2, (self.canvas[1] - height) // 2
        return left, top, left + width, top + height

    @property
    def full(self) -> tuple[int, int]:
        """Rows and columns of the joined map before trimming."""
        return self.grid[1] * self.geometry.side, self.grid[0] * self.geometry.side

    @cached_property
    def trim(self) -> tuple[int, int]:
        """Rows removed from top and bottom each, columns removed from left and right each."""
        return padding_of(*self.full, self.width, self.height, self.geometry.digits)

    @property
    def trimmed(self) -> tuple[int, int]:
        """Rows and columns after trimming."""
        return self.full[0] - 2 * self.trim[0], self.full[1] - 2 * self.trim[1]

    @property
    def excess(self) -> float:
        """Side of the trimmed map over the side of the largest map that is allowed (0 without a limit)."""
        rows, columns = self.trimmed
        limit = self.geometry.limit
        return math.sqrt(rows * columns / (limit * self.geometry.side**2)) if limit else 0.0

    @property
    def shrunk(self) -> bool:
        """Whether the map is interpolated to a smaller one."""
        return self.excess > SHRINK_ABOVE

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of tokens in the end, newlines not counted."""
        rows, columns = self.trimmed
        if not self.shrunk:
            return rows, columns
        return int(rows // self.excess), int(columns // self.excess)

    @property
    def count(self) -> int:
        """Visual tokens: the base view's, then every row with its newline."""
        rows, columns = self.shape
        return self.geometry.side**2 + rows * (columns + 1)


def best_canvas(width: int, height: int, canvases: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """The canvas that shows most of the picture's pixels; among equals the least wasteful, then the first."""
    best: tuple[int, int] | None = None
    most, least = 0, 0
    for across, down in canvases:
        scale = min(across / width, down / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        wasted = across * down - shown
        if best is None or shown > most or (shown == most and wasted < least):
            best, most, least = (across, down), shown, wasted
    if best is None:
        raise ProbeError("no canvas to fit a picture on: `image_grid_pinpoints` of the config is empty")
    return best


def fitted(width: int, height: int, across: int, down: int) -> tuple[int, int]:
    """Size of the picture fitted into `across` x `down` with its shape kept; the short side rounds up."""
    by_width, by_height = across / width, down / height
    if by_width < by_height:
        return across, min(math.ceil(height * by_width), down)
    return min(math.ceil(width * by_height), across), down


def padding_of(rows: int, columns: int, width: int, height: int, digits: int | None = None) -> tuple[int, int]:
    """Rows and columns of padding on each side of a map that shows a `width` x `height` picture centred.

    Here the fitted side rounds *down*, unlike in `fitted`, so a sliver of padding can remain. `digits` are kept of
    the fitted side before that, so that 23.9999999 counts as 24.
    """
    if width / height > columns / rows:
        shown = height * (columns / width)
        return (rows - int(shown if digits is None else round(shown, digits))) // 2, 0
    shown = width * (rows / height)
    return 0, (columns - int(shown if digits is None else round(shown, digits))) // 2


def pinpoints_of(value: object, tile: int) -> tuple[tuple[int, int], ...]:
    """Canvases from a config: pairs, as a list or in writing, or a range of grids `"(1x1),...,(6x6)"` in tiles."""
    if isinstance(value, str):
        pairs = re.findall(r"[(\[](\d+),\s*(\d+)[)\]]", value)
        if pairs:
            return tuple((int(w), int(h)) for w, h in pairs)
        corners = [(int(a), int(b)) for a, b in re.findall(r"\((\d+)x(\d+)\)", value)]
        if corners:
            (a0, b0), (a1, b1) = corners[0], corners[-1]
            return tuple((i * tile, j * tile) for i in range(a0, a1 + 1) for j in range(b0, b1 + 1))
    if isinstance(value, (list, tuple)) and all(isinstance(p, (list, tuple)) and len(p) == 2 for p in value):
        return tuple((int(w), int(h)) for w, h in value)
    wanted = "pairs of pixels or a range of grids such as (1x1),...,(6x6)"
    raise ProbeError(f"`image_grid_pinpoints` is {value!r}; expected {wanted}")


def geometry_of(config: Mapping[str, Any], *, tile: int, patch: int, pool: str | None = None) -> Geometry:
    """The geometry that a checkpoint's config asks for; `image_aspect_ratio: pad` has no canvases."""
    if pool is not None and pool not in POOLS:
        raise ProbeError(f"pooling of visual tokens is {pool!r}; supported: {', '.join(POOLS)}, or none")
    aspect = config.get("image_aspect_ratio")
    if aspect == "pad":
        return Geometry(tile, patch, (), None, pool)
    match = re.fullmatch(r"anyres(?:_max_(\d+))?", str(aspect))
    if not match:
        raise ProbeError(f"`image_aspect_ratio` is {aspect!r}; supported: pad, anyres, anyres_max_N")
    limit = int(match[1]) if match[1] else None
    canvases = pinpoints_of(config.get("image_grid_pinpoints"), tile)
    off = [c for c in canvases if c[0] % tile or c[1] % tile or min(c) <= 0]
    if off:
        raise ProbeError(f"`image_grid_pinpoints` holds {off[0]}, no multiple of the tile of {tile} pixels")
    return Geometry(tile, patch, canvases, limit, pool)
