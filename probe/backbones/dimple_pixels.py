"""Pictures to the encoder's patches, in the order in which it merges them. No model, no tokens."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from probe.backbones.dimple_resize import Preprocessing, presized
from probe.backbones.pixels import rgb


def patches_of(images: Sequence[Image.Image], rule: Preprocessing) -> tuple[Tensor, Tensor]:
    """The patches of some pictures, and the grid of patches of each.

    Returns `pixel_values (patches, 3 * temporal * patch * patch)` float32 and `grid_thw (pictures, 3)` int64, in
    patches. The patches that merge into one visual token are neighbours; the tokens follow each other row by row. A
    picture stands still: it fills every frame of a patch.
    """
    resized = [resize(image, rule) for image in images]
    rows = torch.cat([patchify(normalise(image, rule).expand(rule.temporal, -1, -1, -1), rule) for image in resized])
    grid = [(1, image.height // rule.patch, image.width // rule.patch) for image in resized]
    return rows, torch.tensor(grid)


def patches_of_clip(frames: Sequence[Image.Image], rule: Preprocessing) -> tuple[Tensor, Tensor]:
    """The patches of a clip, which last `rule.temporal` frames each, and its grid `(1, 3)`, as of `patches_of`.

    Frames get the size of the first one; the last is repeated where a patch lacks some.
    """
    size = rule.size(*frames[0].size)
    still = [normalise(rgb(frame).resize(size, rule.resample), rule) for frame in frames]
    still += still[-1:] * (-len(still) % rule.temporal)
    grid = (len(still) // rule.temporal, size[1] // rule.patch, size[0] // rule.patch)
    return patchify(torch.stack(still), rule), torch.tensor([grid])


def resize(image: Image.Image, rule: Preprocessing) -> Image.Image:
    """The picture in RGB at the size that the encoder sees; under `evaluation` by way of JPEG and its own sizes."""
    shown = rgb(image)
    size = rule.size(*shown.size)
    if rule.pixels == "evaluation":
        shown = through_jpeg(shown)
        for step in presized(*shown.size, rule.min_pixels, rule.max_pixels)[1:]:
            shown = shown.resize(step)
    return shown.resize(size, rule.resample)


def through_jpeg(image: Image.Image) -> Image.Image:
    """The picture as it comes back from JPEG compression at Pillow's usual quality."""
    file = BytesIO()
    image.save(file, format="JPEG")
    return Image.open(file).convert("RGB")


def normalise(image: Image.Image, rule: Preprocessing) -> Tensor:
    """RGB bytes to `(height, width, 3)` float32: scaled to 0..1, then `(x - mean) / std` per colour."""
    scaled = (np.asarray(image) * rule.scale).astype(np.float32)
    mean, std = (np.array(x, dtype=np.float32) for x in (rule.mean, rule.std))
    return torch.from_numpy((scaled - mean) / std)


def patchify(frames: Tensor, rule: Preprocessing) -> Tensor:
    """`(frames, height, width, 3)` to `(patches, 3 * temporal * patch * patch)`, blocks of merged patches together."""
    return rearrange(
        frames,
        "(time t) (row mr y) (col mc x) c -> (time row col mr mc) (c t y x)",
        t=rule.temporal, mr=rule.merge, mc=rule.merge, y=rule.patch, x=rule.patch,
    )  # fmt: skip
