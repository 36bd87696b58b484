"""What LLaVA-NeXT's config says before any weight is read: sizes, tiles, counts. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from probe.backbones.anyres import Geometry, Tiling
from probe.backbones.autoregressive_config import decoder_facts, whole_number
from probe.backbones.checkpoint import Checkpoint
from probe.errors import ProbeError
from probe.site import ModelFacts, Site

MODEL_TYPE = "llava_next"
DECODERS = ("llama", "mistral", "qwen2")
ENCODER = "clip_vision_model"
SEVERAL = "its features come from several layers, which would differ in length"
"""Why no probe shortens views inside the encoder of such a checkpoint."""

CLIP_LARGE: dict[str, Any] = {
    "model_type": ENCODER,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
"""CLIP ViT-L/14 at 336 pixels: the encoder when a config says nothing of it."""

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
"""Canvases, (height, width) as transformers has them, when a config says nothing of them."""

PUBLISHED: dict[str, dict[str, Any]] = {
    "llava-hf/llava-v1.6-mistral-7b-hf": {"model_type": "mistral", "vocab_size": 32064},
    "llava-hf/llava-v1.6-vicuna-7b-hf": {"model_type": "llama", "vocab_size": 32064},
}
"""The decoders of published models, for facts and counts without a download."""


def is_llava_next(config: Mapping[str, Any]) -> bool:
    """Whether a config is LLaVA-NeXT's in transformers' layout."""
    return config.get("model_type") == MODEL_TYPE


def encoder_settings(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The encoder's settings, completed; only a CLIP tower is known."""
    given = config.get("vision_config") or {}
    kind = given.get("model_type", ENCODER)
    if kind != ENCODER:
        raise ProbeError(f"{where}: the encoder is a {kind!r}; supported: {ENCODER}")
    return {**CLIP_LARGE, **given}


def decoder_settings(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The decoder's settings with their `model_type`."""
    given = dict(config.get("text_config") or {})
    kind = given.setdefault("model_type", "llama")
    if kind not in DECODERS:
        raise ProbeError(f"{where}: the decoder is a {kind!r}; supported: {', '.join(DECODERS)}")
    return given


def feature_layers(config: Mapping[str, Any], depth: int, where: str) -> tuple[int, ...]:
    """Which encoder states are the features, as 0 (after the embeddings) to `depth` (after the last layer)."""
    value = config.get("vision_feature_layer", -2)
    asked = value if isinstance(value, list) else [value]
    found = tuple(i + depth + 1 if isinstance(i, int) and i < 0 else i for i in asked)
    if not found or not all(isinstance(i, int) and 0 <= i <= depth for i in found):
        raise ProbeError(f"{where}: `vision_feature_layer` is {value!r}; the encoder has the states 0 to {depth}")
    return found


def check_strategy(config: Mapping[str, Any], where: str) -> None:
    """Refuse features that keep the class token: with it, a view's tokens are no square."""
    strategy = config.get("vision_feature_select_strategy", "default")
    if strategy != "default":
        raise ProbeError(f"{where}: `vision_feature_select_strategy` is {strategy!r}; supported: default")


def geometry(config: Mapping[str, Any], where: str) -> Geometry:
    """Tiles and canvases; a config has (height, width), a `Geometry` (width, height)."""
    encoder = encoder_settings(config, where)
    tile, patch = (whole_number(encoder, key, None, where) for key in ("image_size", "patch_size"))
    pinpoints = config.get("image_grid_pinpoints") or PINPOINTS
    try:
        canvases = tuple((int(w), int(h)) for h, w in pinpoints)
    except (TypeError, ValueError):
        expected = "pairs of height and width in pixels"
        raise ProbeError(f"{where}: `image_grid_pinpoints` is {pinpoints!r}; expected {expected}") from None
    off = [c for c in canvases if c[0] % tile or c[1] % tile or min(c) <= 0]
    if off:
        raise ProbeError(
            f"{where}: `image_grid_pinpoints` holds {off[0][::-1]}, no multiple of the tile of {tile} pixels"
        )
    return Geometry(tile, patch, canvases, digits=7)


def facts_of(checkpoint: Checkpoint) -> ModelFacts:
    """Sizes of a checkpoint from its config alone. Encoder layers are those in use: up to the features' layer."""
    return replace(_facts(checkpoint.source, checkpoint.config), text_tower=checkpoint.has_text_tower)


def visual_count(checkpoint: Checkpoint, sizes: Sequence[tuple[int, int]]) -> int:
    """Visual tokens of a sample by its pictures' (width, height): each is tiled by itself."""
    return _count(checkpoint.config, sizes, checkpoint.source)


def published_facts(name: str) -> ModelFacts:
    """Sizes of a published model, without a download."""
    return _facts(name, {"text_config": PUBLISHED[name]})


def published_count(name: str, sizes: Sequence[tuple[int, int]]) -> int:
    """Visual tokens of a sample of a published model by its pictures' (width, height)."""
    return _count({}, sizes, name)


def _facts(name: str, config: Mapping[str, Any]) -> ModelFacts:
    text = decoder_settings(config, name)
    encoder = encoder_settings(config, name)
    depth, image, patch = (
        whole_number(encoder, key, None, name) for key in ("num_hidden_layers", "image_size", "patch_size")
    )
    layers = feature_layers(config, depth, name)
    facts = decoder_facts(name, text["model_type"], text, max(layers))
    several = ((Site.ENCODER_LAYER_AFTER_ATTENTION, SEVERAL),) if len(layers) > 1 else ()
    return replace(facts, patches=(image // patch) ** 2, class_token=True, refused=several)


def _count(config: Mapping[str, Any], sizes: Sequence[tuple[int, int]], where: str) -> int:
    tiles = geometry(config, where)
    return sum(Tiling(tiles, *size).count for size in sizes)
