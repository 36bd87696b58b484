"""Pictures to the encoder's input: float32 `(views, 3, side, side)`, mostly in -1..1. No model, no tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from probe.backbones.anyres import Tiling

GREY = (127, 127, 127)
BLACK = (0, 0, 0)


def rgb(image: Image.Image) -> Image.Image:
    """The picture as RGB; transparency is dropped, not blended."""
    return image if image.mode == "RGB" else image.convert("RGB")


def squash(image: Image.Image, side: int) -> Image.Image:
    """The whole picture on a square; its shape is not kept."""
    return image.resize((side, side), Image.Resampling.BICUBIC)


def pad_to_square(image: Image.Image) -> Image.Image:
    """The picture centred on a grey square as large as its longer side."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), GREY)
    square.paste(image, square_offset(*image.size))
    return square


def square_offset(width: int, height: int) -> tuple[int, int]:
    """Where `pad_to_square` puts the picture's upper left corner."""
    side = max(width, height)
    return (side - width) // 2, (side - height) // 2


def cut(image: Image.Image, tiling: Tiling) -> list[Image.Image]:
    """The base view and the tiles of one picture, row by row: `tiling.views` squares."""
    side = tiling.geometry.tile
    x0, y0, x1, y1 = tiling.pasted
    canvas = Image.new("RGB", tiling.canvas, BLACK)
    canvas.paste(image.resize((x1 - x0, y1 - y0), Image.Resampling.BICUBIC), (x0, y0))
    across, down = tiling.grid
    tiles = [
        canvas.crop((x * side, y * side, (x + 1) * side, (y + 1) * side)) for y in range(down) for x in range(across)
    ]
    return [squash(image, side), *tiles]


def normalise(
    squares: Iterable[Image.Image], mean: Sequence[float] = (0.5,) * 3, std: Sequence[float] = (0.5,) * 3
) -> Tensor:
    """RGB squares of one size to `(views, 3, side, side)` float32: 0..1 per channel, less `mean`, over `std`."""
    stack = np.stack([np.asarray(s, dtype=np.float32) for s in squares])
    centred = (stack / 255.0 - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return torch.from_numpy(centred).permute(0, 3, 1, 2).contiguous()


def tiled_views(image: Image.Image, tiling: Tiling) -> Tensor:
    """One picture under `anyres`: `(1 + tiles, 3, side, side)`."""
    return normalise(cut(rgb(image), tiling))


def padded_views(images: Sequence[Image.Image], side: int) -> Tensor:
    """Pictures under `pad`: one view each."""
    return normalise(squash(pad_to_square(rgb(i)), side) for i in images)


def frame_views(frames: Sequence[Image.Image], side: int) -> Tensor:
    """Frames of a clip: one squashed view each."""
    return normalise(squash(rgb(f), side) for f in frames)
