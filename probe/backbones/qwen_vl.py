"""Qwen2.5-VL (Bai et al., arXiv 2502.13923) on transformers' own class: patches at a picture's own size, M-RoPE.

A picture keeps its shape and about its size, within a budget of pixels; every square of patches is one visual token.
There are no newlines: where a token stands in its picture is said by rotary positions on three axes. In a clip a token
lasts two frames, and the first axis says when.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self, cast

import torch
from PIL import Image
from torch import Tensor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

from probe.backbones import dimple_prompt as axes
from probe.backbones import qwen_vl_config as names
from probe.backbones.autoregressive import Autoregressive
from probe.backbones.base import Features, LayerModules
from probe.backbones.checkpoint import Checkpoint
from probe.backbones.dimple_modules import encode_flops, tower_layers
from probe.backbones.dimple_pixels import patches_of, patches_of_clip
from probe.backbones.layout import Cells
from probe.backbones.placement import device_of
from probe.errors import ProbeError
from probe.site import ModelFacts

FPS = 2.0
"""Frames per second at which clips are sampled, unless said otherwise, as the model was trained."""


class QwenVL(Autoregressive):
    """Qwen2.5-VL behind the adapter contract."""

    native_class = Qwen2_5_VLForConditionalGeneration
    ids_batch_axis = 1
    preprocessing: names.QwenPixels
    fps: float

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        fps: float = FPS,
        **options: Any,
    ) -> Self:
        """As every autoregressive model; `min_pixels`, `max_pixels` replace the checkpoint's budget of pixels.

        The budget is that of a picture and of a frame. `fps`: how many frames of a clip are a second of it.
        """
        if not fps > 0:
            raise ProbeError(f"fps={fps}; frames per second are more than 0")
        model = super().from_checkpoint(checkpoint, **options)
        model.fps = fps
        model.preprocessing = names.preprocessing(checkpoint, min_pixels=min_pixels, max_pixels=max_pixels)
        return model

    @classmethod
    def facts_of(cls, checkpoint: Checkpoint) -> ModelFacts:
        """Sizes from config.json alone."""
        return names.facts_of(checkpoint)

    def configure(self, checkpoint: Checkpoint) -> None:
        """How pictures become patches, and the encoder's blocks."""
        self.preprocessing = names.preprocessing(checkpoint)
        self._encoder_layers = tower_layers(self.native.model.visual)

    @property
    def encoder_layers(self) -> Sequence[LayerModules]:
        """The encoder's blocks, whose rows are patches in window order (`dimple_modules.windows`)."""
        return self._encoder_layers

    @property
    def picture_id(self) -> int:
        """The id of `<|image_pad|>`."""
        return cast(int, self.native.config.image_token_id)

    @property
    def clip_id(self) -> int:
        """The id of `<|video_pad|>`."""
        return cast(int, self.native.config.video_token_id)

    def is_clip(self, layouts: Sequence[Any]) -> bool:
        """Whether the only layout is that of a clip."""
        return any(isinstance(layout, axes.ClipGrid) for layout in layouts)

    def place(self, *, clip: bool = False) -> str:
        """`<|vision_start|><|image_pad|><|vision_end|>`, as the tokenizer spells them; a clip's has `<|video_pad|>`."""
        config, seen = self.native.config, self.clip_id if clip else self.picture_id
        ids = [config.vision_start_token_id, seen, config.vision_end_token_id]
        return "".join(self._tokenizer().strings(ids))

    def position_ids(self, position: Tensor) -> Tensor:
        """`(batch, length, 3)` to `(3, batch, length)`; `(batch, length)`, the same on every axis, stays."""
        return position.movedim(-1, 0) if position.ndim == 3 else position

    def positions(self, ids: Sequence[int], layouts: Sequence[Any]) -> Tensor:
        """`(P, 3)`: text counts up on all axes; a picture stands at one time, and its tokens at rows and columns."""
        return axes.positions(ids, layouts).to(self.device)

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> Features:
        """All pictures in one pass of the encoder: `projected (1, tokens, width)`, one picture after the other."""
        if not images:
            raise ProbeError("no picture to encode; leave the features out for a question without pictures")
        pixels, grid = patches_of(images, self.preprocessing)
        merge = self.preprocessing.merge
        grids = tuple(axes.Grid(int(h) // merge, int(w) // merge) for _, h, w in grid)
        return Features(self._merged(pixels, grid), grids)

    @torch.no_grad()
    def encode_video(self, frames: Sequence[Image.Image]) -> Features:
        """The frames of one clip, two to a token: `projected (1, tokens, width)`, one grid after the other."""
        if not frames:
            raise ProbeError("a clip without frames")
        pixels, grid = patches_of_clip(frames, self.preprocessing)
        rule, vision = self.preprocessing, self.native.config.vision_config
        rows, columns = (int(n) // rule.merge for n in grid[0, 1:])
        interval = vision.tokens_per_second * (rule.temporal / self.fps)
        clip = axes.ClipGrid(rows, columns, len(frames), rule.temporal, interval)
        return Features(self._merged(pixels, grid), (clip,))

    def _merged(self, pixels: Tensor, grid: Tensor) -> Tensor:
        tower: Any = self.native.model.visual
        there = device_of(tower)
        return cast(Tensor, tower(pixels.to(there, self.dtype), grid_thw=grid.to(there)).pooler_output[None])

    def encode_flops(self, features: Features) -> float:
        """The encoder with its windows, and the merger."""
        merge = self.preprocessing.merge
        grids = [(g.times, g.rows * merge, g.columns * merge) for g in cast(Sequence[axes.Grid], features.layout)]
        return encode_flops(self.native.config.vision_config, torch.tensor(grids), 0)  # nothing behind the merger

    @torch.no_grad()
    def lay_out(self, features: Features) -> tuple[list[Tensor], Cells]:
        """Visual tokens `(tokens, width)` of every picture, and the description of all of them in order."""
        grids = cast(Sequence[axes.Grid], features.layout)
        tokens = features.projected[0].split([grid.count for grid in grids])
        return [t.to(self.device) for t in tokens], axes.cells_of(grids, range(len(grids)))
