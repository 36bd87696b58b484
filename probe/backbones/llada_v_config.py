"""What LLaDA-V's config says before any weight is read: sizes, special tokens, counts. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from probe.backbones.anyres import Geometry
from probe.backbones.checkpoint import Checkpoint
from probe.backbones.tiled_config import (
    SIGLIP_SO400M,
    SpecialToken,
    count_visual,
    model_facts,
    tokenizer_length,
    tower_geometry,
    tower_named,
    vision_settings,
)
from probe.site import ModelFacts

MODEL_TYPE = "llava_llada"
PUBLISHED_NAME = "GSAI-ML/LLaDA-V"
PUBLISHED: dict[str, Any] = {
    "model_type": MODEL_TYPE,
    "vocab_size": 126464,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "mm_vision_tower": "google/siglip2-so400m-patch14-384",
    "mm_projector_type": "mlp2x_gelu",
    "image_aspect_ratio": "anyres_max_4",
    "image_grid_pinpoints": "(1x1),...,(6x6)",
    "mm_patch_merge_type": "spatial_unpad",
}
"""The published model's settings, from its code and training scripts: facts and counts without a download."""
PUBLISHED_TOKENS = 126349
"""Length of the published tokenizer; the loader cuts the vocabulary to it."""

MASK = SpecialToken("<|mdm_mask|>", 126336)
BOS = SpecialToken("<|startoftext|>", 126080)
EOS = SpecialToken("<|endoftext|>", 126081)
START_HEADER = SpecialToken("<|start_header_id|>", 126346)
END_HEADER = SpecialToken("<|end_header_id|>", 126347)
EOT = SpecialToken("<|eot_id|>", 126348)


def is_llada_v(config: Mapping[str, Any]) -> bool:
    """Whether a config is LLaDA-V's. LaViDa uses the same model type but calls the width `d_model`."""
    return config.get("model_type") == MODEL_TYPE and "hidden_size" in config and "d_model" not in config


def visual_token_count(
    width: int, height: int, config: Mapping[str, Any], vision: Mapping[str, Any] | None = None
) -> int:
    """Visual tokens of one picture under a config, without opening the picture.

    `vision` are the encoder's settings, by default those of the tower that the config names.
    """
    settings = vision or tower_named(config, "the config")
    return count_visual([(width, height)], tower_geometry(config, settings))


def visual_count(checkpoint: Checkpoint, sizes: Sequence[tuple[int, int]]) -> int:
    """Visual tokens of a sample by its pictures' (width, height), from a checkpoint's small files alone."""
    vision = vision_settings(checkpoint)
    return count_visual(sizes, tower_geometry(checkpoint.config, vision)) if vision else 0


def published_geometry() -> Geometry:
    """Tiles and canvases of the published model."""
    return tower_geometry(PUBLISHED, SIGLIP_SO400M)


def published_count(sizes: Sequence[tuple[int, int]]) -> int:
    """Visual tokens of a sample of the published model by its pictures' (width, height)."""
    return count_visual(sizes, published_geometry())


def published_facts() -> ModelFacts:
    """Sizes of the published model, without a download."""
    return model_facts(PUBLISHED_NAME, PUBLISHED, PUBLISHED_TOKENS, SIGLIP_SO400M)


def facts_of(checkpoint: Checkpoint) -> ModelFacts:
    """Sizes of a checkpoint from its small files alone; the vocabulary is cut to the tokenizer."""
    vocabulary = tokenizer_length(checkpoint) or int(checkpoint.config["vocab_size"])
    vision, text_tower = vision_settings(checkpoint), checkpoint.has_text_tower
    return model_facts(checkpoint.source, checkpoint.config, vocabulary, vision, text_tower=text_tower)
