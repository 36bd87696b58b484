"""Writes the contrast miniatures as checkpoint folders: a LLaVA-NeXT with a Qwen2 decoder, and a LaViDa-Dream."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPVisionConfig, Qwen2Config, SiglipVisionConfig

from probe.zoo.export import GENERATION, published_names, vision_fields, write_folder

GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""Published canvases of both classes, in tiles: across and down, or down and across; the set is the same."""
LLAVA_TOWER = "vision_tower.vision_model."
_LLAVA_PARTS = (
    ("lm.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("projector.0.", "multi_modal_projector.linear_1."),
    ("projector.2.", "multi_modal_projector.linear_2."),
)


def llava_name(key: str) -> str:
    """The published name of one of the training module's parameters."""
    if key == "newline":
        return "image_newline"
    old, new = next((o, n) for o, n in _LLAVA_PARTS if key.startswith(o))
    return new + key.removeprefix(old)


def llava_weights(folder: Path, keys: list[str]) -> dict[str, Tensor]:
    """The training module's parameters ``keys`` out of an exported LLaVA-NeXT, float32."""
    weights = load_file(folder / "model.safetensors")
    return {key: weights[llava_name(key)].float() for key in keys}


def _decoder_fields(lm: Qwen2Config) -> dict[str, Any]:
    return {
        "vocab_size": lm.vocab_size,
        "hidden_size": lm.hidden_size,
        "intermediate_size": lm.intermediate_size,
        "num_hidden_layers": lm.num_hidden_layers,
        "num_attention_heads": lm.num_attention_heads,
        "num_key_value_heads": lm.num_key_value_heads,
        "hidden_act": "silu",
        "rms_norm_eps": lm.rms_norm_eps,
        "rope_theta": 10000.0,
        "max_position_embeddings": lm.max_position_embeddings,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
    }


def llava_fields(lm: Qwen2Config, tower: CLIPVisionConfig, special: Mapping[str, int]) -> dict[str, Any]:
    """``config.json`` as transformers' LLaVA-NeXT has it; features are those of the last layer, which is kept."""
    tile = tower.image_size
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": tower.hidden_size,
        "intermediate_size": tower.intermediate_size,
        "num_hidden_layers": tower.num_hidden_layers,
        "num_attention_heads": tower.num_attention_heads,
        "image_size": tile,
        "patch_size": tower.patch_size,
        "hidden_act": tower.hidden_act,
        "layer_norm_eps": tower.layer_norm_eps,
        "projection_dim": tower.projection_dim,
    }
    return {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "model_type": "llava_next",
        "image_token_index": special["picture"],
        "text_config": {"model_type": "qwen2", **_decoder_fields(lm), "eos_token_id": special["end"]},
        "vision_config": vision,
        "image_grid_pinpoints": [[tile * down, tile * across] for across, down in GRIDS],
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "use_image_newline_parameter": True,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    }


def lavida_fields(lm: Qwen2Config, tower: SiglipVisionConfig, special: Mapping[str, int]) -> dict[str, Any]:
    """``config.json`` as published for LaViDa-Dream."""
    tile = tower.image_size
    return {
        "architectures": ["LlavaDreamForMaskedDiffusion"],
        "model_type": "llava_dream",
        **_decoder_fields(lm),
        "rope_scaling": None,
        "bos_token_id": special["bos"],
        "eos_token_id": special["eos"],
        "pad_token_id": special["eos"],
        "mask_token_id": special["mask"],
        "mm_vision_tower": "siglip-miniature",
        "mm_hidden_size": tower.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_patch_merge_type": "spatial_unpad",
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": [[tile * across, tile * down] for across, down in GRIDS],
        "mm_spatial_pool_mode": "bilinear",
        "mm_spatial_pool_stride": 2,
        "mm_newline_position": "grid",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "tokenizer_model_max_length": 4096,
        "use_cache": False,
        "torch_dtype": "float16",
    }


def export_llava(
    folder: Path, model: Mapping[str, Tensor], tower: Mapping[str, Tensor], lm: Qwen2Config,
    vision: CLIPVisionConfig, special: Mapping[str, int], tokenizer_folder: Path,
) -> None:  # fmt: skip
    """Write a LLaVA-NeXT under its published names."""
    weights = {llava_name(key): value for key, value in model.items()}
    weights |= {LLAVA_TOWER + key: value for key, value in tower.items()}
    files = {
        "config.json": llava_fields(lm, vision, special),
        "preprocessor_config.json": {"image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        "generation_config.json": GENERATION | {"eos_token_id": special["end"], "pad_token_id": special["eos"]},
    }
    write_folder(folder, weights, files, tokenizer_folder)


def export_lavida(
    folder: Path, model: Mapping[str, Tensor], tower: Mapping[str, Tensor], lm: Qwen2Config,
    vision: SiglipVisionConfig, special: Mapping[str, int], tokenizer_folder: Path,
) -> None:  # fmt: skip
    """Write a LaViDa-Dream under its published names."""
    files = {"config.json": lavida_fields(lm, vision, special), "vision_config.json": vision_fields(vision)}
    write_folder(folder, published_names(model, tower), files, tokenizer_folder)
