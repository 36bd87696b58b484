"""Questions to Gemma's prompts and ids, pictures to patches, generated ids to an answer. No model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from probe.backbones.diffusion_gemma_config import Grid
from probe.backbones.pixels import rgb
from probe.backbones.prompt import PLACE
from probe.errors import ProbeError

PICTURE = "<|image|>"
"""Stands in a prompt where a picture goes."""
BOS, START, END, THINK = "<bos>", "<|turn>", "<turn|>", "<|think|>"
THOUGHT_OVER = "<channel|>"
"""Ends the thoughts before an answer."""

Part = dict[str, str]


def parts_of(question: str, pictures: int) -> list[Part]:
    """The user's message: pictures first, or where the question says so (`<image>`), and its text."""
    texts = question.split(PLACE)
    places = len(texts) - 1
    if places == 0:
        return [{"type": "image"}] * pictures + [{"type": "text", "text": question}]
    if places != pictures:
        raise ProbeError(f"the question names {places} places for a picture ({PLACE}), but {pictures} are given")
    parts: list[Part] = []
    for i, text in enumerate(texts):
        parts += [{"type": "image"}] if i else []
        parts += [{"type": "text", "text": text}] if text else []
    return parts


def render(parts: Sequence[Part], *, think: bool) -> str:
    """The prompt as Gemma 4's documentation of its format has it; for checkpoints without a chat template."""
    said = "".join(PICTURE if p["type"] == "image" else p["text"] for p in parts)
    system = f"{START}system\n{THINK}{END}\n" if think else ""
    return f"{BOS}{system}{START}user\n{said.strip()}{END}\n{START}model\n"


def chat(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """The one message of a chat, as chat templates take it."""
    return [{"role": "user", "content": list(parts)}]


def widen(ids: list[int], counts: Sequence[int], image: int, begin: int, end: int) -> list[int]:
    """Ids with each `image` replaced by `begin`, as many `image` as its picture has soft tokens, and `end`."""
    if (places := ids.count(image)) != len(counts):
        raise ProbeError(f"the prompt has {places} places for pictures ({PICTURE}), but {len(counts)} are given")
    out: list[int] = []
    left = iter(counts)
    for i in ids:
        out += [begin, *[image] * next(left), end] if i == image else [i]
    return out


def answer_ids(ids: Sequence[int], ends: Sequence[int], thought_over: int | None) -> list[int]:
    """What of the generated ids is the answer: before the first end, after the last thought."""
    first = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    said = list(ids[:first])
    if thought_over in said:
        said = said[len(said) - said[::-1].index(thought_over) :]
    return said


def patches(image: Image.Image, grid: Grid) -> tuple[Tensor, Tensor]:
    """A picture as rows of pixels: `(n, 3 * patch^2)` float32 in 0..1, and each patch's `(n, 2)` int64 (x, y).

    The picture is resized to whole cells (bicubic); within a patch, pixels stand row by row, channels last.
    """
    picture = rgb(image)
    across, down = (n * grid.pool for n in grid.fit(*picture.size))
    size = across * grid.patch, down * grid.patch
    if picture.size != size:
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    pixels = (np.asarray(picture).astype(np.float64) * (1 / 255)).astype(np.float32)
    cut = pixels.reshape(down, grid.patch, across, grid.patch, 3).transpose(0, 2, 1, 3, 4).reshape(down * across, -1)
    y, x = np.divmod(np.arange(down * across), across)
    return torch.from_numpy(cut), torch.from_numpy(np.stack([x, y], -1))


def boxes(across: int, down: int) -> Tensor:
    """What each soft token sees, `(down * across, 4)` float32: (x0, y0, x1, y1) as fractions of the picture."""
    y, x = torch.meshgrid(torch.arange(down), torch.arange(across), indexing="ij")
    corners = torch.stack([x / across, y / down, (x + 1) / across, (y + 1) / down], -1)
    return corners.reshape(-1, 4).float()


def encode_cost(vision: Mapping[str, int], patches: int, out_width: int) -> int:
    """FLOPs of one picture: patches through embedding and layers, pooling as a product, the projection."""
    n, width, mlp = patches, vision["width"], vision["mlp"]
    heads = vision["heads"] * vision["head_size"]
    keys = vision["kv_heads"] * vision["head_size"]
    layer = 2 * n * width * (2 * heads + 2 * keys) + 4 * n * n * heads + 6 * n * width * mlp
    soft = n // vision["pool"] ** 2
    pooled = 2 * soft * n * width if vision["pool"] > 1 else 0
    return 2 * n * 3 * vision["patch"] ** 2 * width + vision["layers"] * layer + pooled + 2 * soft * width * out_width
