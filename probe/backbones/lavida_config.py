"""What LaViDa's config says before any weight is read: which decoder, sizes, special tokens, counts. No torch.

Two decoders share one vision path: Dream (a Qwen2, `llava_dream`) and LLaDA (a Llama whose config and tensors are
named as OLMo's, `llava_llada`; LLaDA-V has that model type too, but names its sizes as transformers does).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from probe.backbones import llada_v_config
from probe.backbones.anyres import Geometry
from probe.backbones.checkpoint import Checkpoint
from probe.backbones.tiled_config import (
    SIGLIP_SO400M,
    SpecialToken,
    count_visual,
    model_facts,
    tokenizer_length,
    tower_geometry,
    vision_settings,
)
from probe.errors import ProbeError
from probe.site import ModelFacts

DREAM_TYPE, LLADA_TYPE = "llava_dream", llada_v_config.MODEL_TYPE
DREAM_NAME = "jacklishufan/lavida-dream-v1.0-instruct"
LLADA_NAME = "jacklishufan/lavida-llada-v1.0-instruct"

VISION: dict[str, Any] = {
    "mm_vision_tower": "google/siglip-so400m-patch14-384",
    "mm_hidden_size": 1152,
    "mm_projector_type": "mlp2x_gelu",
    "mm_patch_merge_type": "spatial_unpad",
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": [[384, 768], [768, 384], [768, 768], [1152, 384], [384, 1152]],
    "mm_spatial_pool_mode": "bilinear",
    "mm_newline_position": "grid",
    "tokenizer_model_max_length": 4096,
}
PUBLISHED_DREAM: dict[str, Any] = {
    "model_type": DREAM_TYPE,
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 131072,
    "mask_token_id": 151666,
    **VISION,
}
PUBLISHED_LLADA: dict[str, Any] = {
    "model_type": LLADA_TYPE,
    "vocab_size": 126464,
    "embedding_size": 126464,
    "d_model": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 32,
    "mlp_hidden_size": 12288,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_sequence_length": 4096,
    "mask_token_id": 126336,
    **VISION,
}
"""The published models' settings, from their code and training scripts: facts and counts without a download."""
DREAM_TOKENS, LLADA_TOKENS = 151667, llada_v_config.PUBLISHED_TOKENS
"""Lengths of the published tokenizers; the loader cuts the vocabulary to them."""

DREAM_SPECIAL = {
    "mask": SpecialToken("<|mask|>", 151666),
    "eos": SpecialToken("<|endoftext|>", 151643),
    "stop": SpecialToken("<|im_end|>", 151645),
}
LLADA_SPECIAL = {"mask": llada_v_config.MASK, "eos": llada_v_config.EOS, "stop": llada_v_config.EOT}

OLMO_NAMES = {
    "d_model": "hidden_size",
    "mlp_hidden_size": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "activation_type": "hidden_act",
    "max_sequence_length": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
}
"""Fields of LLaDA's config and what transformers' Llama calls them."""
OLMO_AS_LLAMA: dict[str, tuple[Any, ...]] = {
    "block_type": ("llama",),
    "layer_norm_type": ("rms",),
    "activation_type": ("silu",),
    "rope": (True,),
    **dict.fromkeys(
        ("alibi", "include_bias", "include_qkv_bias", "bias_for_layer_norm", "attention_layer_norm", "input_emb_norm",
         "scale_logits", "multi_query_attention"),
        (False, None),
    ),
}  # fmt: skip
"""Values of LLaDA's config under which the decoder is a Llama."""


def is_lavida(config: Mapping[str, Any]) -> bool:
    """Whether a config is LaViDa's, with either decoder."""
    kind = config.get("model_type")
    return kind == DREAM_TYPE or (kind == LLADA_TYPE and "d_model" in config)


def is_dream(config: Mapping[str, Any]) -> bool:
    """Whether the decoder is Dream."""
    return config.get("model_type") == DREAM_TYPE


def decoder_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The decoder's settings under transformers' names; refuses a LLaDA that is no Llama."""
    if is_dream(config):
        return dict(config)
    other = [k for k, allowed in OLMO_AS_LLAMA.items() if k in config and config[k] not in allowed]
    if other:
        raise ProbeError(f"config.json: {other[0]} is {config[other[0]]!r}; supported: {OLMO_AS_LLAMA[other[0]][0]!r}")
    fields = {ours: config[theirs] for theirs, ours in OLMO_NAMES.items() if config.get(theirs) is not None}
    return {**fields, "vocab_size": config.get("vocab_size")}


def pooling(config: Mapping[str, Any]) -> str:
    """How views are pooled; the published default where the config does not say."""
    return str(config.get("mm_spatial_pool_mode") or VISION["mm_spatial_pool_mode"])


def geometry(config: Mapping[str, Any], vision: Mapping[str, Any]) -> Geometry:
    """Tiles, canvases and pooling. Without an aspect setting every picture is a padded square, as evaluated."""
    told = {**config, "image_aspect_ratio": config.get("image_aspect_ratio") or "pad"}
    return tower_geometry(told, vision, pooling(config))


def facts_of(checkpoint: Checkpoint) -> ModelFacts:
    """Sizes of a checkpoint from its small files alone; the vocabulary is cut to the tokenizer."""
    config = checkpoint.config
    vocabulary = tokenizer_length(checkpoint) or int(config["vocab_size"])
    vision, text_tower = vision_settings(checkpoint), checkpoint.has_text_tower
    return model_facts(checkpoint.source, decoder_fields(config), vocabulary, vision, text_tower=text_tower)


def visual_count(
    checkpoint: Checkpoint, sizes: Sequence[tuple[int, int]], *, pool: str | None = None, several: str = "stack"
) -> int:
    """Visual tokens of a sample by its pictures' (width, height), from a checkpoint's small files alone."""
    vision = vision_settings(checkpoint)
    return _count(sizes, geometry(checkpoint.config, vision), pool, several) if vision else 0


def published_count(sizes: Sequence[tuple[int, int]], *, pool: str | None = None, several: str = "stack") -> int:
    """Visual tokens of a sample of either published model by its pictures' (width, height)."""
    return _count(sizes, geometry(VISION, SIGLIP_SO400M), pool, several)


def _count(sizes: Sequence[tuple[int, int]], tiles: Geometry, pool: str | None, several: str) -> int:
    """With the options of loading: another pooling, several pictures as a list of pooled views with newlines."""
    if pool is not None:
        tiles = replace(tiles, pool=None if pool == "none" else pool)
    if several == "list" and (len(sizes) > 1 or not tiles.pinpoints):
        return len(sizes) * (tiles.side**2 + 1)
    return count_visual(sizes, tiles)


def dream_facts() -> ModelFacts:
    """Sizes of the published LaViDa-Dream, without a download."""
    return model_facts(DREAM_NAME, PUBLISHED_DREAM, DREAM_TOKENS, SIGLIP_SO400M)


def llada_facts() -> ModelFacts:
    """Sizes of the published LaViDa-LLaDA, without a download."""
    return model_facts(LLADA_NAME, decoder_fields(PUBLISHED_LLADA), LLADA_TOKENS, SIGLIP_SO400M)
