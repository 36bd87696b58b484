"""Small random checkpoints of the LLaVA family: LLaDA-V, and LaViDa with either decoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from probe.backbones import lavida_config, llada_v_config
from probe.backbones.base import SpecialIds
from probe.backbones.lavida import Lavida
from probe.backbones.llada_v import LladaV
from probe.backbones.siglip import siglip_config
from probe.backbones.tiled import TiledBackbone
from probe.backbones.tiled_config import tower_named
from probe.backbones.tiny.files import (
    random_weights,
    save_weights,
    shapes_of,
    write_byte_tokenizer,
    write_json,
    write_split_tokenizer,
)
from probe.site import ModelFacts

ROWS = 320
"""Stored rows of the vocabulary, more than any of the tokenizers has tokens."""
LLADA_TOKENS = tuple(
    token.text
    for token in (
        llada_v_config.BOS,
        llada_v_config.EOS,
        llada_v_config.MASK,
        llada_v_config.START_HEADER,
        llada_v_config.END_HEADER,
        llada_v_config.EOT,
    )
)
DREAM_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>")
MERGES = (("h", "e"),)

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
LAVIDA_VISION: dict[str, Any] = VISION | {"image_size": 80, "patch_size": 14}

_SHARED: dict[str, Any] = {
    "mm_vision_tower": "siglip-tiny",
    "mm_projector_type": "mlp2x_gelu",
    "mm_hidden_size": 16,
    "mm_patch_merge_type": "spatial_unpad",
    "mm_newline_position": "grid",
}
PICTURES: dict[str, Any] = _SHARED | {
    "image_aspect_ratio": "anyres_max_4",
    "image_grid_pinpoints": "(1x1),...,(3x3)",
}
LAVIDA_PICTURES: dict[str, Any] = _SHARED | {
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": [[80, 160], [160, 80], [160, 160], [240, 80], [80, 240]],
    "mm_spatial_pool_mode": "bilinear",
    "tokenizer_model_max_length": 4096,
    "use_cache": False,
    "top_k": 50,
}
LLADA_V: dict[str, Any] = {
    "model_type": llada_v_config.MODEL_TYPE,
    "vocab_size": ROWS,
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
DREAM: dict[str, Any] = {
    "model_type": lavida_config.DREAM_TYPE,
    "vocab_size": ROWS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": None,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
}
LLADA: dict[str, Any] = {
    "model_type": lavida_config.LLADA_TYPE,
    "vocab_size": ROWS,
    "embedding_size": ROWS,
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 4,
    "mlp_hidden_size": 48,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "block_type": "llama",
    "layer_norm_type": "rms",
    "activation_type": "silu",
    "rope": True,
    "alibi": False,
    "include_bias": False,
    "weight_tying": False,
    "tie_word_embeddings": True,  # transformers' default, which means nothing here
}
DREAM_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLADA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def write_llada_v(
    folder: Path,
    *,
    layers: int = 2,
    width: int = 32,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    pictures: bool = True,
    tokenizer: bool = True,
    adds_bos: bool = False,
    shards: int = 1,
    **overrides: Any,
) -> Path:
    """A LLaDA-V in the published layout: config, encoder's settings, weights, tokenizer without a chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": width * 3 // 2}
    config = {**LLADA_V, **sizes, **(PICTURES if pictures else {}), **overrides}
    _write_model(LladaV, folder, config, VISION if pictures else None, ROWS, seed, shards, dtype)
    if tokenizer:
        bos, end = llada_v_config.BOS.text, llada_v_config.EOS.text
        write_byte_tokenizer(folder, LLADA_TOKENS, bos=bos, eos=end, pad=end, adds_bos=adds_bos)
    return folder


def write_lavida(
    folder: Path,
    kind: str,
    *,
    layers: int = 2,
    width: int = 32,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    pictures: bool = True,
    tokenizer: bool = True,
    template: str | None = "",
    rows: int | None = None,
    shards: int = 3,
    **overrides: Any,
) -> Path:
    """A LaViDa-`dream` or LaViDa-`llada`; `rows` of the vocabulary are stored where they are not the config's.

    `template` "" is the kind's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wide = width * 3 // 2
    if kind == "dream":
        sizes = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": wide}
    else:
        sizes = {"n_layers": layers, "d_model": width, "mlp_hidden_size": wide}
    own = DREAM if kind == "dream" else LLADA
    config = {**own, **sizes, **(LAVIDA_PICTURES if pictures else {}), **overrides}
    stored = rows or config["vocab_size"]
    _write_model(Lavida, folder, config, LAVIDA_VISION if pictures else None, stored, seed, shards, dtype)
    if tokenizer:
        write_lavida_tokenizer(folder, kind, template)
    return folder


def write_lavida_dream(folder: Path, **settings: Any) -> Path:
    """A LaViDa-Dream; settings as of `write_lavida`."""
    return write_lavida(folder, "dream", **settings)


def write_lavida_llada(folder: Path, **settings: Any) -> Path:
    """A LaViDa-LLaDA; settings as of `write_lavida`."""
    return write_lavida(folder, "llada", **settings)


def write_lavida_tokenizer(folder: Path, kind: str, template: str | None = "") -> int:
    """Bytes and the kind's special tokens: Dream's as vocab.json and merges.txt, LLaDA's as tokenizer.json."""
    end = "<|endoftext|>"
    own = DREAM_TEMPLATE if kind == "dream" else LLADA_TEMPLATE
    said: dict[str, Any] = {} if template is None else {"chat_template": template or own}
    if kind == "dream":
        names = {"bos_token": "<|beginoftext|>", "eos_token": end, "pad_token": end}
        return write_split_tokenizer(folder, DREAM_TOKENS, kind="DreamTokenizer", merges=MERGES, **names, **said)
    bos = llada_v_config.BOS.text
    return write_byte_tokenizer(folder, LLADA_TOKENS, bos=bos, eos=end, pad=end, merges=MERGES, last=True, **said)


def _write_model(
    kind: type[TiledBackbone],
    folder: Path,
    config: Mapping[str, Any],
    vision: Mapping[str, Any] | None,
    rows: int,
    seed: int,
    shards: int,
    dtype: torch.dtype,
) -> None:
    """Config, encoder's settings and weights under their published names."""
    shapes = _shapes(kind, config, vision, rows)
    weights = random_weights(shapes, seed, kind.decoder_config(config, rows, "sdpa").hidden_size)
    save_weights(folder, {kind.published_name(n, config): w for n, w in weights.items()}, shards, dtype)
    write_json(folder / "config.json", config)
    if vision:
        write_json(folder / "vision_config.json", vision)


def published_shapes(kind: type[TiledBackbone], config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors that a checkpoint with this config has, by their published names; none is allocated."""
    shapes = _shapes(kind, config, tower_named(config, kind.__name__), int(config["vocab_size"]))
    return {kind.published_name(name, config): shape for name, shape in shapes.items()}


def _shapes(
    kind: type[TiledBackbone], config: Mapping[str, Any], vision: Mapping[str, Any] | None, rows: int
) -> dict[str, tuple[int, ...]]:
    """The tensors of a model by its own names."""
    with torch.device("meta"):
        return shapes_of(
            kind(
                kind.decoder_config(config, rows, "sdpa"),
                siglip_config(vision, "sdpa") if vision else None,
                facts=ModelFacts("", 0, 0, 0, 0, 0),
                special=SpecialIds(0, 0, 0, ()),
                projector_type=config.get("mm_projector_type", "linear"),
            )
        )
