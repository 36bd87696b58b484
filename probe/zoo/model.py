"""The miniatures themselves, for training: transformers' Llama or Qwen2 layers behind a LLaVA splice.

The sequence is the published one, at a small size: the prompt up to ``<image>``, 36 base-view tokens, a
raster of 12 x 12 tile tokens with one newline embedding after each row, the rest of the prompt, the answer.
A Llama (LLaDA-V) predicts a token at its own row; a Qwen2 (LaViDa-Dream, and the autoregressive model that it is
made of) one row before. Finer patches are pooled two by two behind the projector, as in LaViDa. Only training needs
this module; running the shipped weights is the backbone adapters' work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from probe.zoo.tower import SIDE

MOST_LOST = 0.8
VISUAL = SIDE * SIDE + 2 * SIDE * (2 * SIDE + 1)  # 36 base tokens, and 12 rows of 12 with a newline each: 192


@dataclass(frozen=True)
class Packing:
    """Several question-answer groups behind one prefix, which sees itself; a group sees it and itself.

    ``causal``: of itself, prefix and group see only what stands before.
    """

    prefix: int
    groups: int
    causal: bool = False


def _softmax_values(scores: Tensor, value: Tensor) -> Tensor:
    return scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value


def _hide_future(scores: Tensor) -> Tensor:
    """(.., length, length), each row without what follows it."""
    length = scores.shape[-1]
    return scores.masked_fill(torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1), -torch.inf)


def _hide_lost(scores: Tensor, seen: Tensor | None) -> Tensor:
    """(batch, heads, rows, keys), without the keys of the prefix, which come first, that are not ``seen``."""
    if seen is None:
        return scores
    lost = F.pad(~seen, (0, scores.shape[-1] - seen.shape[-1]))
    return scores.masked_fill(lost[:, None, None], -torch.inf)


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float, dropout: float = 0.0, packing: Packing | None = None, seen: Tensor | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Bidirectional attention, (batch, heads, length, head size) to (batch, length, heads, head size).

    With a :class:`Packing` the scores between different groups, and those of the prefix towards groups, are
    never computed. ``seen``, bool (batch, prefix), says which of the prefix anything may attend to; None: all of it.
    """
    if packing is None:
        out = _softmax_values(_hide_lost(query @ key.transpose(-1, -2), seen) * scaling, value)
        return out.transpose(1, 2).contiguous(), None
    p, shape = packing.prefix, (packing.groups, (query.shape[2] - packing.prefix) // packing.groups)
    hide = _hide_future if packing.causal else lambda scores: scores
    inside = _hide_lost(hide(query[:, :, :p] @ key[:, :, :p].transpose(-1, -2)), seen)
    first = _softmax_values(inside * scaling, value[:, :, :p])
    rows = query[:, :, p:]
    own_key, own_value = (x[:, :, p:].unflatten(2, shape) for x in (key, value))
    to_own = hide(rows.unflatten(2, shape) @ own_key.transpose(-1, -2)).flatten(2, 3)
    scores = torch.cat([_hide_lost(rows @ key[:, :, :p].transpose(-1, -2), seen), to_own], -1) * scaling
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    own = (weights[..., p:].unflatten(2, shape) @ own_value).flatten(2, 3)
    rest = weights[..., :p] @ value[:, :, :p] + own
    return torch.cat([first, rest], 2).transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register("miniature_packed", packed_attention)


def language_config(vocabulary: int, hidden: int = 192, layers: int = 6, heads: int = 4, mlp: int = 512) -> LlamaConfig:
    """The published kind of language model at a small size."""
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, hidden_act="silu",
        max_position_embeddings=16384, rms_norm_eps=1e-5,
        tie_word_embeddings=False, attention_bias=False, use_cache=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    config._attn_implementation = "miniature_packed"
    return config


def qwen2_config(vocabulary: int, hidden: int = 192, layers: int = 6, heads: int = 4, mlp: int = 512) -> Qwen2Config:
    """The decoder of the other two, at the same size; its query, key and value projections have biases."""
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, hidden_act="silu",
        max_position_embeddings=16384, rms_norm_eps=1e-6, tie_word_embeddings=False, use_cache=False,
        use_sliding_window=False, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    config._attn_implementation = "miniature_packed"
    return config


class Miniature(nn.Module):
    """Language model, head, projector and newline embedding; the tower's features come from a cache."""

    def __init__(self, config: LlamaConfig | Qwen2Config, tower_width: int) -> None:
        super().__init__()
        self.shifted = isinstance(config, Qwen2Config)
        self.lm = Qwen2Model(config) if isinstance(config, Qwen2Config) else LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        hidden = config.hidden_size
        self.projector = nn.Sequential(nn.Linear(tower_width, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.newline = nn.Parameter(torch.randn(hidden) * 0.02)

    def compile_layers(self) -> None:
        """Compile layer by layer: one graph per shape serves all layers."""
        for layer in self.lm.layers:
            layer.compile(dynamic=False)

    def visual(self, features: Tensor) -> Tensor:
        """(batch, 5, 36 or 144, tower width) to the visual span (batch, 192, hidden)."""
        projected = self.projector(features)
        batch, views, patches, hidden = projected.shape
        if patches != SIDE * SIDE:  # halving a side bilinearly is the mean of two by two
            projected = projected.view(batch, views, SIDE, 2, SIDE, 2, hidden).mean((3, 5)).flatten(2, 3)
        tiles = projected[:, 1:].view(batch, 2, 2, SIDE, SIDE, hidden)  # tile row, tile column, row, column
        raster = tiles.transpose(2, 3).reshape(batch, 2 * SIDE, 2 * SIDE, hidden)
        newline = self.newline.expand(batch, 2 * SIDE, 1, hidden)
        return torch.cat([projected[:, 0], torch.cat([raster, newline], 2).flatten(1, 2)], 1)

    def prefix(self, features: Tensor, opening: Tensor) -> Tensor:
        """The prompt up to and with the picture, (batch, opening + 192, hidden); ``opening`` are ids."""
        text = self.lm.embed_tokens(opening).expand(features.shape[0], -1, -1)
        return torch.cat([text, self.visual(features)], 1)

    def logits(
        self, prefix: Tensor, groups: Tensor, answer: int, packed: bool, causal: bool = False,
        seen: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits of the last ``answer`` positions of each group: float32 (batch, groups, answer, vocabulary).

        ``groups`` holds token ids (batch, groups, length). Unpacked, there is one group and everything sees
        everything. A group that is nothing but the answer has its first token predicted by the end of the prefix,
        where predictions are shifted. ``seen``, bool (batch, prefix): what of the prefix is attended to.
        """
        _, count, length = groups.shape
        start = prefix.shape[1]
        hidden = torch.cat([prefix, self.lm.embed_tokens(groups.flatten(1))], 1)
        places = torch.arange(start + length, device=hidden.device)
        positions = torch.cat([places[:start], places[start:].repeat(count)])[None]
        rotary = self.lm.rotary_emb(hidden, position_ids=positions)
        packing = Packing(start, count, causal) if packed else None
        for layer in self.lm.layers:
            hidden = layer(hidden, attention_mask=None, position_embeddings=rotary, packing=packing, seen=seen)
        tail = hidden[:, None] if count == 1 else hidden[:, start:].unflatten(1, (count, length))
        tail = tail[:, :, -answer - 1 : -1] if self.shifted else tail[:, :, -answer:]
        return self.lm_head(self.lm.norm(tail)).float()


def diffusion_loss(logits: Tensor, wanted: Tensor, masked: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Masked-diffusion loss of (samples, length) answers, and the accuracy of each sample's masked content.

    Per sample the weighted mean of the cross-entropy over masked positions: the same expectation as the 1/t
    weighting of LLaDA (Nie et al. 2025, arXiv 2502.09992, eq. 3) with less variance.
    """
    share = masked * weight
    losses = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view_as(share)
    loss = ((losses * share).sum(1) / share.sum(1)).mean()
    with torch.no_grad():
        content = masked & (weight == 1)
        right = ((logits.argmax(-1) == wanted) & content).sum(1) / content.sum(1)
    return loss, right


def draw_seen(images: int, share: float, generator: torch.Generator) -> Tensor:
    """Occlusion, bool (images, 192): of a ``share`` of the pictures a random part of the visual tokens is not seen.

    The part is uniform between nothing and four fifths. A token that is not seen has its place and its embedding, but
    nothing attends to it: what dropping it with positions kept comes to.
    """
    lost = torch.rand(images, generator=generator) * MOST_LOST
    lost *= torch.rand(images, generator=generator) < share
    order = torch.rand(images, VISUAL, generator=generator).argsort(1).argsort(1)
    return order >= (lost[:, None] * VISUAL)


def draw_masks(samples: int, length: int, generator: torch.Generator, least: float = 0.03) -> tuple[Tensor, Tensor]:
    """Mask ratios t, stratified over the samples and shuffled, and masks (samples, length), none empty."""
    strata = (torch.arange(samples) + torch.rand(samples, generator=generator)) / samples
    t = least + (1 - least) * strata[torch.randperm(samples, generator=generator)]
    noise = torch.rand(samples, length, generator=generator)
    masked = noise < t[:, None]
    masked |= noise == noise.min(1, keepdim=True).values
    return t, masked
