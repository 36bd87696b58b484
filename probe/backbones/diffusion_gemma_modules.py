"""The modules of DiffusionGemma: transformers' own parts in one stack that is encoder and decoder at once.

The published model is an encoder, which reads the prompt and every finished canvas, and a decoder, which denoises
the canvas and sees the encoder's keys. They share all weights but one scalar per layer, and the encoder never sees the
canvas. So one pass of one stack over prompt, finished canvases and canvas, under the right mask, is both of them; a
row is *open* when it belongs to the canvas. A stored prefix is then an ordinary exact cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from probe.backbones.base import LayerModules
from probe.backbones.rows import Rows
from probe.cost import DecoderDims
from probe.errors import ProbeError

try:
    from transformers.models.diffusion_gemma import configuration_diffusion_gemma as settings
    from transformers.models.diffusion_gemma import modeling_diffusion_gemma as parts
except ImportError as error:  # the model came into transformers after the oldest version that the rest runs with
    raise ProbeError("the installed transformers has no DiffusionGemma; version 5.23 has") from error

SLIDING = "sliding_attention"
POSITION, PICTURE, OPEN = range(3)
"""What stands where on the last axis of a stack's `position_ids`."""

DECODER, ENCODER = "model.decoder.", "model.encoder."


def ids_of(rows: Rows) -> Tensor:
    """`(batch, length, 3)` int64: what the stack must know of each of its rows."""
    return torch.stack([rows.first_axis, rows.picture, rows.open.long()], -1)


def sees(query: Rows, key: Rows, windows: Sequence[int | None], pictures: bool = True) -> tuple[Tensor, ...]:
    """Who may attend to whom, `(batch, 1, query, key)` bool for every window size (None: no window).

    Closed rows are causal, see at most a window back, and (with `pictures`) see all soft tokens of their own picture.
    Open rows see each other and all that lies before the canvas, as far as a closed row in the place of the canvas's
    first would. What comes before goes by place (by position, where places are not given), windows go by position:
    rows that were removed do not let older ones in.
    """
    place, key_place, itself = query.place, key.place, None
    if place is None or key_place is None:
        place, key_place = query.first_axis, key.first_axis
    else:
        itself = key_place[:, None, :] == place[..., None]
    order, origin = _origin(place, query.open), _origin(query.first_axis, query.open)
    together = query.open[:, :, None] & key.open[:, None, :]
    if pictures:
        picture = query.picture[:, :, None]
        together = together | ((picture == key.picture[:, None, :]) & (picture >= 0))
    masks = []
    for window in windows:
        allowed = key_place[:, None, :] <= order
        if window is not None:
            allowed = allowed & (key.first_axis[:, None, :] > origin - window)
        allowed = allowed | together
        if key.real is not None:
            allowed = allowed & key.real[:, None, :]
            if itself is not None:  # a hidden row, too: kernels differ on rows that see nothing
                allowed = allowed | itself
        masks.append(allowed[:, None])
    return tuple(masks)


def _origin(count: Tensor, opened: Tensor) -> Tensor:
    """`(batch, length, 1)`: each row's own count; of open rows, that of the first of them."""
    far = torch.iinfo(torch.int64).max
    first = count.masked_fill(~opened, far).amin(1, keepdim=True)
    return torch.where(opened, first, count)[..., None]


class FeedForward(nn.Module):
    """What follows attention in a layer: a gated MLP and, beside it, the experts that the router chooses."""

    def __init__(self, config: Any, index: int) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.mlp = parts.DiffusionGemmaText4MLP(config, index)
        self.router = parts.DiffusionGemmaTextRouter(config)
        self.experts = parts.DiffusionGemmaTextExperts(config)
        self.pre_feedforward_layernorm = parts.DiffusionGemmaRMSNorm(width, eps=eps)
        self.pre_feedforward_layernorm_2 = parts.DiffusionGemmaRMSNorm(width, eps=eps)
        self.post_feedforward_layernorm_1 = parts.DiffusionGemmaRMSNorm(width, eps=eps)
        self.post_feedforward_layernorm_2 = parts.DiffusionGemmaRMSNorm(width, eps=eps)
        self.post_feedforward_layernorm = parts.DiffusionGemmaRMSNorm(width, eps=eps)

    def forward(self, hidden: Tensor) -> Tensor:
        """`(batch, length, width)` of the residual stream to what is added to it."""
        dense = self.post_feedforward_layernorm_1(self.mlp(self.pre_feedforward_layernorm(hidden)))
        flat = hidden.reshape(-1, hidden.shape[-1])
        _, weights, chosen = self.router(flat)
        sparse = self.experts(self.pre_feedforward_layernorm_2(flat), chosen, weights).reshape(hidden.shape)
        out = self.post_feedforward_layernorm(dense + self.post_feedforward_layernorm_2(sparse))
        return cast(Tensor, out)


