"""How the built-in adapters decode, without their classes: importing those takes transformers, and seconds.

What stands here is what the classes say (`tests/backbones/test_traits.py`). An adapter from elsewhere is asked itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from probe.backbones import entry_of, llada_v_config
from probe.backbones.base import Backbone, GenerationDefaults


@dataclass(frozen=True)
class Traits:
    """`shift` None: checkpoints differ in it. `defaults` None: only a checkpoint says how it decodes by itself."""

    shift: int | None = 0
    causal: bool = False
    defaults: GenerationDefaults | None = None


DIMPLE = GenerationDefaults(
    gen_length=64,
    block_length=64,
    steps=64,
    unmask={"dimple": {"algorithm": "maskgit_plus", "threshold": 0.95, "top_k": 50}},
    cache={"crop": {}},
)
_AUTOREGRESSIVE = Traits(1, True, GenerationDefaults(unmask={"autoregressive": {}}, cache={"kv": {}}))
TRAITS: Mapping[str, Traits] = {
    "llada_v": Traits(0, False, GenerationDefaults(stop=(llada_v_config.EOT.text,))),
    "lavida": Traits(None, False, None),
    "dimple": Traits(1, False, DIMPLE),
    "diffusion_gemma": Traits(0, False, None),
    "llava_next": _AUTOREGRESSIVE,
    "qwen_vl": _AUTOREGRESSIVE,
}
"""By the adapter's name."""


def traits_of(name: str | Path) -> Traits:
    """How a backbone decodes, as far as its adapter alone tells."""
    entry = entry_of(name)
    known = TRAITS.get(entry.name)
    return known if known is not None else said_by(cast("type[Backbone]", entry.function()))


def said_by(adapter: type[Backbone]) -> Traits:
    """The same from an adapter's class."""
    shift = None if adapter.shift_varies else adapter.shift
    return Traits(shift, adapter.causal, getattr(adapter, "defaults", None))
