"""The modules of LLaDA-V, as settings for transformers' Llama and SigLIP, and their published names.

Llama differs in one thing, that no attention is causal. SigLIP loses its last layer and its pooling head. A
projector of a few linear layers lies between them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.siglip.configuration_siglip import SiglipVisionConfig

from probe.backbones.base import LayerModules
from probe.backbones.llada_v_config import SIGLIP_SO400M
from probe.errors import ProbeError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOWER = "model.vision_tower.vision_tower.vision_model."

_LLAMA_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "max_position_embeddings", "rms_norm_eps", "attention_bias", "mlp_bias", "head_dim",
)  # fmt: skip
_SIGLIP_FIELDS = tuple(SIGLIP_SO400M)


def published_name(name: str) -> str:
    """The checkpoint's name of one of this class's own parameters."""
    if name.startswith("vision_tower."):
        return TOWER + name.removeprefix("vision_tower.")
    return f"model.{name}" if name.startswith(("mm_projector.", "image_newline")) else name


def llama_config(config: Mapping[str, Any], vocabulary: int, attention: str) -> LlamaConfig:
    """transformers' settings from the checkpoint's, which still spell the rotary base the old way."""
    rope = config.get("rope_parameters")
    if not rope:
        scaling = dict(config.get("rope_scaling") or {})
        kind = scaling.pop("type", None) or scaling.pop("rope_type", None) or "default"
        rope = {**scaling, "rope_type": kind, "rope_theta": float(config.get("rope_theta", 10000.0))}
    known = {k: config[k] for k in _LLAMA_FIELDS if config.get(k) is not None}
    try:
        return LlamaConfig(
            **known, vocab_size=vocabulary, rope_parameters=rope, use_cache=False, attention_dropout=0.0,
            bos_token_id=None, eos_token_id=None, pad_token_id=None, tie_word_embeddings=False,
            attn_implementation=attention,
        )  # fmt: skip
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise ProbeError(f"config.json does not describe a Llama: {error}") from error


def siglip_config(vision: Mapping[str, Any], attention: str) -> SiglipVisionConfig:
    """The encoder's settings with its last layer and its head left out."""
    known = {k: vision[k] for k in _SIGLIP_FIELDS if k in vision}
    known["num_hidden_layers"] = int(known["num_hidden_layers"]) - 1
    try:
        return SiglipVisionConfig(**known, attention_dropout=0.0, vision_use_head=False, attn_implementation=attention)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise ProbeError(f"the encoder's settings do not describe a SigLIP: {error}") from error


def projector(kind: str, inner: int, outer: int) -> nn.Module:
    """The projector of a config's `mm_projector_type`, `(..., inner)` to `(..., outer)`."""
    if kind == "linear":
        return nn.Linear(inner, outer)
    match = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    if not match:
        raise ProbeError(f"`mm_projector_type` is {kind!r}; supported: linear, mlpNx_gelu")
    layers: list[nn.Module] = [nn.Linear(inner, outer)]
    for _ in range(int(match[1]) - 1):
        layers += [nn.GELU(), nn.Linear(outer, outer)]
    return nn.Sequential(*layers)


def layer_modules(stack: Any, pre_mlp_norm: str) -> tuple[LayerModules, ...]:
    """The hookable modules of every layer of a Llama or of a SigLIP encoder; both call the rest alike."""
    return tuple(LayerModules(x, x.self_attn, getattr(x, pre_mlp_norm), x.mlp) for x in stack.layers)