class Layer(nn.Module):
    """One layer, for closed and open rows: they differ in the scalar at its end."""

    def __init__(self, config: Any, index: int, tables: slice) -> None:
        super().__init__()
        self.self_attn = parts.DiffusionGemmaEncoderTextAttention(config, index)
        self.self_attn.is_causal = False  # else kernels that are given no mask add a causal one
        self.input_layernorm = parts.DiffusionGemmaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = parts.DiffusionGemmaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.between = nn.Identity()
        self.feed_forward = FeedForward(config, index)
        self.layer_scalar = nn.Buffer(torch.ones(1))
        self.encoder_scalar = nn.Buffer(torch.ones(1))
        self.tables = tables

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """`(batch, length, width)` to the same; `position_embeddings` hold the tables of all kinds side by side."""
        cos, sin = (table[..., self.tables] for table in position_embeddings)
        attended, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            position_embeddings=(cos, sin),
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        residual = hidden_states + self.post_attention_layernorm(attended)
        return self.join(residual, self.feed_forward(self.between(residual)), cast(Tensor, position_ids))

    def join(self, residual: Tensor, mlp: Tensor, ids: Tensor) -> Tensor:
        """The layer's output: the sum, times the decoder's scalar at open rows and the encoder's at others."""
        return (residual + mlp) * torch.where(ids[..., OPEN, None] > 0, self.layer_scalar, self.encoder_scalar)


