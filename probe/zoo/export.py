"""Writes a miniature as a checkpoint folder with its class's published names and fields: LLaDA-V's here.

`write_folder` is common to the three classes; the fields of the other two are in `export_contrast`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, SiglipVisionConfig

LONG_ANSWER = 48  # tokens: what the loop is asked for when neither a task nor a recipe says otherwise
GENERATION = {"gen_length": LONG_ANSWER, "block_length": LONG_ANSWER, "steps": LONG_ANSWER // 2}
TOWER_PREFIX = "model.vision_tower.vision_tower.vision_model."
_PREFIXES = (("lm.", "model."), ("lm_head.", "lm_head."), ("projector.", "model.mm_projector."))


def published_names(model: Mapping[str, Tensor], tower: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys of the training modules to those of the published checkpoint (the doubled tower is real)."""
    out: dict[str, Tensor] = {}
    for key, value in model.items():
        if key == "newline":
            out["model.image_newline"] = value
            continue
        old, new = next((o, n) for o, n in _PREFIXES if key.startswith(o))
        out[new + key.removeprefix(old)] = value
    out |= {TOWER_PREFIX + key: value for key, value in tower.items()}
    return out


def language_fields(lm: LlamaConfig, tower: SiglipVisionConfig, special: Mapping[str, int]) -> dict[str, Any]:
    """The fields of the published ``config.json``, with this model's sizes."""
    tile = tower.image_size
    return {
        "vocab_size": lm.vocab_size,
        "max_position_embeddings": lm.max_position_embeddings,
        "hidden_size": lm.hidden_size,
        "intermediate_size": lm.intermediate_size,
        "num_hidden_layers": lm.num_hidden_layers,
        "num_attention_heads": lm.num_attention_heads,
        "num_key_value_heads": lm.num_key_value_heads,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": lm.rms_norm_eps,
        "pretraining_tp": 1,
        "use_cache": False,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "bos_token_id": special["bos"],
        "pad_token_id": None,
        "eos_token_id": special["eos"],
        "mask_token_id": special["mask"],
        "mm_vision_tower": "siglip-miniature",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": tower.hidden_size,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "spatial_unpad",
        "image_aspect_ratio": "anyres_max_4",
        "image_grid_pinpoints": [[tile * i, tile * j] for i in range(1, 7) for j in range(1, 7)],
        "mm_newline_position": "grid",
        "mm_spatial_pool_mode": "bilinear",
        "mm_spatial_pool_stride": 2,
        "add_faster_video": False,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": 16384,
        "use_mm_proj": True,
        "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
        "torch_dtype": "float16",
        "model_type": "llava_llada",
        "architectures": ["LlavaLLaDAModelLM"],
    }


def vision_fields(tower: SiglipVisionConfig) -> dict[str, Any]:
    """The fields of ``vision_config.json``."""
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": tower.hidden_size,
        "intermediate_size": tower.intermediate_size,
        "num_hidden_layers": tower.num_hidden_layers + 1,
        "num_attention_heads": tower.num_attention_heads,
        "image_size": tower.image_size,
        "patch_size": tower.patch_size,
        "num_channels": 3,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": tower.layer_norm_eps,
        "attention_dropout": 0.0,
        "note": "num_hidden_layers counts the layer dropped on loading; model.safetensors holds one fewer",
    }


def write_folder(
    folder: Path, weights: Mapping[str, Tensor], files: Mapping[str, Mapping[str, Any]], tokenizer_folder: Path
) -> None:
    """Weights in float16, JSON ``files`` by name, the tokenizer; the weights appear whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = {k: v.detach().to(torch.float16).contiguous() for k, v in weights.items()}
    partial = folder / "model.safetensors.partial"
    save_file(stored, partial, metadata={"format": "pt"})
    partial.chmod(0o644)  # the writer makes it private
    os.replace(partial, folder / "model.safetensors")
    for name, fields in files.items():
        (folder / name).write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (tokenizer_folder / name).resolve() != (folder / name).resolve():
            shutil.copyfile(tokenizer_folder / name, folder / name)


def export(
    folder: Path, model: Mapping[str, Tensor], tower: Mapping[str, Tensor], lm: LlamaConfig,
    vision: SiglipVisionConfig, special: Mapping[str, int], tokenizer_folder: Path,
) -> None:  # fmt: skip
    """Write a LLaDA-V."""
    files = {
        "config.json": language_fields(lm, vision, special),
        "vision_config.json": vision_fields(vision),
        "generation_config.json": GENERATION,
    }
    write_folder(folder, published_names(model, tower), files, tokenizer_folder)
