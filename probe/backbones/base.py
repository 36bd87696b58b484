"""The adapter contract: what a backbone must say about itself for every probe and recipe to run on it.

An adapter says only where its model differs: how a question and pictures become a sequence with roles, where the
decoder's modules are, which ids are special, and how rows of hidden states become logits. It knows nothing of
probes, recipes, the loop or traces.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from probe.backbones.rows import Rows
from probe.cost import DecoderDims, EncoderDims, decoder_dims
from probe.errors import ProbeError
from probe.site import ModelFacts, Role


@dataclass(frozen=True)
class Prompt:
    """One sample as the language model meets it: embeddings with a role for every position.

    `embeds (P, width)`, `ids (P,)` int64 (negative where no token stands), `role (P,)` int8 of `Role`,
    `visual (P,)` int64: the index 0..V-1 within the visual span (newlines included), -1 elsewhere.
    `box (V, 4)` float32: what each visual token sees, as (x0, y0, x1, y1) fractions of its picture, NaN for newlines;
    `view (V,)` int16: 0 for the first picture's base view, then its tiles, then the next picture's views.
    `picture (V,)` int16: which picture. Text-only prompts have V = 0. `position (P,)` or `(P, axes)` int64 are rotary
    positions (None: 0..P-1); answer slots continue at `next_position` on every axis (None: after the largest).

    Where probes acted in the encoder, V counts every patch of every view and the tokens that were added to them, so
    most of them stand nowhere: `fate (V,)` uint8 of `Fate` says what became of each, and `unpruned` how many visual
    tokens the sample would have had otherwise.
    """

    embeds: Tensor
    ids: Tensor
    role: Tensor
    visual: Tensor
    box: Tensor
    view: Tensor
    picture: Tensor
    position: Tensor | None = None
    fate: Tensor | None = None
    unpruned: int | None = None
    next_position: int | None = None

    @property
    def n_visual(self) -> int:
        """Tokens of the visual span, newlines included; with `fate`, those that never reached it as well."""
        return self.box.shape[0]

    @property
    def n_original(self) -> int:
        """Visual tokens that the sample has before anything is removed: what a share of them is a share of."""
        return self.n_visual if self.unpruned is None else self.unpruned

    @property
    def visual_role(self) -> Tensor:
        """`(V,)` int8: the role of every visual token, also of those that stand nowhere."""
        role = torch.full((self.n_visual,), int(Role.VISUAL), dtype=torch.int8, device=self.role.device)
        there = self.visual >= 0
        role[self.visual[there]] = self.role[there]
        return role


@dataclass(frozen=True)
class Views:
    """How a sample's pictures are cut into views, known before anything is encoded.

    `box (views, patches, 4)` float32: what each patch sees, as fractions of its picture (without area if only padding);
    `picture (views,)` int16; `base[v]`: whether a view shows its picture whole (else it is a tile of it); `place[v]`:
    which of the prompt's places for pictures the view goes to. Without pruning `tokens[p]` visual tokens would stand
    at place p, and `token (views, patches)` int64 says which of them shows what a patch sees.
    """

    box: Tensor
    picture: Tensor
    base: tuple[bool, ...]
    place: tuple[int, ...]
    token: Tensor
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Survivors:
    """What is left of the patches after probes acted in the encoder.

    A token's number is that of the patch it began as, `view * patches + patch`; tokens that were added count on from
    there, T in all. `alive[v] (n,)` int64: the numbers of a view's tokens as they stand, which the first n rows of its
    `Features.projected` hold (padding behind). `holder (views * patches,)` int64: the token that each patch is in now:
    itself, the one it was merged into, or -1. `view (T,)` int64; `size (T,)` float32: original patches behind a token;
    `fate (T,)` uint8 of `Fate`: what became of every number (kept: it is alive). `compact` says that the sequence gets
    fresh positions, as if it had been so short from the start; else everything keeps the positions of the unpruned one.
    """

    alive: tuple[Tensor, ...]
    holder: Tensor
    view: Tensor
    size: Tensor
    fate: Tensor
    views: Views
    compact: bool = False

    def to(self, device: torch.device) -> Survivors:
        """The same on another device."""
        alive = tuple(a.to(device) for a in self.alive)
        held, view, size, fate = (x.to(device) for x in (self.holder, self.view, self.size, self.fate))
        return Survivors(alive, held, view, size, fate, self.views, self.compact)


@dataclass(frozen=True)
class Features:
    """What the image encoder made of a sample's pictures: `projected (views, patches, width)` and their layout.

    Encoded once per sample; `layout` is the adapter's own business (tile grids, sizes), opaque to others. Where probes
    removed patches in the encoder the grid of patches is gone, and `survivors` says which tokens stand there.
    """

    projected: Tensor
    layout: object
    survivors: Survivors | None = None


def add(residual: Tensor, mlp: Tensor, ids: Tensor) -> Tensor:
    """How most layers join the residual stream and their MLP's output."""
    return residual + mlp


