"""LLaVA-NeXT (Liu et al. 2024) on transformers' own class: CLIP tiles with newlines before a causal decoder.

A picture is cut into tiles beside a base view of the whole; CLIP's class token is dropped, every patch projected, and
only then are tiles joined, trimmed and given their newlines (`layout`). Several pictures are tiled each by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn
from transformers.models.llava_next.modeling_llava_next import LlavaNextForConditionalGeneration

from probe.backbones import llava_next_config as names
from probe.backbones import sequence
from probe.backbones.anyres import Tiling
from probe.backbones.autoregressive import Autoregressive
from probe.backbones.base import Features, LayerModules, Views
from probe.backbones.checkpoint import Checkpoint
from probe.backbones.layout import Cells, Layout, Tiled
from probe.backbones.pixels import cut, normalise, rgb
from probe.backbones.placement import device_of
from probe.backbones.pruned import views_of
from probe.backbones.text_tower import ClipTextTower
from probe.cost import EncoderDims, encoder_dims
from probe.errors import ProbeError
from probe.site import ModelFacts

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class LlavaNext(Autoregressive):
    """LLaVA-NeXT behind the adapter contract."""

    native_class = LlavaNextForConditionalGeneration

    @classmethod
    def facts_of(cls, checkpoint: Checkpoint) -> ModelFacts:
        """Sizes from config.json alone."""
        names.check_strategy(checkpoint.config, checkpoint.source)
        return names.facts_of(checkpoint)

    def configure(self, checkpoint: Checkpoint) -> None:
        """Tiles, the normalisation of pixels, and the encoder without the layers that no feature comes from."""
        config, where = checkpoint.config, checkpoint.source
        self.checkpoint = checkpoint
        self.geometry = names.geometry(config, where)
        said = checkpoint.json("preprocessor_config.json") or {}
        self.mean, self.std = said.get("image_mean") or CLIP_MEAN, said.get("image_std") or CLIP_STD
        pinpoints = said.get("image_grid_pinpoints")
        if pinpoints and names.geometry({**config, "image_grid_pinpoints": pinpoints}, where) != self.geometry:
            raise ProbeError(f"{where}: `image_grid_pinpoints` of preprocessor_config.json differs from the config's")
        tower = self.native.model.vision_tower
        depth = len(tower.encoder.layers)
        self.feature_layers = names.feature_layers(config, depth, where)
        tower.encoder.layers = tower.encoder.layers[: max(self.feature_layers)]
        self._encoder_layers = tuple(
            LayerModules(x, x.self_attn, x.layer_norm2, x.mlp, x.layer_norm1) for x in tower.encoder.layers
        )

    @property
    def encoder_layers(self) -> Sequence[LayerModules]:
        """CLIP's layers in use, first to last."""
        return self._encoder_layers

    @property
    def picture_id(self) -> int:
        """The id of `<image>`."""
        return cast(int, self.native.config.image_token_id)

    def place(self, *, clip: bool = False) -> str:
        """`<image>`, as the tokenizer spells it."""
        return self._tokenizer().strings([self.picture_id])[0]

    @torch.no_grad()
    def vision_features(self, pixels: Tensor) -> Tensor:
        """`(views, 3, tile, tile)` to `(views, patches, encoder width)`: not normed, without the class token.

        Where features come from several layers, their widths add up.
        """
        tower: Any = self.native.model.vision_tower
        there = device_of(tower.embeddings.patch_embedding)
        hidden = tower.pre_layrnorm(tower.embeddings(pixels.to(there, self.dtype)))
        states = {0: hidden}
        for number, modules in enumerate(self._encoder_layers, 1):
            hidden = modules.layer(hidden, attention_mask=None)
            if number in self.feature_layers:
                states[number] = hidden
        return torch.cat([states[i] for i in self.feature_layers], -1)[:, 1:]

    @torch.no_grad()
    def encode_views(self, pixels: Tensor) -> Tensor:
        """`(views, 3, tile, tile)` to projected features `(views, patches, width)`."""
        return cast(Tensor, self.native.model.multi_modal_projector(self.vision_features(pixels)))

    def encode_images(self, images: Sequence[Image.Image]) -> Features:
        """Every picture as a base view and tiles."""
        if not images:
            raise ProbeError("no picture to encode; leave the features out for a question without pictures")
        tilings = [Tiling(self.geometry, *image.size) for image in images]
        squares = [s for image, tiling in zip(images, tilings, strict=True) for s in cut(rgb(image), tiling)]
        return Features(self.encode_views(normalise(squares, self.mean, self.std)), tuple(map(Tiled, tilings)))

    def views(self, images: Sequence[Image.Image], *, clip: bool = False) -> Views:
        """A base view and tiles of every picture."""
        if clip:
            return super().views(images, clip=True)
        return views_of([Tiled(Tiling(self.geometry, *image.size)) for image in images])

    @property
    def projector(self) -> nn.Module:
        """The projector of every patch."""
        return cast(nn.Module, self.native.model.multi_modal_projector)

    @property
    def encoder_cost(self) -> EncoderDims:
        """Sizes of CLIP's layers in use, its class token, and the projector, which takes all feature layers at once."""
        vision = self.native.config.vision_config
        dims = replace(encoder_dims(vision, self.facts.width), layers=len(self._encoder_layers), lead=1)
        return replace(dims, inner=len(self.feature_layers) * vision.hidden_size)

    def encode_flops(self, features: Features) -> float:
        """Patch embedding, the layers in use and the projector, for every view; the class token is a row too."""
        return float(self.encoder_cost.encode(features.projected.shape[0]))

    def embed_text(self, text: str) -> Tensor:
        """`(d,)`: a text through CLIP's text half, if the checkpoint's folder holds one; loaded when first used."""
        return self._text_tower()(text)

    def text_flops(self, text: str) -> int:
        """Executed FLOPs of `embed_text`."""
        return self._text_tower().flops(text)

    @torch.no_grad()
    def text_space(self, hidden: Tensor) -> Tensor:
        """CLIP's final norm and visual projection on patch features."""
        tower: Any = self.native.model.vision_tower
        return self._text_tower().project(tower.post_layernorm(hidden))

    def text_space_flops(self, n: int) -> int:
        """Executed FLOPs of `text_space` for n patches."""
        return self._text_tower().project_flops(n)

    def _text_tower(self) -> ClipTextTower:
        if not self.facts.text_tower:
            raise ProbeError(f"{self.source} has no text tower")
        if len(self.feature_layers) > 1:
            raise ProbeError(
                f"{self.source}: its features come from several layers of CLIP, which have no place in its text space"
            )
        tower = self.__dict__.get("_text")  # no submodule: its weights are none of the checkpoint's own
        if tower is None:
            vision: Any = self.native.model.vision_tower
            width, kernel = vision.config.hidden_size, vision.config._attn_implementation
            dtype = next(vision.parameters()).dtype
            tower = ClipTextTower(self.checkpoint, width, self.device, dtype, kernel)
            self.__dict__["_text"] = tower
        return cast(ClipTextTower, tower)

    @torch.no_grad()
    def lay_out(self, features: Features) -> tuple[list[Tensor], Cells]:
        """Visual tokens `(tokens, width)` of every picture, and the description of all of them in order."""
        layouts = cast(Sequence[Layout], features.layout)
        newline = self.native.model.image_newline.to(features.projected.device)
        tokens = sequence.lay_out(layouts, features.projected, newline)
        return [t.to(self.device) for t in tokens], sequence.describe(layouts)
