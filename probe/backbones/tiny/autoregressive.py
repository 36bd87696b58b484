"""Small random LLaVA-NeXT and Qwen2.5-VL checkpoints in the layouts that they are published in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from probe.backbones.tiny.dimple import axes_of
from probe.backbones.tiny.files import random_weights, save_weights, shapes_of, write_byte_tokenizer, write_json

MISTRAL_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
    "{{ ' [/INST]' }}{% endif %}{% endfor %}"
)
QWEN_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAVA_TOKENS = ("<unk>", "<s>", "</s>", "<image>", "<pad>")
QWEN_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 2, "image_size": 28, "patch_size": 7, "projection_dim": 8,
}  # fmt: skip
DECODER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 4096,
}  # fmt: skip
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]


def sizes_of(layers: int, width: int) -> dict[str, int]:
    """The sizes of a decoder under transformers' names."""
    return {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": width * 3 // 2}


def old_llava_name(name: str) -> str:
    """The name that LLaVA-NeXT's tensors are published under, from the one that they have in transformers 5."""
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    name = name.removeprefix("model.")
    if name.startswith("language_model."):
        return name.replace("language_model.", "language_model.model.", 1)
    return name.replace("vision_tower.", "vision_tower.vision_model.", 1)


def old_qwen_name(name: str) -> str:
    """The name that Qwen2.5-VL's tensors are published under: a flat `model` beside `visual`."""
    return name.replace("model.language_model.", "model.", 1).replace("model.visual.", "visual.", 1)


def same_name(name: str) -> str:
    """The name in transformers 5 itself."""
    return name


def write_llava_next(
    folder: Path,
    *,
    decoder: str = "mistral",
    layers: int = 3,
    width: int = 32,
    seed: int = 0,
    name: Callable[[str], str] = old_llava_name,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """A random LLaVA-NeXT in the layout of `llava-hf/llava-v1.6-*`."""
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    folder.mkdir(parents=True, exist_ok=True)
    window = {"sliding_window": None} if decoder == "mistral" else {}
    text = {"model_type": decoder, **DECODER, **sizes_of(layers, width), **window}
    settings: dict[str, Any] = {
        "architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next", "image_token_index": 3,
        "text_config": text, "vision_config": CLIP, "image_grid_pinpoints": PINPOINTS, "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default", "projector_hidden_act": "gelu", "tie_word_embeddings": False,
    } | config  # fmt: skip
    write_json(folder / "config.json", settings)
    with torch.device("meta"):
        native = LlavaNextForConditionalGeneration(LlavaNextConfig.from_dict(dict(settings)))
    weights = random_weights(shapes_of(native), seed, settings["text_config"]["hidden_size"])
    save_weights(folder, {name(n): value for n, value in weights.items()}, dtype=dtype)
    write_byte_tokenizer(folder, LLAVA_TOKENS, bos="<s>", eos="</s>", pad="<pad>", adds_bos=True)
    write_json(folder / "chat_template.json", {"chat_template": MISTRAL_TEMPLATE})
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 4})
    side = settings["vision_config"]["image_size"]
    write_json(
        folder / "preprocessor_config.json",
        {
            "size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side},
            "image_grid_pinpoints": settings["image_grid_pinpoints"],
        },
    )  # fmt: skip
    return folder


QWEN_TOWER = {
    "depth": 4, "hidden_size": 32, "intermediate_size": 24, "num_heads": 4, "out_hidden_size": 32, "patch_size": 4,
    "fullatt_block_indexes": [1, 3], "window_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
    "tokens_per_second": 2,
}  # fmt: skip


def write_qwen_vl(
    folder: Path,
    *,
    layers: int = 3,
    width: int = 32,
    seed: int = 0,
    name: Callable[[str], str] = old_qwen_name,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """A random Qwen2.5-VL in the layout of `Qwen/Qwen2.5-VL-7B-Instruct`, the decoder's settings flat."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", **DECODER,
        **sizes_of(layers, width), "rope_theta": 1e4, "rms_norm_eps": 1e-6,
        "rope_scaling": {"type": "mrope", "mrope_section": axes_of(width)},
        "use_sliding_window": False, "sliding_window": 4096, "bos_token_id": 0, "eos_token_id": 2,
        "tie_word_embeddings": False, "vision_config": QWEN_TOWER | {"out_hidden_size": width},
        "vision_start_token_id": 3, "vision_end_token_id": 4, "image_token_id": 6, "video_token_id": 7,
    } | config  # fmt: skip
    write_json(folder / "config.json", settings)
    with torch.device("meta"):
        native = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(json.loads(json.dumps(settings))))
    weights = random_weights(shapes_of(native), seed, settings["hidden_size"])
    if settings["tie_word_embeddings"]:
        del weights["lm_head.weight"]
    save_weights(folder, {name(n): value for n, value in weights.items()}, dtype=dtype)
    end, pad = QWEN_TOKENS[2], QWEN_TOKENS[0]
    write_byte_tokenizer(folder, QWEN_TOKENS, bos=None, eos=end, pad=pad, chat_template=QWEN_TEMPLATE)
    write_json(folder / "generation_config.json", {"eos_token_id": [2, 0], "pad_token_id": 0, "do_sample": False})
    pixels = {"min_pixels": 256, "max_pixels": 4096, "patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    write_json(folder / "preprocessor_config.json", pixels)
    return folder


def write_llava_mistral(folder: Path, **settings: Any) -> Path:
    """A LLaVA-NeXT over Mistral; settings as of `write_llava_next`."""
    return write_llava_next(folder, decoder="mistral", **settings)


def write_llava_vicuna(folder: Path, **settings: Any) -> Path:
    """A LLaVA-NeXT over Llama; settings as of `write_llava_next`."""
    return write_llava_next(folder, decoder="llama", **settings)
