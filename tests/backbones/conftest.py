"""Small random LLaDA-V checkpoints on disk, with or without an encoder and a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image
from safetensors.torch import save_file

from probe.backbones import llada_v_config as names
from probe.backbones.base import SpecialIds
from probe.backbones.bidirectional import llama_config
from probe.backbones.llada_v import LladaV
from probe.backbones.siglip import siglip_config
from probe.site import ModelFacts

settings.register_profile("no-deadline", deadline=None)  # a busy machine is no failure
settings.load_profile("no-deadline")

CONFIG: dict[str, Any] = {
    "model_type": "llava_llada",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "tokenizer_model_max_length": 16384,
}
PICTURES: dict[str, Any] = {
    "mm_vision_tower": "siglip-tiny",
    "mm_projector_type": "mlp2x_gelu",
    "mm_hidden_size": 16,
    "image_aspect_ratio": "anyres_max_4",
    "image_grid_pinpoints": "(1x1),...,(3x3)",
    "mm_patch_merge_type": "spatial_unpad",
    "mm_newline_position": "grid",
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 30,
    "patch_size": 7,
    "num_channels": 3,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
SPECIAL = (names.BOS, names.EOS, names.MASK, names.START_HEADER, names.END_HEADER, names.EOT)
STAND_IN = SpecialIds(mask=2, eos=1, stop=5, suppressed=(1, 0, 3, 4))
"""Ids of the special tokens in the tokenizer that `write_tokenizer` makes."""


def write_tokenizer(folder: Path, adds_bos: bool = False) -> int:
    """A tokenizer of bytes with LLaDA-V's special tokens; returns its length."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {t: i for i, t in enumerate([*(s.text for s in SPECIAL), *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(s.text, special=True, normalized=False) for s in SPECIAL])
    if adds_bos:
        bos = names.BOS.text
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names.BOS.text,
        "eos_token": names.EOS.text,
        "pad_token": names.EOS.text,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return len(vocabulary)


def write_checkpoint(
    folder: Path,
    *,
    pictures: bool = True,
    tokenizer: bool = True,
    adds_bos: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> Path:
    """A random checkpoint under published names."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, **(PICTURES if pictures else {}), **overrides}
    with torch.device("meta"):
        shapes = LladaV(
            llama_config(config, config["vocab_size"], "sdpa"),
            siglip_config(VISION, "sdpa") if pictures else None,
            facts=ModelFacts("", 0, 0, 0, 0, 0),
            special=STAND_IN,
            projector_type=config.get("mm_projector_type", "linear"),
        ).state_dict()
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, like in shapes.items():
        value = torch.randn(like.shape, generator=generator) * (0.02 if "embed" in name else 0.15)
        weights[LladaV.published_name(name, {})] = (value + ("norm" in name and "weight" in name)).to(dtype)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if pictures:
        (folder / "vision_config.json").write_text(json.dumps(VISION), encoding="utf-8")
    if tokenizer:
        write_tokenizer(folder, adds_bos)
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """`checkpoint(**changes)` writes a checkpoint into a fresh folder and returns it."""
    made = []

    def make(**changes: Any) -> Path:
        made.append(None)
        return write_checkpoint(tmp_path / f"checkpoint{len(made)}", **changes)

    return make


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One checkpoint with everything, for tests that only read."""
    return write_checkpoint(tmp_path_factory.mktemp("small"))


@pytest.fixture
def stand_in() -> SpecialIds:
    """The special ids of checkpoints that have no tokenizer."""
    return STAND_IN


@pytest.fixture(scope="session")
def picture() -> Callable[[int, int], Image.Image]:
    """`picture(width, height)` is smooth noise in colour, the same every time."""

    def make(width: int, height: int) -> Image.Image:
        noise = np.random.default_rng(width * 10007 + height).integers(0, 255, (height, width, 3), dtype=np.uint8)
        return Image.fromarray(noise)

    return make
