"""The native class as oracle of small random DiffusionGemma checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DiffusionGemmaForBlockDiffusion, DynamicCache

from probe.backbones import gemma_prompt as text
from probe.backbones.checkpoint import WEIGHTS
from probe.backbones.diffusion_gemma_config import Grid
from probe.backbones.rows import Rows
from probe.backbones.tiny.diffusion_gemma import (
    ENDS,
    IDS,
    TEMPLATE,
    TEXT,
    VISION,
    tiny_config,
    write_gemma,
    write_gemma_tokenizer,
)

__all__ = [
    "CASES", "ENDS", "IDS", "TEMPLATE", "TEXT", "VISION", "NativeRun", "Steps", "Store", "calm_copy", "modules_with",
    "native", "native_steps", "noise_picture", "processed", "rows", "soft_types", "tiny_config", "write_gemma",
    "write_tokenizer",
]  # fmt: skip
write_tokenizer = write_gemma_tokenizer


def native(folder: Path, attention: str = "sdpa") -> DiffusionGemmaForBlockDiffusion:
    """The oracle: the native class reading the same folder."""
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(folder, dtype="auto", attn_implementation=attention)
    return model.eval()


def soft_types(ids: Tensor) -> Tensor:
    """`mm_token_type_ids` as the native processor makes them: 1 at soft tokens."""
    return (ids == IDS[text.PICTURE]).long()


class NativeRun:
    """The native encoder and decoder, called as `generate` calls them: one sample, masks with pictures."""

    def __init__(self, model: DiffusionGemmaForBlockDiffusion) -> None:
        self.model = model
        self.cache = DynamicCache(config=model.config.text_config)
        self.length = 0

    @torch.no_grad()
    def encode(self, ids: Tensor, **pictures: Any) -> Tensor:
        """Ids `(1, length)` into the cache; returns the encoder's last hidden states."""
        encoder = self.model.model.encoder
        position = torch.arange(self.length, self.length + ids.shape[1])[None]
        masks = encoder.create_masks_for_generate(
            config=self.model.config,
            inputs_embeds=torch.empty(*ids.shape, 0),
            attention_mask=torch.ones(1, self.length + ids.shape[1], dtype=torch.bool),
            past_key_values=self.cache,
            position_ids=position,
            mm_token_type_ids=soft_types(ids) if pictures else None,
        )
        self.length += ids.shape[1]
        call = {"attention_mask": masks, "past_key_values": self.cache, "position_ids": position}
        return encoder(input_ids=ids, **call, **pictures).last_hidden_state

    @torch.no_grad()
    def logits(self, canvas: Tensor, previous: Tensor | None = None) -> Tensor:
        """Logits of a canvas `(1, slot)` behind what was encoded."""
        position = torch.arange(self.length, self.length + canvas.shape[1])[None]
        given = {"decoder_input_ids": canvas, "decoder_position_ids": position}
        return self.model(past_key_values=self.cache, self_conditioning_logits=previous, **given).logits


class Store:
    """Keys and values of earlier rows, by layer; what a pass computes is kept only while `keeps`."""

    def __init__(self) -> None:
        self.held: dict[int, tuple[Tensor, Tensor]] = {}
        self.keeps = True

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        if layer in self.held:
            key, value = (torch.cat(pair, 2) for pair in zip(self.held[layer], (key, value), strict=True))
        if self.keeps:
            self.held[layer] = key, value
        return key, value

    def get_seq_length(self, *_: Any) -> int:
        return self.held[0][0].shape[2] if self.held else 0


def rows(closed: int, opened: int = 0, *, start: int = 0, picture: Tensor | None = None) -> Rows:
    """Rows of one sample from position `start`: closed ones, then open ones."""
    n = closed + opened
    group = torch.full((n,), -1)
    if picture is not None:
        group[: len(picture)] = picture
    return Rows(torch.arange(start, start + n)[None], group[None], (torch.arange(n) >= closed)[None])


def modules_with(model: nn.Module, kind: type) -> list[nn.Module]:
    """Every module of a class."""
    return [m for m in model.modules() if isinstance(m, kind)]


def processed(images: Sequence[Image.Image], grid: Grid) -> dict[str, Tensor]:
    """Pictures as the native model takes them: patches in one padded batch."""
    most = grid.most * grid.pool**2
    pixels, places = torch.zeros(len(images), most, 12), torch.full((len(images), most, 2), -1)
    for i, (cut, at) in enumerate(text.patches(image, grid) for image in images):
        pixels[i, : len(cut)], places[i, : len(at)] = cut, at
    return {"pixel_values": pixels, "image_position_ids": places}


def calm_copy(folder: Path, target: Path) -> Path:
    """The same checkpoint with tokens that look nearly alike: predictions hardly depend on the noise, and settle."""
    shutil.copytree(folder, target)
    weights = load_file(target / WEIGHTS)
    table = weights["model.decoder.embed_tokens.weight"]
    table.copy_(1 + 0.02 * table)
    save_file(weights, target / WEIGHTS, metadata={"format": "pt"})
    return target


@dataclass
class Steps:
    """What one generation came to, step by step: canvases and conditioning logits, and the tokens."""

    canvas: list[Tensor] = field(default_factory=list)
    top: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


def native_steps(model: DiffusionGemmaForBlockDiffusion, ids: Tensor, seed: int, **settings: Any) -> Steps:
    """A native generation, watched."""
    seen = Steps()
    step = model._denoising_step

    def watched(**kwargs: Any) -> Any:
        out = step(**kwargs)
        for into, value in zip((seen.canvas, seen.top, seen.logits), out[:3], strict=True):
            into.append(value.clone())
        return out

    model._denoising_step = watched
    torch.manual_seed(seed)
    try:
        done = model.generate(ids, return_dict_in_generate=True, **settings)
    finally:
        del model._denoising_step
    seen.tokens = done.sequences[0, ids.shape[1] :].tolist()
    return seen


CASES: dict[str, dict[str, Any]] = {
    "one canvas": {"canvases": 1, "steps": 6, "bound": 0.1, "stable": 1, "sure": 0.005},
    "three canvases": {"canvases": 3, "steps": 4, "bound": 1.0, "stable": 1, "sure": 0.005},
    "stable": {"canvases": 3, "steps": 20, "bound": 6.0, "stable": 2, "sure": 6.0},
    "confident": {"canvases": 2, "steps": 9, "bound": 50.0, "stable": 0, "sure": 2.5},
    "ended": {"canvases": 4, "steps": 3, "bound": 1.0, "stable": 1, "sure": 0.005, "ends": list(range(40, 80))},
}


def noise_picture(width: int, height: int) -> Image.Image:
    """Noise in colour, the same every time."""
    draw = np.random.default_rng(width * 10007 + height)
    return Image.fromarray(draw.integers(0, 255, (height, width, 3), dtype=np.uint8))
