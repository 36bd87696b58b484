"""What Qwen2.5-VL's config says before any weight is read: sizes, special tokens, counts. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from probe.backbones.autoregressive_config import decoder_facts, whole_number
from probe.backbones.checkpoint import Checkpoint
from probe.backbones.dimple_config import PACKED
from probe.backbones.dimple_resize import STEEPEST, Preprocessing, preprocessing_of
from probe.errors import ProbeError
from probe.site import ModelFacts, refuse_encoder

MODEL_TYPE = "qwen2_5_vl"
DECODER = "qwen2_5_vl_text"

VISION: dict[str, Any] = {"depth": 32, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
"""The encoder's settings that a config may leave out, of those that layers and counts depend on."""

PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-VL-7B-Instruct": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
    },
}
"""The decoders of published models, for facts and counts without a download."""

PUBLISHED_PIXELS: dict[str, Any] = {"min_pixels": 3136, "max_pixels": 12845056}
"""Their budget of pixels."""


def is_qwen_vl(config: Mapping[str, Any]) -> bool:
    """Whether a config is Qwen2.5-VL's."""
    return config.get("model_type") == MODEL_TYPE


@dataclass(frozen=True)
class QwenPixels(Preprocessing):
    """Qwen2-VL's rule as transformers 5 has it: small pictures grow, and no side shrinks below one cell."""

    def size(self, width: int, height: int) -> tuple[int, int]:
        """The size `(width, height)` that the encoder sees."""
        if max(width, height) > STEEPEST * min(width, height):
            raise ProbeError(f"a picture of {width} x {height} pixels is longer than 1:{STEEPEST}")
        cell, sides = self.cell, (width, height)
        wide, high = (round(side / cell) * cell for side in sides)
        if wide * high > self.max_pixels:
            ratio = math.sqrt(width * height / self.max_pixels)
            wide, high = (max(cell, math.floor(side / ratio / cell) * cell) for side in sides)
        elif wide * high < self.min_pixels:
            ratio = math.sqrt(self.min_pixels / (width * height))
            wide, high = (math.ceil(side * ratio / cell) * cell for side in sides)
        return wide, high


def vision_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The encoder's settings, what the config leaves out filled in."""
    given = config.get("vision_config") or {}
    return {key: given.get(key) or default for key, default in VISION.items()}


def preprocessing(
    checkpoint: Checkpoint, *, min_pixels: int | None = None, max_pixels: int | None = None
) -> QwenPixels:
    """How pictures become patches, with the checkpoint's budget of pixels or the one given."""
    said, vision = checkpoint.json("preprocessor_config.json") or {}, vision_settings(checkpoint.config)
    rule = preprocessing_of(said, vision, checkpoint.folder, min_pixels=min_pixels, max_pixels=max_pixels)
    return QwenPixels(**vars(rule))


def visual_count(
    checkpoint: Checkpoint,
    sizes: Sequence[tuple[int, int]],
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> int:
    """Visual tokens of a sample by its pictures' (width, height), from a checkpoint's small files alone."""
    rule = preprocessing(checkpoint, min_pixels=min_pixels, max_pixels=max_pixels)
    return sum(rule.count(*size) for size in sizes)


def facts_of(checkpoint: Checkpoint) -> ModelFacts:
    """Sizes of a checkpoint from its config alone, whether the decoder's stand apart or flat."""
    config = checkpoint.config
    return _facts(checkpoint.source, config.get("text_config") or config, config)


def published_facts(name: str) -> ModelFacts:
    """Sizes of a published model, without a download."""
    return _facts(name, PUBLISHED[name], {})


def published_count(
    name: str, sizes: Sequence[tuple[int, int]], *, min_pixels: int | None = None, max_pixels: int | None = None
) -> int:
    """Visual tokens of a sample of a published model by its pictures' (width, height)."""
    budget = preprocessing_of(PUBLISHED_PIXELS, VISION, name, min_pixels=min_pixels, max_pixels=max_pixels)
    rule = QwenPixels(**vars(budget))
    return sum(rule.count(*size) for size in sizes)


def _facts(name: str, text: Mapping[str, Any], config: Mapping[str, Any]) -> ModelFacts:
    facts = decoder_facts(name, DECODER, text, whole_number(vision_settings(config), "depth", None, name))
    return replace(facts, refused=refuse_encoder(PACKED))