@dataclass(frozen=True)
class LayerModules:
    """The modules of one decoder (or encoder) layer that hooks attach to."""

    layer: nn.Module
    attention: nn.Module
    pre_mlp_norm: nn.Module
    mlp: nn.Module
    pre_attention_norm: nn.Module | None = None
    kind: int = 0
    """Which of the masks that `Backbone.sees` returns the layer takes."""
    tables: slice = field(default_factory=lambda: slice(None), hash=False)
    """Which part of the rotary tables (`Backbone.rotary`) the layer takes."""
    join: Callable[[Tensor, Tensor, Tensor], Tensor] = add
    """`join(residual, MLP output, position ids)`: the layer's output."""


@dataclass(frozen=True)
class SpecialIds:
    """Token ids that the decoding rule needs. `suppressed` are never predicted at masked slots."""

    mask: int
    eos: int
    stop: int
    suppressed: tuple[int, ...]


@dataclass(frozen=True)
class GenerationDefaults:
    """Settings of the denoising loop when neither the recipe nor the sample says otherwise."""

    gen_length: int = 128
    block_length: int = 128
    steps: int = 128
    stop: tuple[str, ...] = field(default=())
    stop_without_pictures: bool = False
    """Whether `stop` also ends answers to questions without a picture (in LLaDA-V's published code it does not)."""
    unmask: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"confidence": {}})
    """Name of the unmasking policy -> its settings, as a recipe writes `generate.unmask`."""
    cache: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"none": {}})
    """Name of the caching policy -> its settings, as a recipe writes `generate.cache`."""


