"""What Dimple's config says before any weight is read: sizes, special tokens, counts. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from probe.backbones.checkpoint import Checkpoint
from probe.backbones.dimple_resize import Preprocessing, preprocessing_of
from probe.errors import ProbeError
from probe.site import ModelFacts, refuse_encoder

MODEL_TYPE = "dimple"
PUBLISHED_NAME = "rp-yu/Dimple-7B"
PACKED = (
    "its encoder packs all pictures into one sequence, attends in windows of them and joins patches two by two, which "
    "needs every patch; attach at `before_lm`"
)
"""Why no probe acts in the encoder."""

TEXT: dict[str, Any] = {
    "mrope_section": [16, 24, 24],
    "full_attn_mask": True,
    "mask_token_id": 151666,
    "pad_token_id": 151643,
    "image_token_id": 151655,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}
"""Settings that a config may leave out, as the published configuration class fills them in."""

VISION: dict[str, Any] = {
    "depth": 32,
    "hidden_size": 1280,
    "hidden_act": "silu",
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "out_hidden_size": 3584,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
"""Qwen2.5-VL's tower. A saved config names only what differs from the published class's defaults, which these are."""

PUBLISHED: dict[str, Any] = {
    "model_type": MODEL_TYPE,
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rope_theta": 1000000.0,
}
"""The published model's settings (Dream's, Qwen2.5's sizes): facts and counts without a download."""

PUBLISHED_PREPROCESSOR: dict[str, Any] = {"min_pixels": 3136, "max_pixels": 12845056}
"""Qwen2.5-VL's pixel budget, which the published folder takes over. Training used at most 112,896 pixels."""


def is_dimple(config: Mapping[str, Any]) -> bool:
    """Whether a config is Dimple's."""
    return config.get("model_type") == MODEL_TYPE


def text_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's settings, what the config leaves out filled in."""
    return TEXT | {key: value for key, value in config.items() if value is not None}


def vision_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The tower's settings, what the config leaves out filled in."""
    given = config.get("vision_config") or {}
    if not isinstance(given, Mapping):
        raise ProbeError(f"`vision_config` is a {type(given).__name__}; expected an object of the tower's settings")
    return VISION | {key: given[key] for key in VISION if given.get(key) is not None}


def preprocessing(checkpoint: Checkpoint, **options: Any) -> Preprocessing:
    """How pictures become patches; options as of `preprocessing_of`."""
    vision = vision_settings(checkpoint.config)
    return preprocessing_of(checkpoint.json("preprocessor_config.json") or {}, vision, checkpoint.folder, **options)


def visual_count(
    checkpoint: Checkpoint,
    sizes: Sequence[tuple[int, int]],
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    pixels: str = "processor",
) -> int:
    """Visual tokens of a sample by its pictures' (width, height), from a checkpoint's small files alone."""
    rule = preprocessing(checkpoint, min_pixels=min_pixels, max_pixels=max_pixels, pixels=pixels)
    return sum(rule.count(*size) for size in sizes)


def published_count(
    sizes: Sequence[tuple[int, int]],
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    pixels: str = "processor",
) -> int:
    """Visual tokens of a sample of the published model by its pictures' (width, height)."""
    options: dict[str, Any] = {"min_pixels": min_pixels, "max_pixels": max_pixels, "pixels": pixels}
    rule = preprocessing_of(PUBLISHED_PREPROCESSOR, VISION, PUBLISHED_NAME, **options)
    return sum(rule.count(*size) for size in sizes)


def facts_of(checkpoint: Checkpoint) -> ModelFacts:
    """Sizes of a checkpoint from its config alone; the vocabulary is every row, as published."""
    return _facts(checkpoint.source, checkpoint.config)


def published_facts() -> ModelFacts:
    """Sizes of the published model, without a download."""
    return _facts(PUBLISHED_NAME, PUBLISHED)


def _facts(name: str, config: Mapping[str, Any]) -> ModelFacts:
    try:
        return ModelFacts(
            name=name,
            layers=int(config["num_hidden_layers"]),
            heads=int(config["num_attention_heads"]),
            width=int(config["hidden_size"]),
            vocabulary=int(config["vocab_size"]),
            encoder_layers=int(vision_settings(config)["depth"]),
            refused=refuse_encoder(PACKED),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ProbeError(f"the config of {name} lacks a usable {error}") from error
