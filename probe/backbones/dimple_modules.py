"""The modules of Dimple, as settings for transformers' Qwen2 and Qwen2.5-VL tower, and what differs from them.

The language model has rotary positions on three axes (M-RoPE, Wang et al., arXiv 2409.12191). Between tower and
language model lie the tower's own merger and one more projector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.vision_utils import get_vision_window_index

from probe.backbones.base import LayerModules
from probe.backbones.bidirectional import BidirectionalQwen2, qwen2_config
from probe.backbones.dimple_config import VISION
from probe.errors import ProbeError


class MultiAxisRotary(Qwen2RotaryEmbedding):
    """Rotary tables of positions on several axes: every frequency turns with the position on one of them."""

    def __init__(self, config: Qwen2Config, sections: Sequence[int]) -> None:
        super().__init__(config)
        if sum(sections) != self.inv_freq.shape[0]:
            total = f"{sum(sections)} frequencies, each head has {self.inv_freq.shape[0]}"
            raise ProbeError(f"`mrope_section` {list(sections)} shares out {total}")
        self.sections = tuple(sections)

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """`position_ids (axes, batch, length)`, or `(batch, length)` for the same on every axis.

        Returns `(cos, sin)`, each `(batch, length, head size)` in the type of `x`; angles are in float32.
        """
        of_frequency = position_ids[..., None]
        if position_ids.ndim == 3:
            shares = zip(position_ids, self.sections, strict=True)
            of_frequency = torch.cat([axis[..., None].expand(-1, -1, n) for axis, n in shares], -1)
        angle = of_frequency.float() * self.inv_freq.float()
        angle = torch.cat([angle, angle], -1)
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


class DimpleQwen2(BidirectionalQwen2):
    """Qwen2 with M-RoPE; bidirectional, or causal as in the first stages of training."""

    def __init__(self, config: Qwen2Config, sections: Sequence[int], *, causal: bool = False) -> None:
        super().__init__(config)
        self.sections, self.causal = tuple(sections), causal
        self.rotary_emb = MultiAxisRotary(config, self.sections)

    def forward(self, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> BaseModelOutputWithPast:
        """As `BidirectionalQwen2`'s; if causal, a mask that is None or 2-D hides later keys as well."""
        if self.causal and (attention_mask is None or attention_mask.ndim == 2):
            given = kwargs["inputs_embeds"] if "inputs_embeds" in kwargs else args[0]
            cache = kwargs.get("past_key_values")
            seen = cache.get_seq_length() if cache is not None else 0
            attention_mask = earlier(given.shape[1], seen, given.device) & keys(attention_mask)
        done = super().forward(*args, attention_mask=attention_mask, **kwargs)
        return cast(BaseModelOutputWithPast, done)


def earlier(queries: int, seen: int, device: torch.device) -> Tensor:
    """`(1, 1, query, key)` bool, true at keys that do not stand after the query; `seen` keys stand before all."""
    square = torch.ones(queries, seen + queries, dtype=torch.bool, device=device)
    return square.tril(seen)[None, None]


def keys(mask: Tensor | None) -> Tensor:
    """A mask of real keys `(batch, key)` as `(batch, 1, 1, key)` bool; None is true everywhere."""
    return torch.tensor(True) if mask is None else mask.bool()[:, None, None, :]


def pair_mask(mask: Tensor) -> Tensor:
    """The published 4-D mask `(batch, 1, query, key)` of a padded batch, from `(batch, length)` true at real positions.

    Real positions see each other; a padded one sees itself alone, so that its row has a softmax. At real positions
    this is the same as hiding the padded keys, which is what `lm` does with a 2-D mask.
    """
    real = mask.bool()
    same = torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    return ((real[:, :, None] & real[:, None, :]) | same)[:, None]


class Projector(nn.Module):
    """Two linear layers with the language model's activation between them: `(..., inner)` to `(..., outer)`."""

    def __init__(self, inner: int, outer: int, activation: str) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(inner, outer), nn.Linear(outer, outer)
        self.act = ACT2FN[activation]

    def forward(self, features: Tensor) -> Tensor:
        """The tower's merged features as embeddings of visual tokens."""
        return cast(Tensor, self.linear_2(self.act(self.linear_1(features))))


def decoder_config(settings: Mapping[str, Any], attention: str) -> Qwen2Config:
    """transformers' settings of the language model; M-RoPE is added to it."""
    for name, supported in (("rope_scaling", "null"), ("use_sliding_window", "false")):
        if settings.get(name):
            raise ProbeError(f"`{name}` of config.json is {settings[name]}; supported: {supported}")
    return qwen2_config(settings, int(settings["vocab_size"]), attention)


def tower_config(vision: Mapping[str, Any], attention: str) -> Qwen2_5_VLVisionConfig:
    """The tower's settings, from those of the checkpoint."""
    try:
        return Qwen2_5_VLVisionConfig(**{key: vision[key] for key in VISION}, attn_implementation=attention)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise ProbeError(f"`vision_config` does not describe a Qwen2.5-VL tower: {error}") from error


def decoder_layers(stack: Any) -> tuple[LayerModules, ...]:
    """The hookable modules of every layer of the language model."""
    return tuple(
        LayerModules(x, x.self_attn, x.post_attention_layernorm, x.mlp, x.input_layernorm) for x in stack.layers
    )


def tower_layers(tower: Any) -> tuple[LayerModules, ...]:
    """The hookable modules of every block of the tower. Its hidden states are `(patches, width)`, in window order."""
    return tuple(LayerModules(x, x.attn, x.norm2, x.mlp, x.norm1) for x in tower.blocks)


def windows(config: Qwen2_5_VLVisionConfig, grid_thw: Tensor) -> tuple[Tensor, Tensor]:
    """In which order the tower takes the visual tokens, and where its windows end.

    `order (tokens,)` int64: the visual token (row by row, picture by picture) whose patches are the i-th group of rows
    within the blocks; `ends (windows + 1,)` int32, cumulative, in patches.
    """
    return cast(
        "tuple[Tensor, Tensor]",
        get_vision_window_index(
            grid_thw.cpu(),
            spatial_merge_size=config.spatial_merge_size,
            window_size=config.window_size,
            patch_size=config.patch_size,
        ),
    )


def encode_flops(config: Qwen2_5_VLVisionConfig, grid_thw: Tensor, width: int) -> float:
    """FLOPs of tower, merger and projector: two per multiply-add of matrix products, windows as they are run."""
    areas = [int(n) for n in grid_thw.prod(-1)]
    spans = [int(b - a) for a, b in pairwise(windows(config, grid_thw)[1])]
    n, h, unit = sum(areas), config.hidden_size, config.spatial_merge_size**2
    patch = config.in_channels * config.temporal_patch_size * config.patch_size**2
    linear = n * (4 * h * h + 3 * h * config.intermediate_size)
    whole = sum(1 for i in range(config.depth) if i in config.fullatt_block_indexes)
    pairs = whole * sum(a * a for a in areas) + (config.depth - whole) * sum(s * s for s in spans)
    merger = n // unit * unit * h * (unit * h + config.out_hidden_size)
    projector = n // unit * width * (config.out_hidden_size + width)
    return float(2 * (n * patch * h + config.depth * linear + 2 * pairs * h + merger + projector))
