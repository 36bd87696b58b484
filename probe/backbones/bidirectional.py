"""Llama and Qwen2 in which every position sees every other, whatever the kernel and whatever the cache.

transformers' own layers, norms and rotary tables; only the stack's forward is spelled out here. Theirs builds a
causal mask, and asks a cache for its sizes to do so. Here a mask is what the caller gives and nothing else, so any
object with `update` and `get_seq_length` can be the cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model
from transformers.utils.output_capturing import capture_outputs

from probe.errors import ProbeError

_DECODER_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "max_position_embeddings", "rms_norm_eps", "head_dim",
)  # fmt: skip


def attention_bias(mask: Tensor | None, attention: str, dtype: torch.dtype) -> Tensor | None:
    """A mask in the form that an attention implementation takes: only eager cannot take 4-D truth values."""
    if mask is None or mask.ndim != 4 or mask.is_floating_point():
        return mask
    allowed = mask.bool()
    if attention != "eager":
        return allowed
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


class _Bidirectional:
    """The forward of a decoder stack without causal masks; to be mixed in before the stack's own class."""

    def _see_everything(self: Any, config: Any) -> None:
        config.is_causal = False
        for layer in self.layers:
            layer.self_attn.is_causal = False  # else kernels that are given no mask add a causal one

    @capture_outputs
    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Ids `(batch, query)` or embeddings `(batch, query, width)` to final-normed hidden states.

        `attention_mask` is None (every key is seen), `(batch, key)` true at real keys, or 4-D
        `(batch, 1 or heads, query, key)`: bool or integer (true: may attend), or floats to be added.
        `past_key_values` is None or any object with `update(key, value, layer) -> (key, value)`, which gets the keys
        after rotary and gives those to attend to, and `get_seq_length()`. With a cache, masks span the keys that it
        gives. `position_ids` are what the rotary tables take; by default positions continue after the cache.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ProbeError("the decoder takes either `input_ids` or `inputs_embeds`")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(hidden.shape[1], device=hidden.device) + seen)[None]
        mask = attention_bias(attention_mask, str(self.config._attn_implementation), hidden.dtype)
        if mask is not None:  # the cache is left out: the mask's own length counts
            mask = create_bidirectional_mask(self.config, hidden, mask)
        rotary = self.rotary_emb(hidden, position_ids)
        for layer in self.layers:
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                position_embeddings=rotary,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=past_key_values)


class BidirectionalLlama(_Bidirectional, LlamaModel):
    """Llama in which every position sees every other."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self._see_everything(config)


class BidirectionalQwen2(_Bidirectional, Qwen2Model):
    """Qwen2 in which every position sees every other; sliding windows, which only make sense causally, are refused."""

    def __init__(self, config: Qwen2Config) -> None:
        if "sliding_attention" in cast("list[str]", config.layer_types):
            raise ProbeError("a bidirectional Qwen2 cannot have sliding windows: set `use_sliding_window` to false")
        super().__init__(config)
        self._see_everything(config)


def llama_config(config: Mapping[str, Any], vocabulary: int, attention: str) -> LlamaConfig:
    """transformers' settings of a Llama from a checkpoint's, which may spell the rotary base the old way."""
    biases = {k: config[k] for k in ("attention_bias", "mlp_bias") if config.get(k) is not None}
    return cast(LlamaConfig, _decoder_config(LlamaConfig, "a Llama", config, vocabulary, attention, biases))


def qwen2_config(config: Mapping[str, Any], vocabulary: int, attention: str) -> Qwen2Config:
    """transformers' settings of a Qwen2, likewise."""
    names = ("use_sliding_window", "sliding_window", "max_window_layers")
    windows = {k: config[k] for k in names if config.get(k) is not None}
    return cast(Qwen2Config, _decoder_config(Qwen2Config, "a Qwen2", config, vocabulary, attention, windows))


def _decoder_config(
    kind: Any, what: str, config: Mapping[str, Any], vocabulary: int, attention: str, more: Mapping[str, Any]
) -> Any:
    rope = config.get("rope_parameters")
    if not rope:
        scaling = dict(config.get("rope_scaling") or {})
        name = scaling.pop("type", None) or scaling.pop("rope_type", None) or "default"
        rope = {**scaling, "rope_type": name, "rope_theta": float(config.get("rope_theta", 10000.0))}
    known = {k: config[k] for k in _DECODER_FIELDS if config.get(k) is not None}
    try:
        return kind(
            **known, **more, vocab_size=vocabulary, rope_parameters=rope, use_cache=False, attention_dropout=0.0,
            bos_token_id=None, eos_token_id=None, pad_token_id=None, tie_word_embeddings=False,
            attn_implementation=attention,
        )  # fmt: skip
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise ProbeError(f"config.json does not describe {what}: {error}") from error


def bidirectional(config: LlamaConfig | Qwen2Config) -> BidirectionalLlama | BidirectionalQwen2:
    """The decoder of either kind."""
    return BidirectionalQwen2(config) if isinstance(config, Qwen2Config) else BidirectionalLlama(config)
