"""What a backbone would generate and cost, known without its weights: for forecasts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from probe.backbones import adapter_of, backbones, dimple_config, lavida_config, llada_v_config
from probe.backbones.checkpoint import resolve
from probe.cost import DecoderDims, decoder_dims
from probe.registry import Entry


@dataclass(frozen=True)
class Habits:
    """How an adapter decodes when nobody says otherwise: answer slots, steps, and the name of its cache policy."""

    gen_length: int
    steps: int
    cache: str


HABITS: Mapping[str, Habits] = {
    "llada_v": Habits(128, 128, "none"),
    "lavida": Habits(256, 256, "prefix"),
    "dimple": Habits(64, 64, "crop"),
    "llava_next": Habits(128, 128, "kv"),
    "qwen_vl": Habits(128, 128, "kv"),
}
"""By adapter; as their `GenerationDefaults`. An adapter that is not here reads them from each checkpoint."""

PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    llada_v_config.PUBLISHED_NAME: llada_v_config.PUBLISHED,
    lavida_config.DREAM_NAME: lavida_config.PUBLISHED_DREAM,
    lavida_config.LLADA_NAME: lavida_config.PUBLISHED_LLADA,
    dimple_config.PUBLISHED_NAME: dimple_config.PUBLISHED,
}
COUNTED = ("llada_v", "lavida", "dimple")
"""Adapters whose decoder's layers all cost what `cost.decoder_dims` says."""


def adapter_named(name: str | Path) -> Entry:
    """The adapter of a backbone's name, folder or Hub id."""
    for entry in backbones:
        if any(p.name == str(name) for p in entry.meta.get("published", ())) and not Path(name).is_dir():
            return entry
    return adapter_of(resolve(name, weights=False))


def habits_of(name: str | Path) -> Habits | None:
    """How the backbone decodes by itself; None where only its checkpoint says so."""
    return HABITS.get(adapter_named(name).name)


def dims_of(name: str | Path, vocabulary: int) -> DecoderDims | None:
    """Sizes that the decoder's FLOPs are counted from; None for decoders whose layers are of several kinds."""
    if adapter_named(name).name not in COUNTED:
        return None
    known = PUBLISHED.get(str(name)) if not Path(name).is_dir() else None
    config = resolve(name, weights=False).config if known is None else known
    fields = lavida_config.decoder_fields(config) if lavida_config.is_lavida(config) else config
    return decoder_dims(SimpleNamespace(**fields), vocabulary)
