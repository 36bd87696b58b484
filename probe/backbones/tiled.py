"""The LLaVA family: SigLIP views through a projector, laid out as tiles, before a bidirectional decoder.

What LLaDA-V and LaViDa have in common. A subclass says where it differs: the decoder's settings, the published
names of its tensors, the special ids, the wording of a question, and how views are pooled and several pictures laid
out. The encoder's features are those of its last layer but one, not normed; the projector maps every patch, and only
then are tiles pooled, joined, trimmed, shrunk and given their newlines (`layout`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self, cast

import torch
from PIL import Image
from torch import Tensor, nn
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.siglip.configuration_siglip import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipVisionModel

from probe.backbones import prompt as text
from probe.backbones import tiled_config as small
from probe.backbones.anyres import Geometry, Tiling
from probe.backbones.base import Backbone, Features, GenerationDefaults, LayerModules, Prompt, SpecialIds, Views
from probe.backbones.bidirectional import BidirectionalLlama, BidirectionalQwen2, bidirectional
from probe.backbones.checkpoint import Checkpoint
from probe.backbones.layout import Clip, Layout, Plain, Tiled
from probe.backbones.pixels import frame_views, padded_views, tiled_views
from probe.backbones.placement import device_of
from probe.backbones.pruned import join, prompt_of_survivors, views_of
from probe.backbones.sequence import describe, lay_out, text_alone, with_pictures
from probe.backbones.siglip import layer_modules, projector
from probe.backbones.text_tower import TextTower
from probe.backbones.tiled_loading import load_tiled
from probe.backbones.tokens import Tokenizer
from probe.cost import EncoderDims, encoder_dims
from probe.errors import ProbeError
from probe.site import ModelFacts

TOWER = "model.vision_tower.vision_tower.vision_model."


class TiledBackbone(Backbone):
    """A model of the family behind the adapter contract. Without an encoder it is the language model alone."""

    checkpoint: Checkpoint | None = None

    def __init__(
        self,
        decoder: LlamaConfig | Qwen2Config,
        siglip: SiglipVisionConfig | None,
        *,
        facts: ModelFacts,
        special: SpecialIds,
        geometry: Geometry | None = None,
        projector_type: str = "mlp2x_gelu",
        newlines: str = "grid",
        max_length: int | None = None,
        tokenizer: Tokenizer | None = None,
        source: str = "",
        revision: str = "",
    ) -> None:
        super().__init__()
        self.facts, self.special, self.source, self.revision = facts, special, source, revision
        self.geometry, self.newlines, self.max_length, self.tokenizer = geometry, newlines, max_length, tokenizer
        self.model = bidirectional(decoder)
        self.lm_head = nn.Linear(decoder.hidden_size, decoder.vocab_size, bias=False)
        self.vision_tower: Any = None
        if siglip is not None:
            self.vision_tower = SiglipVisionModel(siglip)
            self.mm_projector = projector(projector_type, siglip.hidden_size, decoder.hidden_size)
            self.image_newline = nn.Parameter(torch.empty(decoder.hidden_size))
        self._layers = layer_modules(self.model, "input_layernorm", "post_attention_layernorm")
        self._encoder_layers = layer_modules(self.vision_tower.encoder, "layer_norm1", "layer_norm2") if siglip else ()
        self.eval().requires_grad_(False)

    # Where the models of the family differ

    @classmethod
    @abstractmethod
    def decoder_config(cls, config: Mapping[str, Any], vocabulary: int, attention: str) -> LlamaConfig | Qwen2Config:
        """transformers' settings of the decoder, from config.json."""

    @classmethod
    @abstractmethod
    def facts_of(cls, checkpoint: Checkpoint) -> ModelFacts:
        """Sizes from the small files alone."""

    @classmethod
    @abstractmethod
    def special_of(
        cls, checkpoint: Checkpoint, tokenizer: Tokenizer | None, given: SpecialIds | None, vocabulary: int
    ) -> SpecialIds:
        """The ids that decoding needs: those given, or what the checkpoint says."""

    @classmethod
    @abstractmethod
    def defaults_of(cls, checkpoint: Checkpoint) -> GenerationDefaults:
        """The decoder's settings when nothing else is asked for."""

    @classmethod
    def geometry_of(cls, config: Mapping[str, Any], vision: Mapping[str, Any]) -> Geometry:
        """Tiles, canvases and pooling."""
        return small.tower_geometry(config, vision)

    @classmethod
    def tied(cls, config: Mapping[str, Any]) -> bool:
        """Whether the head may be missing because it is the embedding."""
        return bool(config.get("tie_word_embeddings"))

    @abstractmethod
    def ask(self, question: str, pictures: int, *, think: bool) -> str:
        """The user's text, with places for the pictures."""

    def render(self, chat: Sequence[text.Message]) -> str:
        """A chat as the prompt string, by the checkpoint's own template."""
        return self._tokenizer().render(chat)

    @abstractmethod
    def clean(self, answer: str) -> str:
        """An answer as the model's evaluation reads it."""

    @classmethod
    def published_name(cls, name: str, config: Mapping[str, Any]) -> str:
        """The checkpoint's name of one of this class's own parameters."""
        if name.startswith("vision_tower."):
            return TOWER + name.removeprefix("vision_tower.")
        return f"model.{name}" if name.startswith(("mm_projector.", "image_newline")) else name

    def fill_buffers(self) -> None:
        """Compute what no checkpoint holds: rotary frequencies and the numbers of patches."""
        self.model.rotary_emb = self.rotary_table()
        if self.vision_tower is not None:
            patches = self.vision_tower.embeddings
            patches.position_ids = torch.arange(patches.num_positions, device=self.device)[None]

    def rotary_table(self) -> nn.Module:
        """The module that computes rotary angles, on the weights' device."""
        table: nn.Module = type(self.model.rotary_emb)(self.model.config)
        return table.to(self.device)

    def plain(self, width: int, height: int) -> Plain:
        """The layout of a picture that is not tiled: one padded square, its patches not pooled."""
        return Plain(replace(self._geometry(), pool=None), width, height)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, **options: Any) -> Self:
        """The model of a checkpoint; the options are those of `tiled_loading.load_tiled`."""
        return load_tiled(cls, checkpoint, **options)

    # The decoder

    @property
    def device(self) -> torch.device:
        """Where the weights are, or the sequence is looked after."""
        return self.home or self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of weights and activations."""
        return self.lm_head.weight.dtype

    @property
    def lm(self) -> BidirectionalLlama | BidirectionalQwen2:
        """The decoder without its head."""
        return self.model

    @property
    def layers(self) -> Sequence[LayerModules]:
        """The decoder's layers, first to last."""
        return self._layers

    @property
    def final_norm(self) -> nn.Module:
        """The norm after the last layer."""
        return self.model.norm

    @property
    def encoder_layers(self) -> Sequence[LayerModules]:
        """The encoder's layers in use; none without an encoder."""
        return self._encoder_layers

    @property
    def projector(self) -> nn.Module | None:
        """The projector; none without an encoder."""
        return None if self.vision_tower is None else self.mm_projector

    def rotary(self, hidden: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """`(cos, sin)`, each `(batch, length, head size)`, angles computed in float32."""
        cos, sin = self.model.rotary_emb(hidden, position)
        return cos, sin

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings `(..., width)`."""
        return cast(Tensor, self.model.embed_tokens(ids)).to(self.device)

    def head(self, hidden: Tensor) -> Tensor:
        """Final-normed rows to float32 logits; the product itself is in the model's type."""
        return cast(Tensor, self.lm_head(hidden)).float().to(self.device)

    # Pictures

    @torch.no_grad()
    def vision_features(self, pixels: Tensor) -> Tensor:
        """`(views, 3, tile, tile)` to `(views, patches, encoder width)`: the last used layer, not normed."""
        tower = self._tower()
        patches = tower.embeddings(pixels.to(self.device, self.dtype))
        return cast(Tensor, tower.encoder(inputs_embeds=patches).last_hidden_state)

    @torch.no_grad()
    def encode_views(self, pixels: Tensor) -> Tensor:
        """`(views, 3, tile, tile)` to projected features `(views, patches, width)`."""
        return cast(Tensor, self.mm_projector(self.vision_features(pixels))).to(self.device)

    def encode_images(self, images: Sequence[Image.Image]) -> Features:
        """One picture as a base view and tiles; several as one padded square each, as published."""
        layouts = self._layouts(images)
        if isinstance(layouts[0], Tiled):
            return Features(self.encode_views(tiled_views(images[0], layouts[0].tiling)), layouts)
        return Features(self.encode_views(padded_views(images, self._geometry().tile)), layouts)

    def _layouts(self, images: Sequence[Image.Image]) -> tuple[Layout, ...]:
        geometry = self._geometry()
        if not images:
            raise ProbeError("no picture to encode; leave the features out for a question without pictures")
        if len(images) == 1 and geometry.pinpoints:
            return (Tiled(Tiling(geometry, *images[0].size)),)
        return tuple(self.plain(*image.size) for image in images)

    def views(self, images: Sequence[Image.Image], *, clip: bool = False) -> Views:
        """A base view and tiles of one picture, one padded square for each of several, or the frames of a clip."""
        return views_of((self._clip(images),) if clip else self._layouts(images))

    def encode_video(self, frames: Sequence[Image.Image]) -> Features:
        """Frames of one clip, pooled by two, separated as the config says; one place in the question."""
        clip = self._clip(frames)
        return Features(self.encode_views(frame_views(frames, self._geometry().tile)), (clip,))

    def _clip(self, frames: Sequence[Image.Image]) -> Clip:
        if not frames:
            raise ProbeError("a clip without frames")
        return Clip(self._geometry(), len(frames), self.newlines)

    def encode_flops(self, features: Features) -> float:
        """Patch embedding, the kept layers and the projector, for every view."""
        return float(self.encoder_cost.encode(features.projected.shape[0]))

    @property
    def encoder_cost(self) -> EncoderDims:
        """Sizes of the kept layers of SigLIP and of the projector."""
        return encoder_dims(self._tower().config, self.facts.width)

    def embed_text(self, text: str) -> Tensor:
        """`(d,)`: a text through SigLIP's text half, if the checkpoint's folder holds one; loaded when first used."""
        return self._text_tower()(text)

    def text_flops(self, text: str) -> int:
        """Executed FLOPs of `embed_text`."""
        return self._text_tower().flops(text)

    def _text_tower(self) -> TextTower:
        if self.checkpoint is None or not self.facts.text_tower:
            raise ProbeError(f"{self.source} has no text tower")
        tower = self.__dict__.get("_text")  # no submodule: its weights are none of the checkpoint's own
        if tower is None:
            kernel = self._tower().config._attn_implementation
            tower = self.__dict__["_text"] = TextTower(self.checkpoint, device_of(self._tower()), self.dtype, kernel)
        return cast(TextTower, tower)

    def text_space(self, hidden: Tensor) -> Tensor:
        """SigLIP's final norm on patch features; its image and text halves share their width."""
        return cast(Tensor, self._tower().post_layernorm(hidden))

    # Prompts and answers

    @torch.no_grad()
    def assemble(self, question: str, features: Features | None, *, think: bool = False) -> Prompt:
        """Template, visual tokens and question as one sequence; with pictures, cut to the config's length."""
        tokenizer = self._tokenizer()
        layouts = cast(Sequence[Layout], features.layout) if features else ()
        asked = self.ask(question, len(layouts), think=think)
        prompt = self.render(text.messages([(text.USER, asked)]))
        if features is None:
            ids = tokenizer.encode(prompt)
            before = tokenizer.encode(prompt[: prompt.rfind(asked.strip())])
            return self.without_pictures(ids, text.shared_prefix(before, ids))
        ids = text.to_ids(prompt, tokenizer.encode, tokenizer.bos)
        return self.with_pictures([i for i in ids if i != tokenizer.pad], features)

    @torch.no_grad()
    def with_pictures(self, ids: Sequence[int], features: Features) -> Prompt:
        """A sequence from ids in which `splice.IMAGE` stands for each picture."""
        layouts = cast(Sequence[Layout], features.layout)
        if features.survivors is not None:
            left = features.survivors.to(self.device)
            return prompt_of_survivors(ids, left, join(features), self.embed, self.max_length)
        tokens = lay_out(layouts, features.projected, self.image_newline)
        return with_pictures(ids, tokens, describe(layouts), self.embed, limit=self.max_length)

    @torch.no_grad()
    def without_pictures(self, ids: Sequence[int], system: int) -> Prompt:
        """A sequence of text alone, the first `system` positions of which belong to the template."""
        return text_alone(ids, system, self.embed, self.device)

    def tokenize(self, text: str) -> list[int]:
        """Ids of a bare string; the tokenizer's own special tokens are recognised, none are added."""
        return self._tokenizer().encode_bare(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The answer: special tokens left out, then cleaned as the model's evaluation does."""
        return self.clean(self._tokenizer().decode(ids))

    def _tower(self) -> Any:
        if self.vision_tower is None:
            raise ProbeError(f"{self.source} is a language model alone: its config names no `mm_vision_tower`")
        return self.vision_tower

    def _geometry(self) -> Geometry:
        self._tower()
        return cast(Geometry, self.geometry)

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            files = "tokenizer.json and tokenizer_config.json"
            raise ProbeError(f"{self.source} has no tokenizer: put {files} beside its weights")
        return self.tokenizer
