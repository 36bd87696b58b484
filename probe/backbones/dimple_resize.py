"""How large a picture is made, and so how many visual tokens it becomes: Qwen2-VL's rule. Integers only, no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from probe.errors import ProbeError

MIN_PIXELS, MAX_PIXELS = 56 * 56, 28 * 28 * 1280
"""Limits where neither the user nor the checkpoint names any."""
STEEPEST = 200
"""Longer over shorter side, at most."""
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's statistics of red, green and blue."""
BICUBIC = 3
"""Pillow's number of the filter."""
PIXELS = ("processor", "evaluation")
SMALLEST, CLIPPED = 28, 180
"""The evaluation's own pre-resizing: the shortest side, and the steepest shape after clipping."""


@dataclass(frozen=True)
class Preprocessing:
    """From a picture's size to its grid of visual tokens, and the numbers that its pixels are normalised with.

    A visual token is a square of `merge` x `merge` patches of `patch` pixels. `pixels` is `processor`, or `evaluation`
    for what the published evaluation puts before it: JPEG compression and a resizing of its own.
    """

    min_pixels: int = MIN_PIXELS
    max_pixels: int = MAX_PIXELS
    patch: int = 14
    merge: int = 2
    temporal: int = 2
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    scale: float = 1 / 255
    resample: int = BICUBIC
    pixels: str = "processor"

    def __post_init__(self) -> None:
        whole = (self.min_pixels, self.max_pixels, self.patch, self.merge, self.temporal, self.resample)
        if not all(isinstance(n, int) for n in whole) or not 0 < self.min_pixels <= self.max_pixels:
            budget = f"min_pixels={self.min_pixels}, max_pixels={self.max_pixels}"
            raise ProbeError(f"preprocessing with {budget}; expected whole numbers, 0 < min_pixels <= max_pixels")
        if self.pixels not in PIXELS:
            raise ProbeError(f"pixels={self.pixels!r}; known: {', '.join(PIXELS)}")

    @property
    def cell(self) -> int:
        """The side of a visual token's square, in pixels of the resized picture."""
        return self.patch * self.merge

    def size(self, width: int, height: int) -> tuple[int, int]:
        """The size `(width, height)` that the encoder sees."""
        if self.pixels == "evaluation":
            width, height = presized(width, height, self.min_pixels, self.max_pixels)[-1]
        return smart_size(width, height, self.cell, self.min_pixels, self.max_pixels)

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of visual tokens of a picture of this size."""
        wide, high = self.size(width, height)
        return high // self.cell, wide // self.cell

    def count(self, width: int, height: int) -> int:
        """Visual tokens of a picture of this size."""
        rows, columns = self.grid(width, height)
        return rows * columns


def smart_size(width: int, height: int, cell: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Both sides rounded to whole cells, then scaled alike if the area is outside of the budget.

    Above `max_pixels` both sides shrink by `sqrt(area / max)`, rounded down to cells; below `min_pixels` they grow by
    `sqrt(min / area)`, rounded up. Raises for a side of less than a cell, a shape steeper than 1:200, and where
    nothing would be left of a side.
    """
    if min(width, height) < cell:
        raise ProbeError(f"a picture of {width} x {height} pixels: each side needs at least {cell}")
    if max(width, height) > STEEPEST * min(width, height):
        raise ProbeError(f"a picture of {width} x {height} pixels is longer than 1:{STEEPEST}")
    wide, high = round(width / cell) * cell, round(height / cell) * cell
    if wide * high > max_pixels:
        ratio = math.sqrt(width * height / max_pixels)
        wide, high = (math.floor(side / ratio / cell) * cell for side in (width, height))
    elif wide * high < min_pixels:
        ratio = math.sqrt(min_pixels / (width * height))
        wide, high = (math.ceil(side * ratio / cell) * cell for side in (width, height))
    if not wide * high:
        where = f"within max_pixels={max_pixels}"
        raise ProbeError(f"a picture of {width} x {height} pixels is too thin to be shown {where}; raise it")
    return wide, high


def presized(width: int, height: int, min_pixels: int, max_pixels: int) -> list[tuple[int, int]]:
    """The sizes through which the published evaluation resizes a picture, one after the other, the first its own.

    Into the budget with sides rounded down, then each side to at least 28, then the longer side of a shape steeper
    than 1:200 to 180 times the shorter.
    """
    sizes = [(width, height)]

    def then(new_width: int, new_height: int) -> None:
        if not new_width * new_height:
            raise ProbeError(f"a picture of {width} x {height} pixels is too thin for max_pixels={max_pixels}")
        sizes.append((new_width, new_height))

    def scaled(area: int) -> tuple[int, int]:
        wide, high = sizes[-1]
        ratio = math.sqrt(area / (wide * high))
        return int(wide * ratio), int(high * ratio)

    if math.prod(sizes[-1]) > max_pixels:
        then(*scaled(max_pixels))
    if math.prod(sizes[-1]) < min_pixels:
        then(*scaled(min_pixels))
    wide, high = sizes[-1]
    if min(wide, high) < SMALLEST:
        then(max(wide, SMALLEST), max(high, SMALLEST))
    wide, high = sizes[-1]
    if wide / high > STEEPEST:
        then(high * CLIPPED, high)
    elif high / wide > STEEPEST:
        then(wide, wide * CLIPPED)
    return sizes


def preprocessing_of(
    given: Mapping[str, Any],
    vision: Mapping[str, Any],
    where: object,
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    pixels: str = "processor",
) -> Preprocessing:
    """From a checkpoint's `preprocessor_config.json` and its tower's settings; the pixel budget may be replaced."""
    own = {"patch_size": "patch_size", "merge_size": "spatial_merge_size", "temporal_patch_size": "temporal_patch_size"}
    for name, of_tower in own.items():
        if given.get(name, vision[of_tower]) != vision[of_tower]:
            what = f"`{name}` of preprocessor_config.json is {given[name]}"
            raise ProbeError(f"{where}: {what}, `{of_tower}` of the tower is {vision[of_tower]}")
    for name in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        if given.get(name, True) is not True:
            raise ProbeError(f"{where}: preprocessor_config.json sets `{name}` to {given[name]}; supported: true")
    size = given.get("size") or {}
    low = given.get("min_pixels", size.get("min_pixels", size.get("shortest_edge", MIN_PIXELS)))
    high = given.get("max_pixels", size.get("max_pixels", size.get("longest_edge", MAX_PIXELS)))
    return Preprocessing(
        low if min_pixels is None else min_pixels,
        high if max_pixels is None else max_pixels,
        patch=vision["patch_size"],
        merge=vision["spatial_merge_size"],
        temporal=vision["temporal_patch_size"],
        mean=tuple(given.get("image_mean") or MEAN),
        std=tuple(given.get("image_std") or STD),
        scale=given.get("rescale_factor") or 1 / 255,
        resample=given.get("resample", BICUBIC),
        pixels=pixels,
    )