class GemmaStack(nn.Module):
    """Embedding, layers, final norm and self-conditioning."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.embed_tokens = parts.DiffusionGemmaTextScaledWordEmbedding(
            config.vocab_size, width, config.pad_token_id, embed_scale=width**0.5
        )
        self.kinds = tuple(dict.fromkeys(config.layer_types))
        """Kinds of attention, in the order of their first layers."""
        sizes = [config.per_layer_config[kind].head_dim for kind in self.kinds]
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        tables = {kind: slice(end - size, end) for kind, size, end in zip(self.kinds, sizes, ends, strict=True)}
        self.layers = nn.ModuleList(Layer(config, i, tables[kind]) for i, kind in enumerate(config.layer_types))
        self.norm = parts.DiffusionGemmaRMSNorm(width, eps=config.rms_norm_eps)
        self.self_conditioning = parts.DiffusionGemmaSelfConditioning(config)
        self.rotary_emb = parts.DiffusionGemmaTextRotaryEmbedding(config)

    def sees(self, query: Rows, key: Rows) -> tuple[Tensor, ...]:
        """Who may attend to whom, for each kind of layer."""
        windows = [self.config.sliding_window if kind == SLIDING else None for kind in self.kinds]
        return sees(query, key, windows, self.config.use_bidirectional_attention == "vision")

    def fill_buffers(self) -> None:
        """Compute what a checkpoint does not hold: rotary frequencies in float32, the scale in the weights' type."""
        weight = self.embed_tokens.weight
        self.rotary_emb = parts.DiffusionGemmaTextRotaryEmbedding(self.config).to(weight.device)
        self.embed_tokens.embed_scale = weight.new_tensor(self.embed_tokens.scalar_embed_scale)

    def tables(self, hidden: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """`(cos, sin)`, each `(batch, length, sum of head sizes)`: the tables of every kind, side by side."""
        each = [self.rotary_emb(hidden, position, kind) for kind in self.kinds]
        return torch.cat([cos for cos, _ in each], -1), torch.cat([sin for _, sin in each], -1)

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | Sequence[Tensor | None] | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Embeddings `(batch, length, width)` to final-normed hidden states.

        `position_ids` are those of `ids_of`; without them every row is closed, in a row from 0. `attention_mask` is
        one mask for each kind of layer, or one for all: `(batch, 1, query, key)` bool. None and `(batch, key)`, true
        at real keys, leave the rest to `sees`, which needs all keys to be rows of this pass; behind stored keys,
        None means that all are seen. `past_key_values` is None or any object with `update`.
        """
        hidden = inputs_embeds
        if position_ids is None:
            count = torch.arange(hidden.shape[1], device=hidden.device)
            position_ids = torch.stack([count, torch.full_like(count, -1), torch.zeros_like(count)], -1)[None]
        ids = position_ids.expand(hidden.shape[0], -1, -1)
        masks = self._masks(ids, attention_mask, past_key_values)
        tables = self.tables(hidden, ids[..., POSITION])
        for layer, kind in zip(self.layers, self.config.layer_types, strict=True):
            hidden = layer(
                hidden,
                position_embeddings=tables,
                attention_mask=masks[self.kinds.index(kind)],
                position_ids=ids,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=past_key_values)

    def _masks(self, ids: Tensor, given: Any, past: Any) -> Sequence[Tensor | None]:
        if isinstance(given, tuple | list):
            return given
        if given is not None and given.ndim == 4:
            return [given] * len(self.kinds)
        real = None if given is None else given.bool()
        if past is not None and past.get_seq_length():
            return [None if real is None else real[:, None, None, :]] * len(self.kinds)
        rows = Rows(ids[..., POSITION], ids[..., PICTURE], ids[..., OPEN] > 0, real)
        return self.sees(rows, rows)

    def condition(self, embeds: Tensor, logits: Tensor | None) -> Tensor:
        """Open rows as the layers meet them: tokens, and the mean embedding that the last logits expected.

        `embeds (batch, slot, width)`; `logits (batch, slot, vocabulary)` or None for no expectation.
        """
        soft = torch.zeros_like(embeds)
        if logits is not None:
            table = self.embed_tokens.weight
            likely = logits.to(table.dtype).softmax(-1, dtype=torch.float32).to(table.dtype)
            soft = (likely @ table) * self.embed_tokens.embed_scale.to(embeds.dtype)
        return cast(Tensor, self.self_conditioning(embeds, soft))


@dataclass(frozen=True)
class GemmaDims(DecoderDims):
    """Sizes of one layer that decide its cost; `mlp` counts the chosen experts' width."""

    values: bool = True
    """Whether values have a projection of their own; else they are the keys before their norm."""
    experts: int = 0

    def attention(self, rows: int, keys: int) -> int:
        """The projections of `rows`, two products against `keys`."""
        spared = 0 if self.values else 2 * rows * self.width * self.head_size * self.kv_heads
        return super().attention(rows, keys) - spared

    def mlp_block(self, rows: int) -> int:
        """MLP, chosen experts and router."""
        return super().mlp_block(rows) + 2 * rows * self.width * self.experts


@dataclass(frozen=True)
class GemmaCosts(DecoderDims):
    """The whole decoder: layers that differ, the head, and what prepares the open canvas."""

    each: tuple[GemmaDims, ...] = ()

    def at(self, layer: int) -> DecoderDims:
        """The sizes of one layer."""
        return self.each[layer]

    def condition(self, rows: int, *, told: bool) -> int:
        """Self-conditioning: the mean embedding that logits expected, if there were any, and its gated MLP."""
        return 6 * rows * self.width * self.mlp + (2 * rows * self.width * self.vocabulary if told else 0)


def costs(config: Any) -> GemmaCosts:
    """What everything in the decoder costs."""
    each = layer_dims(config)
    first = each[0]
    return GemmaCosts(
        width=first.width,
        heads=first.heads,
        kv_heads=first.kv_heads,
        head_size=first.head_size,
        mlp=config.intermediate_size,
        layers=len(each),
        vocabulary=first.vocabulary,
        each=each,
    )


def layer_dims(config: Any) -> tuple[GemmaDims, ...]:
    """The sizes of every layer."""
    return tuple(
        GemmaDims(
            width=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.per_layer_config[i].num_key_value_heads,
            head_size=config.per_layer_config[i].head_dim,
            mlp=config.intermediate_size + config.top_k_experts * config.moe_intermediate_size,
            layers=config.num_hidden_layers,
            vocabulary=config.vocab_size,
            values=kind == SLIDING,
            experts=config.num_experts,
        )
        for i, kind in enumerate(config.layer_types)
    )


def layer_modules(stack: GemmaStack) -> tuple[LayerModules, ...]:
    """The hookable modules of every layer."""
    return tuple(
        LayerModules(
            layer=layer,
            attention=layer.self_attn,
            pre_mlp_norm=layer.between,
            mlp=layer.feed_forward,
            pre_attention_norm=layer.input_layernorm,
            kind=stack.kinds.index(kind),
            tables=layer.tables,
            join=layer.join,
        )
        for layer, kind in zip(cast("Sequence[Layer]", stack.layers), stack.config.layer_types, strict=True)
    )


def published_name(name: str) -> str:
    """The checkpoint's name of one of the adapter's own tensors."""
    if name.startswith("model."):
        inside = name.removeprefix("model.")
        if inside.endswith(".encoder_scalar"):
            return f"{ENCODER}language_model.{inside.removesuffix('encoder_scalar')}layer_scalar"
        return DECODER + inside.replace(".feed_forward.", ".")
    return ENCODER + name


def read_config(config: Mapping[str, Any], source: str, attention: str, encoder_attention: str, experts: str) -> Any:
    """transformers' settings from the checkpoint's, with what this adapter does not do refused."""
    try:
        made = settings.DiffusionGemmaConfig(**{k: v for k, v in config.items() if k != "model_type"})
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise ProbeError(f"the config of {source} does not describe a DiffusionGemma: {error}") from error
    text = cast(Any, made.text_config)
    if not (made.tie_word_embeddings and text.tie_word_embeddings):
        raise ProbeError(f"{source}: `tie_word_embeddings` is false; encoder and decoder must share their weights")
    if (seen := text.use_bidirectional_attention) not in (None, "vision"):
        raise ProbeError(f"{source}: `use_bidirectional_attention` is {seen!r}; supported: null, 'vision'")
    missing = [k for k in ("num_experts", "top_k_experts", "moe_intermediate_size") if getattr(text, k) is None]
    if missing:
        raise ProbeError(f"the `text_config` of {source} lacks {', '.join(missing)}")
    text._attn_implementation, text._experts_implementation = attention, experts
    cast(Any, made.vision_config)._attn_implementation = encoder_attention
    return made
