"""What the small files of a LLaVA-like checkpoint say before any weight is read: encoder, tiles, sizes. No torch.

Common to the models that put SigLIP views through a projector and lay them out as tiles (LLaDA-V, LaViDa).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probe.backbones.anyres import Geometry, Tiling, geometry_of
from probe.backbones.checkpoint import Checkpoint
from probe.errors import ProbeError
from probe.site import ModelFacts

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


@dataclass(frozen=True)
class SpecialToken:
    """A token that the decoding rule needs: its string, and its id in the published vocabulary."""

    text: str
    id: int


def vision_settings(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The encoder's settings, its last layer still counted; None when there is a language model alone.

    They stand in vision_config.json, or as `vision_config` in config.json; published checkpoints name the tower.
    """
    config = checkpoint.config
    if not config.get("mm_vision_tower"):
        return None
    told = checkpoint.json("vision_config.json") or config.get("vision_config")
    return told if isinstance(told, dict) else tower_named(config, checkpoint.folder)


def tower_named(config: Mapping[str, Any], where: object) -> dict[str, Any]:
    """The settings of the tower that a config names: a Hub id, or the path that it had where it was trained."""
    name = str(config.get("mm_vision_tower"))
    if "siglip" in name and ("so400m-patch14-384" in name or config.get("mm_hidden_size") == 1152):
        return SIGLIP_SO400M
    raise ProbeError(
        f"{where}: `mm_vision_tower` is {name!r}, whose sizes are not known; "
        "put the encoder's settings into vision_config.json beside config.json"
    )


def tower_geometry(config: Mapping[str, Any], vision: Mapping[str, Any], pool: str | None = None) -> Geometry:
    """Tiles, canvases, the limit of tokens, and how views are pooled."""
    merge = config.get("mm_patch_merge_type", "spatial_unpad")
    if merge != "spatial_unpad":
        raise ProbeError(f"`mm_patch_merge_type` is {merge!r}; supported: spatial_unpad")
    return geometry_of(config, tile=int(vision["image_size"]), patch=int(vision["patch_size"]), pool=pool)


def count_visual(sizes: Sequence[tuple[int, int]], geometry: Geometry) -> int:
    """Visual tokens of a sample by its pictures' (width, height): tiles for one, a square of patches each for more."""
    if len(sizes) == 1 and geometry.pinpoints:
        return Tiling(geometry, *sizes[0]).count
    return len(sizes) * geometry.patches**2


def model_facts(
    name: str,
    config: Mapping[str, Any],
    vocabulary: int,
    vision: Mapping[str, Any] | None,
    *,
    text_tower: bool = False,
) -> ModelFacts:
    """Sizes from a config whose fields are named as transformers names them."""
    try:
        return ModelFacts(
            name=name,
            layers=int(config["num_hidden_layers"]),
            heads=int(config["num_attention_heads"]),
            width=int(config["hidden_size"]),
            vocabulary=vocabulary,
            encoder_layers=int(vision["num_hidden_layers"]) - 1 if vision else 0,
            patches=(int(vision["image_size"]) // int(vision["patch_size"])) ** 2 if vision else 0,
            text_tower=text_tower,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ProbeError(f"the config of {name} lacks a usable {error}") from error


def tokenizer_length(checkpoint: Checkpoint) -> int | None:
    """Tokens that the checkpoint's tokenizer knows, added ones included; None without a tokenizer."""
    path = checkpoint.folder / "tokenizer.json"
    if path.is_file():
        from tokenizers import Tokenizer

        return int(Tokenizer.from_file(str(path)).get_vocab_size(with_added_tokens=True))
    vocabulary = checkpoint.json("vocab.json")
    if vocabulary is None or not (checkpoint.folder / "merges.txt").is_file():
        return None
    settings = checkpoint.json("tokenizer_config.json") or {}
    added = [str(t.get("content")) for t in (settings.get("added_tokens_decoder") or {}).values()]
    return len({*vocabulary, *(checkpoint.json("added_tokens.json") or {}), *added})


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