class Backbone(ABC, nn.Module):
    """A discrete-diffusion multimodal LLM behind one face. Weights in eval mode, no gradients."""

    shift: int = 0
    """The logits of row p - shift predict slot p (1: Dream, Dimple, autoregressive models)."""
    shift_varies: bool = False
    """Whether checkpoints of this class differ in it, so that the class alone does not tell."""
    causal: bool = False
    """Whether a row sees only itself and what stands before it."""
    reads_rows: bool = False
    """Whether `sees` or `row_ids` look at pictures and open rows; else these are not worked out."""
    ids_batch_axis: int = 0
    """Which axis of `position_ids` counts the samples."""
    batches: bool = True
    """Whether samples of a right-padded batch come out as they would alone."""
    home: torch.device | None = None
    """Where the sequence is looked after, if the model is spread over devices (`placement`); None: with the weights."""
    load_options: Mapping[str, Any] = MappingProxyType({})
    """The adapter's own options that it was loaded with (`backbones.load`)."""
    facts: ModelFacts
    special: SpecialIds
    defaults: GenerationDefaults
    source: str
    """Where the weights came from (folder or Hub id), for the trace."""
    revision: str
    """A fingerprint of the weights (the Hub commit, or a sha256 of headers, sizes and samples of the data)."""

    @property
    @abstractmethod
    def lm(self) -> nn.Module:
        """The decoder without its head: `lm(inputs_embeds=, position_ids=, attention_mask=, past_key_values=)`.

        It returns an output whose `last_hidden_state` is final-normed. `attention_mask` None means that nothing is
        hidden (a causal model stays causal); `(batch, key)` is true at real keys; 4-D is bool (true: may attend) or
        additive float. `past_key_values` is None or has `update(key, value, layer_idx)`, which returns the keys (after
        rotary) and values to attend to, and `get_seq_length()`.
        """

    @property
    @abstractmethod
    def layers(self) -> Sequence[LayerModules]:
        """The decoder's layers, first to last."""

    @property
    def device(self) -> torch.device:
        """Where embeddings come out and logits are wanted; of a model that is spread over devices, its `home`."""
        return self.home or next(self.lm.parameters()).device

    def used_directly(self) -> Sequence[str]:
        """Parameters that are read without their module's forward, so that they cannot be fetched when needed."""
        return [name for name, _ in self.named_parameters(recurse=False)]

    @property
    @abstractmethod
    def final_norm(self) -> nn.Module:
        """The norm after the last layer."""

    @property
    @abstractmethod
    def encoder_layers(self) -> Sequence[LayerModules]:
        """The image encoder's layers in use, first to last."""

    @property
    def projector(self) -> nn.Module | None:
        """The module between encoder and language model, called once with all views; None: no probe acts around it."""
        return None

    @property
    def encoder_cost(self) -> EncoderDims | None:
        """Sizes that FLOPs of the encoder are counted from, layer by layer; None where no probe acts in it."""
        return None

    def views(self, images: Sequence[Image.Image], *, clip: bool = False) -> Views:
        """How `encode_images`, or of a `clip` `encode_video`, cuts these pictures into views.

        Needed where probes act in the encoder.
        """
        raise ProbeError(
            f"{self.facts.name} does not say how pictures are cut into views, so no probe acts in its encoder"
        )

    def embed_text(self, text: str) -> Tensor:
        """`(d,)`: a text in the space that it shares with `text_space`. Only with a text tower."""
        raise ProbeError(f"{self.facts.name} has no text tower")

    def text_flops(self, text: str) -> int:
        """Executed FLOPs of `embed_text`."""
        return 0

    def text_space(self, hidden: Tensor) -> Tensor:
        """Patch features `(n, encoder width)` of the encoder's output in the space of its text tower, `(n, d)`."""
        raise ProbeError(f"{self.facts.name} has no text tower")

    def text_space_flops(self, n: int) -> int:
        """Executed FLOPs of `text_space` for n patches."""
        return 0

    @abstractmethod
    def rotary(self, hidden: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """`(cos, sin)`, each `(batch, length, head size)`, at `position (batch, length[, axes])`."""

    def position_ids(self, position: Tensor) -> Tensor:
        """`(batch, length[, axes])` positions as `lm` takes them in `position_ids`."""
        return position

    def row_ids(self, rows: Rows) -> Tensor:
        """What `lm` and its layers get in `position_ids` for these rows; more than positions, if a model needs it."""
        return self.position_ids(rows.position)

    def sees(self, query: Rows, key: Rows) -> tuple[Tensor | None, ...]:
        """Who may attend to whom: one mask `(batch, 1, 1 or query, key)` bool per kind of layer; None: all to all."""
        real = None if key.real is None else key.real[:, None, None, :]
        if not self.causal or query.position.shape[1] == 1:
            return (real,)
        assert key.place is not None and query.place is not None
        before = key.place[:, None, None, :] <= query.place[:, None, :, None]
        return (before if real is None else before & real,)

    def condition(self, embeds: Tensor, previous: Tensor | None) -> Tensor:
        """Embeddings `(batch, c, width)` of slots that show noise, given their logits in an earlier pass, if any."""
        return embeds

    @cached_property
    def costs(self) -> DecoderDims:
        """What the decoder's layers and head cost (`probe.cost`)."""
        return decoder_dims(self.lm.config, self.facts.vocabulary)

    @abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings `(..., width)`."""

    @abstractmethod
    def head(self, hidden: Tensor) -> Tensor:
        """Final-normed rows `(..., width)` to float32 logits `(..., vocabulary)`."""

    @abstractmethod
    def encode_images(self, images: Sequence[Image.Image]) -> Features:
        """Preprocess, encode and project the pictures of one sample. The costly half of `encode`."""

    def encode_video(self, frames: Sequence[Image.Image]) -> Features:
        """Likewise, the frames of one clip, which has one place in the prompt. Raises where a model takes no clips."""
        raise ProbeError(f"{self.source} takes no clips; give the frames as pictures (`images`)")

    @abstractmethod
    def encode_flops(self, features: Features) -> float:
        """Executed FLOPs of `encode_images`: every view through encoder and projector (`probe.cost`)."""

    @abstractmethod
    def assemble(self, question: str, features: Features | None, *, think: bool = False) -> Prompt:
        """Lay out template, visual tokens and question as one sequence with roles."""

    @abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """Ids of a bare string (stop strings, suffixes, drafts): no template, no special tokens added."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The answer text of generated ids, as the model's own evaluation would clean it."""

    @torch.inference_mode()
    def encode(self, images: Sequence[Image.Image], question: str, *, think: bool = False) -> Prompt:
        """One sample to a `Prompt`: `assemble` after `encode_images`."""
        return self.assemble(question, self.encode_images(images) if images else None, think=think)
