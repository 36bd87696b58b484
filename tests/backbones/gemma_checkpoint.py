"""The native class as oracle of small random DiffusionGemma checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DiffusionGemmaForBlockDiffusion, DynamicCache

from probe.backbones import gemma_prompt as text
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
    "ENDS", "IDS", "TEMPLATE", "TEXT", "VISION", "NativeRun", "Store", "modules_with", "native", "rows", "soft_types",
    "tiny_config", "write_gemma", "write_tokenizer",
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
