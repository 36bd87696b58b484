"""What a backbone would generate and cost, known without its weights: for forecasts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from probe.backbones import dimple_config, entry_of, lavida_config, llada_v_config
from probe.backbones.checkpoint import resolve
from probe.backbones.traits import traits_of
from probe.cost import DecoderDims, decoder_dims


@dataclass(frozen=True)
class Habits:
    """How an adapter decodes when nobody says otherwise: answer slots, steps, and the name of its cache policy."""

    gen_length: int
    steps: int
    cache: str


UNSAID: Mapping[str, Habits] = {"lavida": Habits(256, 256, "prefix")}
"""Of adapters whose class does not say it because it differs by decoder in other things."""

PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    llada_v_config.PUBLISHED_NAME: llada_v_config.PUBLISHED,
    lavida_config.DREAM_NAME: lavida_config.PUBLISHED_DREAM,
    lavida_config.LLADA_NAME: lavida_config.PUBLISHED_LLADA,
    dimple_config.PUBLISHED_NAME: dimple_config.PUBLISHED,
}
COUNTED = ("llada_v", "lavida", "dimple")
"""Adapters whose decoder's layers all cost what `cost.decoder_dims` says."""


def habits_of(name: str | Path) -> Habits | None:
    """How the backbone decodes by itself; None where only its checkpoint says so."""
    defaults = traits_of(name).defaults
    if defaults is None:
        return UNSAID.get(entry_of(name).name)
    return Habits(defaults.gen_length, defaults.steps, next(iter(defaults.cache)))


def dims_of(name: str | Path, vocabulary: int) -> DecoderDims | None:
    """Sizes that the decoder's FLOPs are counted from; None for decoders whose layers are of several kinds."""
    if entry_of(name).name not in COUNTED:
        return None
    known = PUBLISHED.get(str(name)) if not Path(name).is_dir() else None
    config = resolve(name, weights=False).config if known is None else known
    fields = lavida_config.decoder_fields(config) if lavida_config.is_lavida(config) else config
    return decoder_dims(SimpleNamespace(**fields), vocabulary)
