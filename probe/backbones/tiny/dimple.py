"""A small random Dimple checkpoint with every file that the published folder has, code excepted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from probe.backbones import dimple_config as names
from probe.backbones.base import SpecialIds
from probe.backbones.dimple import Dimple
from probe.backbones.dimple_modules import decoder_config, tower_config
from probe.backbones.dimple_resize import Preprocessing
from probe.backbones.tiny.files import random_weights, save_weights, shapes_of, write_json, write_split_tokenizer
from probe.errors import ProbeError
from probe.site import ModelFacts

MERGES = (("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"))
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<|mask|>",
)  # fmt: skip
FIRST = 256 + len(MERGES)
"""Id of the first special token; bytes and merges come before."""
IDS = {token: FIRST + i for i, token in enumerate(SPECIAL)}
TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe helpful.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG: dict[str, Any] = {
    "model_type": names.MODEL_TYPE,
    "architectures": ["DimpleModel"],
    "auto_map": {"AutoConfig": "configuration_dimple.DimpleConfig", "AutoModel": "modeling_dimple.DimpleModel"},
    "vocab_size": 280,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 1e6,
    "rope_scaling": None,
    "mrope_section": [1, 1, 2],
    "use_cache": False,
    "bos_token_id": IDS["<|endoftext|>"],
    "eos_token_id": IDS["<|endoftext|>"],
    "pad_token_id": IDS["<|endoftext|>"],
    "mask_token_id": IDS["<|mask|>"],
    "image_token_id": IDS["<|image_pad|>"],
    "vision_start_token_id": IDS["<|vision_start|>"],
    "vision_end_token_id": IDS["<|vision_end|>"],
    "full_attn_mask": True,
}
VISION: dict[str, Any] = {
    "model_type": "qwen2_5_vl",
    "depth": 3,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_heads": 2,
    "out_hidden_size": 24,
    "fullatt_block_indexes": [1],
    "window_size": 56,
}
PREPROCESSOR = {"min_pixels": 3136, "max_pixels": 28 * 28 * 40, "image_processor_type": "DimpleImageProcessor"}


def axes_of(width: int, heads: int = 4) -> list[int]:
    """`mrope_section` of a width: how many frequencies each of the three axes gets, in the published proportion."""
    if width % (8 * heads):
        raise ProbeError(f"width {width} does not give three axes to each of {heads} heads; take e.g. {8 * heads}")
    half = width // heads // 2
    return [half // 4, half // 4, half - 2 * (half // 4)]


def dimple_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The model's parameters by name, none of them allocated."""
    settings, vision = names.text_settings(config), names.vision_settings(config)
    with torch.device("meta"):
        return shapes_of(
            Dimple(
                decoder_config(settings, "sdpa"),
                tower_config(vision, "sdpa"),
                facts=ModelFacts("", 0, 0, 0, 0, 0),
                special=SpecialIds(0, 0, 0, ()),
                preprocessing=Preprocessing(),
                sections=settings["mrope_section"],
                image=settings["image_token_id"],
            )
        )


def write_dimple(
    folder: Path,
    *,
    layers: int = 2,
    width: int = 32,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = True,
    preprocessor: dict[str, Any] | None = PREPROCESSOR,
    shards: int = 2,
    vision: dict[str, Any] | None = None,
    **overrides: Any,
) -> Path:
    """A Dimple in the published layout: sharded weights with an index, and all the small files."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": width * 3 // 2}
    axes = {} if "mrope_section" in overrides else {"mrope_section": axes_of(width)}
    config = {**CONFIG, **sizes, **axes, "vision_config": {**VISION, **(vision or {})}, **overrides}
    save_weights(folder, random_weights(dimple_shapes(config), seed, config["hidden_size"]), shards, dtype)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"_from_model_config": True})
    if preprocessor is not None:
        write_json(folder / "preprocessor_config.json", preprocessor)
    if tokenizer:
        write_dimple_tokenizer(folder)
    return folder


def write_dimple_tokenizer(folder: Path, template: str | None = TEMPLATE) -> None:
    """The files of a tokenizer without `tokenizer.json`, whose class is code that nobody here has."""
    said = {"chat_template": template} if template else {}
    write_split_tokenizer(
        folder,
        SPECIAL,
        kind="DimpleTokenizer",
        merges=MERGES,
        additional_special_tokens=list(SPECIAL[3:8]),
        processor_class="DimpleProcessor",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        mask_token="<|mask|>",
        errors="replace",
        model_max_length=131072,
        split_special_tokens=False,
        **said,
    )
