"""Small random Dimple checkpoints on disk, with every file that the published folder has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from probe.backbones import dimple_config as names
from probe.backbones.base import SpecialIds
from probe.backbones.dimple import Dimple
from probe.backbones.dimple_modules import decoder_config, tower_config
from probe.backbones.dimple_resize import Preprocessing
from probe.site import ModelFacts

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<|mask|>",
)  # fmt: skip
FIRST = 260
"""Id of the first special token; bytes and merges come before."""
IDS = {token: FIRST + i for i, token in enumerate(SPECIAL)}
STAND_IN = SpecialIds(mask=IDS["<|mask|>"], eos=IDS["<|im_end|>"], stop=IDS["<|im_end|>"], suppressed=())
MERGES = (("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"))
TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe helpful.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG: dict[str, Any] = {
    "model_type": "dimple",
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


def write_tokenizer(folder: Path, template: str | None = TEMPLATE) -> None:
    """The files of a tokenizer without `tokenizer.json`, whose class is code that nobody here has."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*letters, *("".join(pair) for pair in MERGES)])}
    assert len(vocabulary) == FIRST
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    merges = "".join(f"{a} {b}\n" for a, b in MERGES)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    (folder / "added_tokens.json").write_text(json.dumps(IDS), encoding="utf-8")
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    settings = {
        "added_tokens_decoder": {str(i): {"content": token, **flags} for token, i in IDS.items()},
        "additional_special_tokens": list(SPECIAL[3:8]),
        "auto_map": {"AutoTokenizer": ["tokenization_dimple.DimpleTokenizer", None]},
        "tokenizer_class": "DimpleTokenizer",
        "processor_class": "DimpleProcessor",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": 131072,
        "split_special_tokens": False,
    }
    settings |= {"chat_template": template} if template else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def shapes_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The model's parameters by name, none of them allocated."""
    settings, vision = names.text_settings(config), names.vision_settings(config)
    with torch.device("meta"):
        model = Dimple(
            decoder_config(settings, "sdpa"),
            tower_config(vision, "sdpa"),
            facts=ModelFacts("", 0, 0, 0, 0, 0),
            special=STAND_IN,
            preprocessing=Preprocessing(),
            sections=settings["mrope_section"],
            image=settings["image_token_id"],
        )
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def write_dimple(
    folder: Path,
    *,
    tokenizer: bool = True,
    preprocessor: dict[str, Any] | None = PREPROCESSOR,
    shards: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    vision: dict[str, Any] | None = None,
    **overrides: Any,
) -> Path:
    """A random checkpoint in the published layout: sharded weights with an index, and all the small files."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, "vision_config": {**VISION, **(vision or {})}, **overrides}
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes_of(config).items():
        value = torch.randn(shape, generator=generator) * (0.5 if "embed_tokens" in name else 0.2)
        weights[name] = (value + ("norm" in name and "weight" in name)).to(dtype)
    places = {}
    for part in range(shards):
        file = f"model-{part + 1:05d}-of-{shards:05d}.safetensors"
        own = sorted(weights)[part::shards]
        save_file({name: weights[name] for name in own}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(own, file)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "generation_config.json").write_text('{"_from_model_config": true}', encoding="utf-8")
    for code in ("configuration_dimple.py", "modeling_dimple.py", "tokenization_dimple.py"):
        (folder / code).write_text("raise SystemExit('code of a checkpoint was run')\n", encoding="utf-8")
    if preprocessor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor), encoding="utf-8")
    if tokenizer:
        write_tokenizer(folder)
    return folder
