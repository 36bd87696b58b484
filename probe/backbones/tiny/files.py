"""What small random checkpoints have in common: weights, a tokenizer of bytes, files as they are published."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Shapes = Mapping[str, Sequence[int]]


def write_json(path: Path, value: Any) -> None:
    """JSON, as checkpoints hold it."""
    path.write_text(json.dumps(value), encoding="utf-8")


def shapes_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """The tensors of a model (built on no device) by its own names."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def random_weights(shapes: Shapes, seed: int, width: int, spread: float = 0.3) -> dict[str, Tensor]:
    """Weights that make a model's answers depend on what it sees: sharper than an initialisation.

    Matrices have the standard deviation `spread` at a width of 32, and less at larger ones, embeddings 1; scales of
    norms lie around 1. A tensor depends on the seed and the order of the names alone.
    """
    generator = torch.Generator().manual_seed(seed)
    scale = spread * (32 / width) ** 0.5
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(tuple(shape), generator=generator)
        if "norm" in name and name.endswith("weight"):
            weights[name] = 1 + 0.2 * noise
        else:
            weights[name] = noise * (1.0 if any(part in name for part in EMBEDDINGS) else scale)
    return weights


EMBEDDINGS = ("embed_tokens", "wte", "image_newline")
"""Parts of the names of tables of embeddings."""


def save_weights(
    folder: Path, weights: Mapping[str, Tensor], shards: int = 2, dtype: torch.dtype = torch.float32
) -> None:
    """Weights under published names, as several safetensors files with an index, or as one file without."""
    names = sorted(weights)
    if shards == 1:
        save_file({n: weights[n].to(dtype).contiguous() for n in names}, folder / "model.safetensors", METADATA)
        return
    places: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {n: weights[n].to(dtype).contiguous() for n in names[i::shards]}
        save_file(part, folder / file, METADATA)
        places |= dict.fromkeys(part, file)
    size = sum(w.numel() * dtype.itemsize for w in weights.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": places})


METADATA = {"format": "pt"}


def write_byte_tokenizer(
    folder: Path,
    special: Sequence[str],
    *,
    bos: str | None,
    eos: str,
    pad: str,
    adds_bos: bool = False,
    merges: Iterable[tuple[str, str]] = (),
    last: bool = False,
    **settings: Any,
) -> int:
    """`tokenizer.json` and its settings: bytes, `merges` of them, and special tokens before (or, if `last`, behind).

    With `adds_bos` it begins every text with `bos`. Further `settings` go into `tokenizer_config.json`. Returns the
    number of tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    pairs = list(merges)
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in pairs)]
    vocabulary = {token: i for i, token in enumerate(letters if last else [*special, *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])
    if adds_bos and bos is not None:
        start = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=start)
    tokenizer.save(str(folder / "tokenizer.json"))
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos, "pad_token": pad}
    write_json(folder / "tokenizer_config.json", {**said, "clean_up_tokenization_spaces": False, **settings})
    return int(tokenizer.get_vocab_size(with_added_tokens=True))


def write_split_tokenizer(
    folder: Path,
    special: Sequence[str],
    *,
    kind: str,
    merges: Iterable[tuple[str, str]] = (),
    **settings: Any,
) -> int:
    """A Qwen2 tokenizer as `vocab.json` and `merges.txt`, whose class `kind` is code of the checkpoint.

    Special tokens stand behind bytes and merges. Returns the number of tokens.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    pairs = list(merges)
    letters = [*sorted(ByteLevel.alphabet()), *("".join(pair) for pair in pairs)]
    ids = {token: len(letters) + i for i, token in enumerate(special)}
    write_json(folder / "vocab.json", {token: i for i, token in enumerate(letters)})
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in pairs), encoding="utf-8")
    write_json(folder / "added_tokens.json", ids)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    said = {
        "added_tokens_decoder": {str(i): {"content": token, **flags} for token, i in ids.items()},
        "auto_map": {"AutoTokenizer": [f"tokenization.{kind}", None]},
        "tokenizer_class": kind,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", {**said, **settings})
    return len(letters) + len(special)
