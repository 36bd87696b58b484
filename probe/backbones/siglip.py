"""SigLIP without its last layer, its final norm and its pooling head, and the projector behind it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers.models.siglip.configuration_siglip import SiglipVisionConfig

from probe.backbones.base import LayerModules
from probe.backbones.tiled_config import SIGLIP_SO400M
from probe.errors import ProbeError

_FIELDS = tuple(SIGLIP_SO400M)


def siglip_config(vision: Mapping[str, Any], attention: str) -> SiglipVisionConfig:
    """The encoder's settings with its last layer and its head left out."""
    known = {k: vision[k] for k in _FIELDS if k in vision}
    try:
        known["num_hidden_layers"] = int(known["num_hidden_layers"]) - 1
        return SiglipVisionConfig(**known, attention_dropout=0.0, vision_use_head=False, attn_implementation=attention)
    except (KeyError, TypeError, ValueError, StrictDataclassError) as error:
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


def layer_modules(stack: Any, pre_attention_norm: str, pre_mlp_norm: str) -> tuple[LayerModules, ...]:
    """The hookable modules of every layer of a Llama, a Qwen2 or a SigLIP encoder; they call the rest alike."""
    return tuple(
        LayerModules(x, x.self_attn, getattr(x, pre_mlp_norm), x.mlp, getattr(x, pre_attention_norm))
        for x in stack.layers
    )
