"""LLaDA-V (You et al. 2025) on transformers' own Llama and SigLIP: only where it differs from them.

The language model is Llama with full attention; the encoder is SigLIP without its last layer, its final norm
and its pooling head; a two-layer projector maps every patch, and only then are tiles joined, trimmed, shrunk
and given their newlines (`layout`). Logits are not shifted. The published loader forces the encoder to
float16 and runs the decoding loop under float16 autocast; here everything runs in the one type that was
asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self, cast

import torch
from PIL import Image
from torch import Tensor, nn
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.siglip.configuration_siglip import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipVisionModel

from probe.attend import KERNELS
from probe.backbones import llada_v_config as names
from probe.backbones import prompt as text
from probe.backbones.anyres import Geometry, Tiling
from probe.backbones.base import Backbone, Features, GenerationDefaults, LayerModules, Prompt, SpecialIds, Views
from probe.backbones.checkpoint import Checkpoint, Shape, Tensors, check_names, choose_dtype
from probe.backbones.layout import Cells, Clip, Layout, Plain, Tiled
from probe.backbones.llada_v_modules import (
    EMBEDDING,
    HEAD,
    BidirectionalLlama,
    layer_modules,
    llama_config,
    projector,
    published_name,
    siglip_config,
)
from probe.backbones.pixels import frame_views, padded_views, tiled_views
from probe.backbones.pruned import join, pruned_prompt, views_of
from probe.backbones.splice import splice
from probe.backbones.text_tower import TextTower
from probe.backbones.tokens import Tokenizer, load_tokenizer, special_ids
from probe.cost import EncoderDims, encoder_dims
from probe.errors import ProbeError
from probe.site import ModelFacts, Role

ATTENTION = "sdpa"
"""The attention kernel when none is asked for."""


class LladaV(Backbone):
    """LLaDA-V behind the adapter contract. Without an encoder it is the language model alone."""

    defaults = GenerationDefaults(gen_length=128, block_length=128, steps=128, stop=(names.EOT.text,))
    checkpoint: Checkpoint | None = None

    def __init__(
        self,
        llama: LlamaConfig,
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
        self.geometry, self.newlines, self.max_length, self.tokenizer = (
            geometry,
            newlines,
            max_length,
            tokenizer,
        )
        self.model = BidirectionalLlama(llama)
        self.lm_head = nn.Linear(llama.hidden_size, llama.vocab_size, bias=False)
        self.vision_tower: Any = None
        if siglip is not None:
            self.vision_tower = SiglipVisionModel(siglip)
            self.mm_projector = projector(projector_type, siglip.hidden_size, llama.hidden_size)
            self.image_newline = nn.Parameter(torch.empty(llama.hidden_size))
        self._layers = layer_modules(self.model, "post_attention_layernorm")
        self._encoder_layers = layer_modules(self.vision_tower.encoder, "layer_norm2") if siglip else ()
        self.eval().requires_grad_(False)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        *,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "auto",
        attention: str | None = None,
        encoder_attention: str | None = None,
        vocab: str = "tokenizer",
        special: SpecialIds | None = None,
    ) -> Self:
        """Build on no device, then take every tensor from the checkpoint: none missing, none left over.

        `vocab="tokenizer"` cuts the embedding and the head to the tokenizer's length, as the published
        loader does; `"full"` keeps every row. `special` replaces the ids found in the tokenizer.
        """
        if vocab not in ("tokenizer", "full"):
            raise ProbeError(f"vocab={vocab!r}; known: tokenizer, full")
        config, vision = checkpoint.config, names.vision_settings(checkpoint)
        facts, tokenizer = names.facts_of(checkpoint), load_tokenizer(checkpoint.folder)
        rows = int(config["vocab_size"])
        if tokenizer is not None and len(tokenizer) > rows:
            what = f"the tokenizer has {len(tokenizer)} tokens, the model only {rows} rows"
            raise ProbeError(f"{checkpoint.folder}: {what}")
        kept = len(tokenizer) if tokenizer is not None and vocab == "tokenizer" else rows
        kind = attention or ATTENTION
        kind = KERNELS.get(kind, kind)
        with torch.device("meta"):
            model = cls(
                llama_config(config, kept, kind),
                siglip_config(vision, encoder_attention or kind) if vision else None,
                facts=replace(facts, vocabulary=kept),
                special=special_ids(tokenizer, special, kept, checkpoint.source),
                geometry=names.tower_geometry(config, vision) if vision else None,
                projector_type=str(config.get("mm_projector_type", "linear")),
                newlines=str(config.get("mm_newline_position", "one_token")),
                max_length=config.get("tokenizer_model_max_length"),
                tokenizer=tokenizer,
                source=checkpoint.source,
                revision=checkpoint.fingerprint,
            )
        with checkpoint.tensors(str(device)) as weights:
            stored = weights.read(EMBEDDING, 1).dtype if EMBEDDING in weights.shapes else torch.float32
            model._take(weights, checkpoint, rows, choose_dtype(dtype, stored, torch.device(device)))
        model.defaults = replace(cls.defaults, **names.generation_lengths(checkpoint.folder))
        model.checkpoint = checkpoint
        return model

    def _take(self, weights: Tensors, checkpoint: Checkpoint, rows: int, dtype: torch.dtype) -> None:
        """Put the checkpoint's tensors in, cut to the vocabulary in use, and compute the buffers."""
        own = self.state_dict()
        tied = bool(checkpoint.config.get("tie_word_embeddings")) and HEAD not in weights.shapes
        published = {name: EMBEDDING if tied and name == HEAD else published_name(name) for name in own}
        cut = {EMBEDDING, HEAD}
        expected: dict[str, Shape] = {}
        for name, key in published.items():
            shape = tuple(own[name].shape)
            expected[key] = (rows, *shape[1:]) if key in cut else shape
        check_names(expected, weights.shapes, checkpoint.folder)
        values = {
            name: weights.read(key, own[name].shape[0] if key in cut else None).to(dtype)
            for name, key in published.items()
        }
        self.load_state_dict(values, assign=True)
        device = self.device
        self.model.rotary_emb = LlamaRotaryEmbedding(self.model.config).to(device)
        if self.vision_tower is not None:
            patches = self.vision_tower.embeddings
            patches.position_ids = torch.arange(patches.num_positions, device=device)[None]
        self.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of weights and activations."""
        return self.lm_head.weight.dtype

    @property
    def lm(self) -> BidirectionalLlama:
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
        return cast(Tensor, self.model.embed_tokens(ids))

    def head(self, hidden: Tensor) -> Tensor:
        """Final-normed rows to float32 logits; the product itself is in the model's type."""
        return cast(Tensor, self.lm_head(hidden)).float()

    @torch.no_grad()
    def vision_features(self, pixels: Tensor) -> Tensor:
        """`(views, 3, tile, tile)` to `(views, patches, encoder width)`: the last used layer, not normed."""
        tower = self._tower()
        patches = tower.embeddings(pixels.to(self.device, self.dtype))
        return cast(Tensor, tower.encoder(inputs_embeds=patches).last_hidden_state)

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
            tower = self.__dict__["_text"] = TextTower(self.checkpoint, self.device, self.dtype)
        return cast(TextTower, tower)

    def text_space(self, hidden: Tensor) -> Tensor:
        """SigLIP's final norm on patch features; its image and text halves share their width."""
        return cast(Tensor, self._tower().post_layernorm(hidden))

    @torch.no_grad()
    def encode_views(self, pixels: Tensor) -> Tensor:
        """`(views, 3, tile, tile)` to projected features `(views, patches, width)`."""
        return cast(Tensor, self.mm_projector(self.vision_features(pixels)))

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
        return tuple(Plain(geometry, *image.size) for image in images)

    def views(self, images: Sequence[Image.Image]) -> Views:
        """A base view and tiles of one picture, or one padded square for each of several."""
        return views_of(self._layouts(images))

    def encode_video(self, frames: Sequence[Image.Image]) -> Features:
        """Frames of one clip, pooled by two, separated as the config says; one place in the question."""
        if not frames:
            raise ProbeError("a clip without frames")
        geometry = self._geometry()
        clip = Clip(geometry, len(frames), self.newlines)
        return Features(self.encode_views(frame_views(frames, geometry.tile)), (clip,))

    def encode_flops(self, features: Features) -> float:
        """Patch embedding, the kept layers and the projector, for every view."""
        return float(self.encoder_cost.encode(features.projected.shape[0]))

    @property
    def encoder_cost(self) -> EncoderDims:
        """Sizes of the kept layers of SigLIP and of the projector."""
        return encoder_dims(self._tower().config, self.facts.width)

    @torch.no_grad()
    def lay_out(self, features: Features) -> tuple[list[Tensor], Cells]:
        """Visual tokens `(tokens, width)` of every picture, and the description of all of them in order."""
        layouts = cast(Sequence[Layout], features.layout)
        tokens, cells, view, picture = [], [], 0, 0
        for layout in layouts:
            tokens.append(layout.tokens(features.projected[view : view + layout.views], self.image_newline))
            own = layout.cells()
            cells.append(Cells(own.newline, own.box, own.view + view, own.picture + picture))
            view, picture = view + layout.views, picture + layout.pictures
        parts = zip(*((c.newline, c.box, c.view, c.picture) for c in cells), strict=True)
        return tokens, Cells(*(torch.cat(part) for part in parts))

    @torch.no_grad()
    def assemble(self, question: str, features: Features | None, *, think: bool = False) -> Prompt:
        """Template, visual tokens and question as one sequence; with pictures, cut to the config's length."""
        tokenizer = self._tokenizer()
        layouts = cast(Sequence[Layout], features.layout) if features else ()
        asked = text.ask(question, len(layouts), think=think)
        prompt = tokenizer.render(text.messages([(text.USER, asked)]))
        if features is None:
            ids = tokenizer.encode(prompt)
            before = tokenizer.encode(prompt[: prompt.rfind(asked.strip())])
            return self.without_pictures(ids, text.shared_prefix(before, ids))
        ids = text.to_ids(prompt, tokenizer.encode, tokenizer.bos)
        return self.with_pictures([i for i in ids if i != tokenizer.pad], features)

    @torch.no_grad()
    def with_pictures(self, ids: Sequence[int], features: Features) -> Prompt:
        """A sequence from ids in which `splice.IMAGE` stands for each picture."""
        row = torch.tensor([list(ids)], device=self.device)
        if features.survivors is not None:
            joined = join(features)
            done = splice(row, None, joined.tokens, self.embed, limit=self.max_length)
            count = sum(layout.count for layout in cast(Sequence[Layout], features.layout))
            return pruned_prompt(done, features, joined, ids, count)
        tokens, cells = self.lay_out(features)
        done = splice(row, None, tokens, self.embed, limit=self.max_length)
        used = done.visual[0]
        where = used >= 0
        seen = used[where].to("cpu")
        first = int(where.nonzero()[0]) if bool(where.any()) else used.shape[0]
        role = torch.full_like(used, Role.QUESTION, dtype=torch.int8)
        role[:first] = Role.SYSTEM
        newline = cells.newline[seen].to(role.device)
        role[where] = torch.where(newline, int(Role.NEWLINE), int(Role.VISUAL)).to(torch.int8)
        visual = torch.where(where, where.cumsum(0) - 1, -1)
        box, view, shown = (part[seen].to(self.device) for part in (cells.box, cells.view, cells.picture))
        return Prompt(done.embeds[0], done.ids[0], role, visual, box, view, shown)

    @torch.no_grad()
    def without_pictures(self, ids: Sequence[int], system: int) -> Prompt:
        """A sequence of text alone, the first `system` positions of which belong to the template."""
        row = torch.tensor(list(ids), device=self.device)
        role = torch.full_like(row, Role.QUESTION, dtype=torch.int8)
        role[:system] = Role.SYSTEM
        none = torch.zeros(0, dtype=torch.int16, device=self.device)
        box = torch.zeros(0, 4, device=self.device)
        return Prompt(self.embed(row), row, role, torch.full_like(row, -1), box, none, none)

    def tokenize(self, text: str) -> list[int]:
        """Ids of a bare string; the tokenizer's own special tokens are recognised, none are added."""
        return self._tokenizer().encode_bare(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The answer: special tokens left out, one trailing full stop dropped, outer blanks dropped."""
        return text.clean(self._tokenizer().decode(ids))

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
