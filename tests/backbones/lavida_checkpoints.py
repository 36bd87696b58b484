"""Small random LaViDa checkpoints in the published layout: shards with an index, tokenizer files, config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from probe.backbones.base import SpecialIds
from probe.backbones.lavida import Lavida
from probe.backbones.siglip import siglip_config
from probe.site import ModelFacts

ROWS = 300
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 80,
    "patch_size": 14,
}
PICTURES: dict[str, Any] = {
    "mm_vision_tower": "siglip-tiny",
    "mm_projector_type": "mlp2x_gelu",
    "mm_hidden_size": 16,
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": [[80, 160], [160, 80], [160, 160], [240, 80], [80, 240]],
    "mm_patch_merge_type": "spatial_unpad",
    "mm_spatial_pool_mode": "bilinear",
    "mm_newline_position": "grid",
    "tokenizer_model_max_length": 4096,
    "use_cache": False,
    "top_k": 50,
}
DREAM: dict[str, Any] = {
    "model_type": "llava_dream",
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
    "model_type": "llava_llada",
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
CONFIGS = {"dream": DREAM, "llada": LLADA}
ADDED = {
    "dream": ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>"),
    "llada": (
        "<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    ),
}  # fmt: skip
BOS = {"dream": "<|beginoftext|>", "llada": "<|startoftext|>"}
TEMPLATES = {
    "dream": (
        "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llada": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
}


def write_tokenizer(folder: Path, kind: str, template: str | None) -> int:
    """Bytes and the kind's special tokens: Dream's as vocab.json and merges.txt, LLaDA's as tokenizer.json."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {t: i for i, t in enumerate([*letters, "he"])}
    added = {len(vocabulary) + i: t for i, t in enumerate(ADDED[kind])}
    settings: dict[str, Any] = {
        "bos_token": BOS[kind],
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    }
    if template is not None:
        settings["chat_template"] = template
    if kind == "dream":
        flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
        settings["added_tokens_decoder"] = {str(i): {"content": t, **flags} for i, t in added.items()}
        settings["tokenizer_class"] = "DreamTokenizer"
        settings["auto_map"] = {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}
        (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        (folder / "merges.txt").write_text("#version: 0.2\nh e\n", encoding="utf-8")
        (folder / "added_tokens.json").write_text(json.dumps({t: i for i, t in added.items()}), encoding="utf-8")
    else:
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        tokenizer = Tokenizer(models.BPE(vocabulary, [("h", "e")]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ADDED[kind]])
        tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return len(vocabulary) + len(added)


def write_checkpoint(
    folder: Path,
    kind: str,
    *,
    pictures: bool = True,
    tokenizer: bool = True,
    template: str | None = "",
    rows: int | None = None,
    shards: int = 3,
    **overrides: Any,
) -> Path:
    """A random checkpoint; `rows` stored of the vocabulary where they are not the config's.

    `template` "" is the kind's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {**CONFIGS[kind], **(PICTURES if pictures else {}), **overrides}
    with torch.device("meta"):
        shapes = Lavida(
            Lavida.decoder_config(config, rows or config["vocab_size"], "sdpa"),
            siglip_config(VISION, "sdpa") if pictures else None,
            facts=ModelFacts("", 0, 0, 0, 0, 0),
            special=SpecialIds(0, 0, 0, ()),
        ).state_dict()
    generator = torch.Generator().manual_seed(len(kind))
    weights = {}
    for name, like in shapes.items():
        value = torch.randn(like.shape, generator=generator) * (0.02 if "embed" in name else 0.15)
        weights[Lavida.published_name(name, config)] = value + ("norm" in name and "weight" in name)
    keys = sorted(weights)
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    places = {key: files[i * shards // len(keys)] for i, key in enumerate(keys)}
    for file in files:
        save_file({k: weights[k] for k in keys if places[k] == file}, folder / file, metadata={"format": "pt"})
    size = sum(w.nbytes for w in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if pictures:
        (folder / "vision_config.json").write_text(json.dumps(VISION), encoding="utf-8")
    if tokenizer:
        write_tokenizer(folder, kind, TEMPLATES[kind] if template == "" else template)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    """Change settings of a written checkpoint; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}), encoding="utf-8")


def edit_weights(folder: Path, change: Any) -> None:
    """Have `change(name -> tensor)` edit the shard that it finds its tensors in (called for each shard)."""
    from safetensors.torch import load_file

    for path in sorted(folder.glob("*.safetensors")):
        weights = {name: value.clone() for name, value in load_file(path).items()}  # the file is mapped, not read
        change(weights)
        save_file(weights, path)
