"""The miniature's vision tower: what it sees of a picture, what it is taught, and the features that are
cached.

The tower is transformers' ``SiglipVisionModel``; as in LLaDA-V its feature is the output of the last kept
layer, without the post layer norm. It is taught patch by patch, in the manner of SigLIP (Zhai et al. 2023,
arXiv 2303.15343): a sigmoid for every pair of a patch and one of 42 visual words (8 colours, 8 shapes, 26
letters), on the dot product of the patch's feature with the word's vector. Two further heads name the row
and the column, within the view, of the thing in the patch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from probe.zoo.engine import MixedTrainer, schedule
from probe.zoo.world import (
    COLOURS,
    COLUMNS,
    HALF,
    LETTERS,
    LINES,
    SHAPES,
    Kind,
    Picture,
    draw,
)

TILE, PATCH = 48, 8
SIDE = TILE // PATCH  # patches per side of a view
PATCHES = SIDE * SIDE
VIEWS = 5  # the whole picture squashed to one tile, then four tiles row by row
VISUAL_WORDS = {word: i for i, word in enumerate((*COLOURS, *SHAPES, *LETTERS))}
Tower: TypeAlias = "SiglipVisionModel | CLIPVisionModel"
_LEAST_OVERLAP = 18  # pixels of a patch (of 64) that a thing must cover to be the patch's thing


def config(width: int, layers: int) -> SiglipVisionConfig:
    """``layers`` is the number that is kept; the published count, with the dropped layer, is one more."""
    config = SiglipVisionConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=4,
        image_size=TILE, patch_size=PATCH, num_channels=3, hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-6, attention_dropout=0.0, vision_use_head=False,
    )  # fmt: skip
    config._attn_implementation = "eager"
    return config


def views(pixels: np.ndarray) -> np.ndarray:
    """uint8 (96, 96, 3) to (5, 48, 48, 3): the base view (bicubic, whole), then the tiles in raster order."""
    base = np.asarray(Image.fromarray(pixels).resize((TILE, TILE)))
    tiles = (pixels[y : y + TILE, x : x + TILE] for y in (0, HALF) for x in (0, HALF))
    return np.stack([base, *tiles])


def normalise(pixels: Tensor) -> Tensor:
    """uint8 (..., 48, 48, 3) to bfloat16 (..., 3, 48, 48) with (x / 255 - 0.5) / 0.5."""
    return pixels.movedim(-1, -3).to(torch.bfloat16).div_(127.5).sub_(1).contiguous()


def _owners(boxes: np.ndarray, side: int) -> np.ndarray:
    """For each patch of a (side, side) raster the index of its thing, or -1. ``boxes`` is (n, 4) in raster
    pixels.

    A patch that holds a thing's middle is that thing's; otherwise the largest overlap of at least 18 pixels
    wins.
    """
    edges = np.arange(side) * PATCH
    x0, y0, x1, y1 = (boxes[:, i, None] for i in range(4))
    across = np.clip(np.minimum(x1, edges + PATCH) - np.maximum(x0, edges), 0, None)
    down = np.clip(np.minimum(y1, edges + PATCH) - np.maximum(y0, edges), 0, None)
    middle_x = ((x0 + x1) / 2 // PATCH).astype(int) == np.arange(side)
    middle_y = ((y0 + y1) / 2 // PATCH).astype(int) == np.arange(side)
    overlap = down[:, :, None] * across[:, None, :] + 1000.0 * (middle_y[:, :, None] & middle_x[:, None, :])
    owner = overlap.argmax(0)
    return np.where(overlap.max(0) >= _LEAST_OVERLAP, owner, -1)


def targets(picture: Picture) -> np.ndarray:
    """int8 (5, 36, 4): two visual words, row and column of each patch's thing, within its view; -1 for none.

    The base view of a page is too coarse to read: its words are -2 (not taught), its rows and columns are.
    """
    things = np.asarray(
        [(VISUAL_WORDS[i.names[0]], VISUAL_WORDS[i.names[-1]], i.row, i.column) for i in picture.items] + [(-1,) * 4]
    )
    boxes = np.asarray([i.box for i in picture.items], float)
    base = things[_owners(boxes / 2, SIDE)].reshape(1, PATCHES, 4)
    fine = things[_owners(boxes, 2 * SIDE)]  # (12, 12, 4), over the four tiles
    scene = picture.kind == "scene"
    present = fine[..., 2] >= 0
    fine[..., 2][present] %= 2 if scene else LINES // 2
    fine[..., 3][present] %= 2 if scene else COLUMNS // 2
    if not scene:
        base[..., :2] = -2
    tiles = fine.reshape(2, SIDE, 2, SIDE, 4).transpose(0, 2, 1, 3, 4).reshape(4, PATCHES, 4)
    return np.concatenate([base, tiles]).astype(np.int8)


@dataclass
class Pool:
    """Rendered training pictures: ``pixels`` uint8 (n, 5, 48, 48, 3), ``labels`` int8 (n, 5, 36, 4)."""

    pictures: list[Picture]
    pixels: Tensor
    labels: Tensor

    def to(self, device: str) -> Pool:
        """Pixels and labels on a device."""
        return Pool(self.pictures, self.pixels.to(device), self.labels.to(device))


def render(kind: Kind, seeds: range, lines: tuple[int, int] = (3, LINES)) -> Pool:
    """Draw the pictures of some seeds, cut them into views, and label their patches."""
    pictures = [draw(kind, seed, lines) for seed in seeds]
    pixels = torch.from_numpy(np.stack([views(p.pixels) for p in pictures]))
    labels = torch.from_numpy(np.stack([targets(p) for p in pictures]))
    return Pool(pictures, pixels, labels)


def features(tower: Tower, pixel_values: Tensor) -> Tensor:
    """(n, 3, 48, 48) to (n, patches, width): the output of the last kept layer, without the post layer norm.

    A CLIP norms its embeddings first, and its class token is dropped, as in LLaVA-NeXT.
    """
    if isinstance(tower, CLIPVisionModel):
        hidden = tower.pre_layrnorm(tower.embeddings(pixel_values))
        return tower.encoder(inputs_embeds=hidden).last_hidden_state[:, 1:]
    return tower.encoder(inputs_embeds=tower.embeddings(pixel_values)).last_hidden_state


class Teacher(nn.Module):
    """The word vectors and the two layout heads that the tower is trained against; not shipped."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.words = nn.Parameter(torch.randn(len(VISUAL_WORDS), width) / width**0.5)
        self.bias = nn.Parameter(torch.full((len(VISUAL_WORDS),), -3.0))
        self.row, self.column = nn.Linear(width, LINES), nn.Linear(width, COLUMNS)

    def logits(self, feature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Words (n, 36, 42), rows (n, 36, 6) and columns (n, 36, 8) of features (n, 36, width)."""
        h = F.layer_norm(feature, feature.shape[-1:])
        return h @ self.words.T + self.bias, self.row(h), self.column(h)

    def loss(self, feature: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, float]]:
        """``feature`` (n, 36, width), ``labels`` int64 (n, 36, 4); also the accuracies by kind of target."""
        words, row, column = (x.float() for x in self.logits(feature))
        first, second = labels[..., 0], labels[..., 1]
        taught = first > -2
        spare = words.new_zeros(*words.shape[:-1], words.shape[-1] + 1)  # the last column takes what names nothing
        wanted = spare.scatter_(-1, torch.where(labels[..., :2] >= 0, labels[..., :2], words.shape[-1]), 1.0)[..., :-1]
        pairs = F.binary_cross_entropy_with_logits(words, wanted, reduction="none").sum(-1)
        there = labels[..., 2] >= 0
        loss = pairs[taught].mean() + 0.5 * (
            F.cross_entropy(row[there], labels[..., 2][there]) + F.cross_entropy(column[there], labels[..., 3][there])
        )
        with torch.no_grad():
            stats = {
                "row": (row.argmax(-1) == labels[..., 2])[there].float().mean().item(),
                "column": (column.argmax(-1) == labels[..., 3])[there].float().mean().item(),
            }
            spans = {"colour": (0, 8, first), "shape": (8, 16, second), "letter": (16, 42, first)}
            for name, (low, high, word) in spans.items():
                on = (word >= low) & (word < high)
                stats[name] = ((words[..., low:high].argmax(-1) + low) == word)[on].float().mean().item()
        return loss, stats


def is_block_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon takes the parameter: a matrix inside a layer."""
    return parameter.dim() == 2 and "layers." in name


def train(
    tower: SiglipVisionModel,
    pools: list[Pool],
    steps: int,
    batch: int,
    generator: torch.Generator,
    compiled: bool,
) -> Iterator[tuple[int, float, dict[str, float]]]:
    """Train the tower in place (it ends in bfloat16); yields (step, loss, accuracies) after every step."""
    teacher = Teacher(tower.config.hidden_size).to(tower.device)
    named = [*tower.named_parameters(), *((f"teacher.{n}", p) for n, p in teacher.named_parameters())]
    named = [(n, p) for n, p in named if "post_layernorm" not in n]
    trainer = MixedTrainer(named, is_block_matrix, muon=2e-3, adamw=2e-3)
    for layer in tower.encoder.layers if compiled else ():
        layer.compile(dynamic=False)
    for step in range(steps):
        share = batch // len(pools)
        chosen = [torch.randint(len(p.pictures), (share,), generator=generator) for p in pools]
        pixels = torch.cat([p.pixels[i] for p, i in zip(pools, chosen, strict=True)]).flatten(0, 1)
        labels = torch.cat([p.labels[i] for p, i in zip(pools, chosen, strict=True)]).flatten(0, 1).long()
        loss, stats = teacher.loss(features(tower, normalise(pixels)), labels)
        loss.backward()
        trainer.step(schedule(step / steps, step, decay_from=0.3))
        yield step, loss.item(), stats


@torch.no_grad()
def encode(tower: Tower, pixels: Tensor, batch: int = 64) -> Tensor:
    """uint8 (n, 5, 48, 48, 3) to bfloat16 (n, 5, patches, width)."""
    parts = [features(tower, normalise(p.flatten(0, 1))).unflatten(0, (len(p), VIEWS)) for p in pixels.split(batch)]
    return torch.cat(parts)
