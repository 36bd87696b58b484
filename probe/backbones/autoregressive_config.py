"""What an autoregressive baseline's small files say before any weight is read. No torch.

Published configs leave out what equals a default of transformers' config classes; `DEFAULTS` holds those that sizes
depend on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from probe.backbones.checkpoint import Checkpoint
from probe.errors import ProbeError
from probe.site import ModelFacts

DEFAULTS: dict[str, dict[str, int]] = {
    "llama": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000},
    "mistral": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000},
    "qwen2": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 151936},
    "qwen2_5_vl_text": {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "vocab_size": 152064},
}
"""What transformers takes for a decoder's size that its config does not name, by `model_type`."""

TEMPLATES = ("chat_template.jinja", "chat_template.json", "processor_config.json", "tokenizer_config.json")
"""Files that may hold a checkpoint's chat template, in the order in which they are asked."""


def whole_number(settings: Mapping[str, Any], key: str, default: int | None, where: str) -> int:
    """A size from a config, or its default; a value that is no whole number is one clear error."""
    value = settings.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int):
        raise ProbeError(f"the config of {where} lacks a usable `{key}`: {value!r}; a whole number would be right")
    return value


def decoder_facts(name: str, kind: str, text: Mapping[str, Any], encoder_layers: int) -> ModelFacts:
    """Sizes of the decoder whose settings are `text`, of transformers' kind `kind`."""
    sizes = {key: whole_number(text, key, default, name) for key, default in DEFAULTS[kind].items()}
    return ModelFacts(
        name=name,
        layers=sizes["num_hidden_layers"],
        heads=sizes["num_attention_heads"],
        width=sizes["hidden_size"],
        vocabulary=sizes["vocab_size"],
        encoder_layers=encoder_layers,
    )


def chat_template(checkpoint: Checkpoint) -> str | None:
    """The template that turns a conversation with pictures into a prompt; the processor's before the tokenizer's."""
    for name in TEMPLATES:
        path = checkpoint.folder / name
        if name.endswith(".jinja"):
            found: object = path.read_text(encoding="utf-8") if path.is_file() else None
        else:
            found = (checkpoint.json(name) or {}).get("chat_template")
        if isinstance(found, str) and found:
            return found
    return None


def ends_of(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Ids that end an answer: those of `generation_config.json`, else of the config, else of its decoder."""
    config = checkpoint.config
    for settings in (checkpoint.json("generation_config.json"), config, config.get("text_config")):
        found = (settings or {}).get("eos_token_id")
        ids = found if isinstance(found, list) else [found]
        if found is not None and all(isinstance(i, int) for i in ids):
            return tuple(ids)
    return ()


def generation_lengths(checkpoint: Checkpoint) -> dict[str, Any]:
    """What an optional `generation_config.json` says of `gen_length`, `block_length` and `steps`."""
    told = checkpoint.json("generation_config.json") or {}
    return {k: told[k] for k in ("gen_length", "block_length", "steps") if isinstance(told.get(k), int)}
