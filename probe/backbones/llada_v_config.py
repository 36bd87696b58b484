"""What LLaDA-V's config says before any weight is read: sizes, special tokens, counts. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from probe.backbones.anyres import Geometry, Tiling, geometry_of
from probe.backbones.checkpoint import Checkpoint
from probe.errors import ProbeError
from probe.site import ModelFacts

MODEL_TYPE = "llava_llada"
PUBLISHED_NAME = "GSAI-ML/LLaDA-V"

SIGLIP_SO400M: dict[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "num_channels": 3,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
"""SigLIP (and SigLIP 2) so400m at 384 pixels; the last of its layers is dropped."""

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


@dataclass(frozen=True)
class SpecialToken:
    """A token that the decoding rule needs: its string, and its id in the published vocabulary."""

    text: str
    id: int


MASK = SpecialToken("<|mdm_mask|>", 126336)
BOS = SpecialToken("<|startoftext|>", 126080)
EOS = SpecialToken("<|endoftext|>", 126081)
START_HEADER = SpecialToken("<|start_header_id|>", 126346)
END_HEADER = SpecialToken("<|end_header_id|>", 126347)
EOT = SpecialToken("<|eot_id|>", 126348)


def is_llada_v(config: Mapping[str, Any]) -> bool:
    """Whether a config is LLaDA-V's. LaViDa uses the same model type but names its sizes differently."""
    return config.get("model_type") == MODEL_TYPE and "hidden_size" in config


def vision_settings(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The encoder's settings, its last layer still counted; None when there is a language model alone."""
    tower = checkpoint.config.get("mm_vision_tower")
    beside = checkpoint.json("vision_config.json")
    if not tower:
        return None
    return _tower_named(str(tower), checkpoint.folder) if beside is None else beside


def _tower_named(name: str, where: object) -> dict[str, Any]:
    if "siglip" in name and "so400m-patch14-384" in name:
        return SIGLIP_SO400M
    raise ProbeError(
        f"{where}: `mm_vision_tower` is {name!r}, whose sizes are not known; "
        "put the encoder's settings into vision_config.json beside config.json"
    )


def tower_geometry(config: Mapping[str, Any], vision: Mapping[str, Any]) -> Geometry:
    """Tiles, canvases and the limit of tokens."""
    merge = config.get("mm_patch_merge_type", "spatial_unpad")
    if merge != "spatial_unpad":
        raise ProbeError(f"`mm_patch_merge_type` is {merge!r}; supported: spatial_unpad")
    return geometry_of(config, tile=int(vision["image_size"]), patch=int(vision["patch_size"]))


def count_visual(sizes: Sequence[tuple[int, int]], geometry: Geometry) -> int:
    """Visual tokens of a sample by its pictures' (width, height): tiles for one, a square each for more."""
    if len(sizes) == 1 and geometry.pinpoints:
        return Tiling(geometry, *sizes[0]).count
    return len(sizes) * geometry.side**2


def visual_token_count(
    width: int, height: int, config: Mapping[str, Any], vision: Mapping[str, Any] | None = None
) -> int:
    """Visual tokens of one picture under a config, without opening the picture.

    `vision` are the encoder's settings, by default those of the tower that the config names.
    """
    settings = vision or _tower_named(str(config.get("mm_vision_tower")), "the config")
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
    return _facts(PUBLISHED_NAME, PUBLISHED, PUBLISHED_TOKENS, SIGLIP_SO400M)


def facts_of(checkpoint: Checkpoint) -> ModelFacts:
    """Sizes of a checkpoint from its small files alone; the vocabulary is cut to the tokenizer."""
    vocabulary = tokenizer_length(checkpoint) or int(checkpoint.config["vocab_size"])
    facts = _facts(checkpoint.source, checkpoint.config, vocabulary, vision_settings(checkpoint))
    return replace(facts, text_tower=checkpoint.has_text_tower)


def _facts(name: str, config: Mapping[str, Any], vocabulary: int, vision: Mapping[str, Any] | None) -> ModelFacts:
    try:
        return ModelFacts(
            name=name,
            layers=int(config["num_hidden_layers"]),
            heads=int(config["num_attention_heads"]),
            width=int(config["hidden_size"]),
            vocabulary=vocabulary,
            encoder_layers=int(vision["num_hidden_layers"]) - 1 if vision else 0,
            patches=(int(vision["image_size"]) // int(vision["patch_size"])) ** 2 if vision else 0,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ProbeError(f"the config of {name} lacks a usable {error}") from error


def tokenizer_length(checkpoint: Checkpoint) -> int | None:
    """Tokens that the checkpoint's tokenizer knows, added ones included; None without a tokenizer."""
    path = checkpoint.folder / "tokenizer.json"
    if not path.is_file():
        return None
    from tokenizers import Tokenizer

    return int(Tokenizer.from_file(str(path)).get_vocab_size(with_added_tokens=True))


def generation_lengths(folder: Path) -> dict[str, Any]:
    """What an optional `generation_config.json` says of `gen_length`, `block_length` and `steps`."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ProbeError(f"{path} is not JSON: {error}") from None
    return {k: told[k] for k in ("gen_length", "block_length", "steps") if isinstance(told.get(k), int)}
