"""The model of the `dimple` fixtures, its examples as batches, and a cache that is nothing of transformers'."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from probe.backbones import load
from probe.backbones.base import Features, Prompt
from probe.backbones.dimple import Dimple
from probe.backbones.dimple_modules import pair_mask
from probe.backbones.splice import IMAGE


@cache
def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "forward.safetensors")


@cache
def model_in(folder: Path, attention: str = "eager", full_attn_mask: bool | None = None) -> Dimple:
    model = load(folder, attention=attention, full_attn_mask=full_attn_mask)
    assert isinstance(model, Dimple)
    return model


def given(folder: Path, example: str) -> dict[str, Tensor]:
    """The tensors of one example, without its name."""
    return {k.removeprefix(f"{example}."): v for k, v in tensors(folder).items() if k.startswith(f"{example}.")}


def pictures(folder: Path, example: str) -> list[Image.Image]:
    """The example's pictures, every stored pixel enlarged to a block."""
    told, found = given(folder, example), []
    for key in sorted((k for k in told if k.endswith("_blocks_uint8")), key=lambda k: int(k[5:].split("_")[0])):
        block = int(told[key.replace("_blocks_uint8", "_block_size")])
        found.append(Image.fromarray(np.kron(told[key].numpy(), np.ones((block, block, 1), dtype=np.uint8))))
    return found


@cache
def features_of(folder: Path, example: str) -> Features | None:
    shown = pictures(folder, example)
    return model_in(folder).encode_images(shown) if shown else None


@dataclass(frozen=True)
class Batch:
    """Left-padded prompts and what was appended to them.

    `embeds (batch, length, width)`, `position (batch, length, 3)`, `real (batch, length)` bool of prompts with
    `extra` positions more, which are masks or answers; `prompts` the samples without padding.
    """

    embeds: Tensor
    position: Tensor
    real: Tensor
    prompts: list[Prompt]
    prompt_length: int

    @property
    def mask(self) -> Tensor | None:
        """The published mask, where it says anything."""
        return None if bool(self.real.all()) else pair_mask(self.real)


def prompts_of(folder: Path, example: str) -> list[Prompt]:
    """Every row without its padding; the pictures are shared out in the order of their places."""
    model, told, features = model_in(folder), given(folder, example), features_of(folder, example)
    rows, used = [], 0
    for ids, real in zip(told["input_ids"], told["attention_mask"].bool(), strict=True):
        row = ids[real]
        here = (row == model.image).int()
        before = torch.cat([here.new_zeros(1), here[:-1]])
        n = int((here > before).sum())
        if features is None or not n:
            rows.append(model.without_pictures(row.tolist(), 0))
        else:
            marked = [
                IMAGE if h else int(token) for token, h, b in zip(row, here, before, strict=True) if not (h and b)
            ]
            rows.append(model.with_pictures(marked, features, range(used, used + n)))
            assert rows[-1].ids.shape == row.shape, "the places for visual tokens are as many as the pictures have"
        used += n
    return rows


@torch.no_grad()
def batch_of(folder: Path, example: str, extra: Tensor) -> Batch:
    """An example's prompts, padded on the left as they were, followed by the ids `extra (batch, n)`."""
    model, told = model_in(folder), given(folder, example)
    real = torch.cat([told["attention_mask"].bool(), torch.ones_like(extra, dtype=torch.bool)], 1)
    embeds = model.embed(torch.cat([told["input_ids"], extra], 1))
    position = torch.ones(*real.shape, 3, dtype=torch.int64)
    prompts, length = prompts_of(folder, example), told["input_ids"].shape[1]
    for b, prompt in enumerate(prompts):
        first = length - prompt.ids.shape[0]
        embeds[b, first:length], position[b, first:length] = prompt.embeds, prompt.position
        position[b, length:] = int(prompt.position.max()) + 1 + torch.arange(extra.shape[1])[:, None]
    return Batch(embeds, position, real, prompts, length)


class Frozen:
    """Keys and values after rotary: of a first pass, then cropped, then those before every later pass's own."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.length: int | None = None

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.length is None:
            self.kept[layer_idx] = key, value
            return key, value
        before = (x[:, :, : self.length] for x in self.kept[layer_idx])
        return tuple(torch.cat([b, x], 2) for b, x in zip(before, (key, value), strict=True))  # type: ignore[return-value]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length or 0


@torch.no_grad()
def run(model: Dimple, batch: Batch, first: int = 0, cache: Frozen | None = None, mask: Any = "published") -> Tensor:
    """Final hidden states of the rows from `first` on."""
    seen = batch.mask if isinstance(mask, str) else mask
    done = model.lm(
        inputs_embeds=batch.embeds[:, first:],
        position_ids=model.position_ids(batch.position[:, first:]),
        attention_mask=seen[:, :, first:] if seen is not None and seen.ndim == 4 else seen,
        past_key_values=cache,
    )
    return done.last_hidden_state
