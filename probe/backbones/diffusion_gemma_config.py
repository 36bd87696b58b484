"""What DiffusionGemma's config says before any weight is read: sizes, pictures, special ids, defaults. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from probe.backbones.checkpoint import Checkpoint
from probe.errors import ProbeError
from probe.site import ModelFacts, refuse_encoder

MODEL_TYPE = "diffusion_gemma"
PUBLISHED_NAME = "google/diffusiongemma-26B-A4B-it"
POOLED = "its encoder pools squares of patches by their places, which needs every patch; attach at `before_lm`"
"""Why no probe acts in the encoder."""
MASK = "<mask>"
"""Stands for undecided slots in traces. The model re-noises and never meets it."""

PUBLISHED: dict[str, Any] = {
    "model_type": MODEL_TYPE,
    "canvas_length": 256,
    "image_token_id": 258880,
    "boi_token_id": 255999,
    "eoi_token_id": 258882,
    "text_config": {
        "num_hidden_layers": 30,
        "num_attention_heads": 16,
        "hidden_size": 2816,
        "vocab_size": 262144,
    },
    "vision_config": {"num_hidden_layers": 27, "patch_size": 16, "pooling_kernel_size": 3},
}
"""The published model's settings: facts and counts without a download."""

SAMPLING: dict[str, Any] = {
    "entropy_bound": 0.1,
    "t_min": 0.4,
    "t_max": 0.8,
    "stability_threshold": 1,
    "confidence_threshold": 0.005,
}
"""The sampler's settings where `generation_config.json` does not give them (transformers' own defaults)."""
DENOISING_STEPS = 48
SOFT_TOKENS = 280


@dataclass(frozen=True)
class Grid:
    """How pictures become soft tokens: pixels of a patch, patches along a side of a token, tokens at most."""

    patch: int
    pool: int
    most: int

    @property
    def cell(self) -> int:
        """Pixels along one side of what a soft token sees."""
        return self.patch * self.pool

    def fit(self, width: int, height: int) -> tuple[int, int]:
        """Soft tokens across and down of a picture of this size.

        The picture is scaled, its shape kept, to the area of `most` cells, and both sides are cut to whole cells; a
        side that would vanish becomes one cell, with the other as long as the shape says, `most` cells at the most.
        """
        if width < 1 or height < 1:
            raise ProbeError(f"a picture of {width}x{height} pixels has nothing to see")
        scale = math.sqrt(self.most * self.pool**2 * self.patch**2 / (height * width))
        down, across = math.floor(scale * height / self.cell), math.floor(scale * width / self.cell)
        if down == 0:
            return min(width // height, self.most), 1
        if across == 0:
            return 1, min(height // width, self.most)
        return across, down


def is_diffusion_gemma(config: Mapping[str, Any]) -> bool:
    """Whether a config is DiffusionGemma's."""
    return config.get("model_type") == MODEL_TYPE


def part(config: Mapping[str, Any], name: str, source: str) -> dict[str, Any]:
    """One of the nested configs; an error when it is not there."""
    value = config.get(name)
    if not isinstance(value, dict):
        raise ProbeError(f"the config of {source} has no `{name}`, an object with the settings of that half")
    return value


def facts_of(checkpoint: Checkpoint) -> ModelFacts:
    """Sizes of a checkpoint from its config alone."""
    return _facts(checkpoint.source, checkpoint.config)


def published_facts() -> ModelFacts:
    """Sizes of the published model, without a download."""
    return _facts(PUBLISHED_NAME, PUBLISHED)


def _facts(source: str, config: Mapping[str, Any]) -> ModelFacts:
    text, vision = part(config, "text_config", source), part(config, "vision_config", source)
    try:
        return ModelFacts(
            name=source,
            layers=int(text["num_hidden_layers"]),
            heads=int(text["num_attention_heads"]),
            width=int(text["hidden_size"]),
            vocabulary=int(text["vocab_size"]),
            encoder_layers=int(vision["num_hidden_layers"]),
            refused=refuse_encoder(POOLED),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ProbeError(f"the config of {source} lacks a usable {error}") from error


def grid_of(checkpoint: Checkpoint) -> Grid:
    """The picture settings of a checkpoint: its processor's, else its encoder's, else transformers' defaults."""
    vision = part(checkpoint.config, "vision_config", checkpoint.source)
    processor = checkpoint.json("processor_config.json") or {}
    asked = processor.get("image_processor") or checkpoint.json("preprocessor_config.json") or {}
    most = asked.get("max_soft_tokens") or vision.get("default_output_length") or SOFT_TOKENS
    patch, pool = _sizes(vision)
    if (given := (asked.get("patch_size", patch), asked.get("pooling_kernel_size", pool))) != (patch, pool):
        what = f"the processor cuts patches of {given[0]} pixels and pools {given[1]}, the encoder {patch} and {pool}"
        raise ProbeError(f"{checkpoint.source}: {what}")
    return Grid(patch, pool, int(most))


def _sizes(vision: Mapping[str, Any]) -> tuple[int, int]:
    return int(vision.get("patch_size", 16)), int(vision.get("pooling_kernel_size", 3))


def count_visual(sizes: Sequence[tuple[int, int]], grid: Grid) -> int:
    """Soft tokens of a sample by its pictures' (width, height)."""
    return sum(across * down for across, down in (grid.fit(*size) for size in sizes))


def visual_count(checkpoint: Checkpoint, sizes: Sequence[tuple[int, int]]) -> int:
    """Soft tokens of a sample by its pictures' (width, height), from a checkpoint's small files alone."""
    return count_visual(sizes, grid_of(checkpoint))


def published_count(sizes: Sequence[tuple[int, int]]) -> int:
    """Soft tokens of a sample of the published model by its pictures' (width, height)."""
    return count_visual(sizes, Grid(*_sizes(PUBLISHED["vision_config"]), SOFT_TOKENS))


def end_ids(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Ids that end an answer: of `generation_config.json`, else of the config."""
    told = (checkpoint.json("generation_config.json") or {}).get("eos_token_id")
    if told is None:
        told = checkpoint.config.get("eos_token_id")
    if told is None:
        told = part(checkpoint.config, "text_config", checkpoint.source).get("eos_token_id", 1)
    return tuple(int(i) for i in (told if isinstance(told, list) else [told]))


def sampling_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The sampler's settings, under the names of `generation_config.json`; the entropy bound stands among them."""
    told = checkpoint.json("generation_config.json") or {}
    sampler = told.get("sampler_config") or {}
    if (kind := sampler.get("_cls_name", "EntropyBoundSamplerConfig")) != "EntropyBoundSamplerConfig":
        raise ProbeError(f"{checkpoint.source}: the sampler {kind!r} is not known; known: EntropyBoundSamplerConfig")
    given = {**told, **sampler}
    return {name: default if given.get(name) is None else given[name] for name, default in SAMPLING.items()}


def lengths_of(checkpoint: Checkpoint) -> tuple[int, int, int]:
    """`(gen_length, block_length, steps)`: whole canvases, and the steps of all of them."""
    told = checkpoint.json("generation_config.json") or {}
    canvas = int(checkpoint.config.get("canvas_length") or PUBLISHED["canvas_length"])
    canvases = math.ceil(int(told.get("max_new_tokens") or canvas) / canvas)
    return canvas * canvases, canvas, canvases * int(told.get("max_denoising_steps") or DENOISING_STEPS)
