"""Backbones by name, and `load`: a folder, a Hub id or `miniature` to a model behind the adapter contract.

An adapter is a function registered in `backbones` that returns its class (imported only when needed), with
`accepts(config)` to recognise a checkpoint by its `config.json` and `facts(checkpoint)` for its sizes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from probe.backbones import llada_v_config
from probe.backbones.checkpoint import Checkpoint, resolve
from probe.errors import ProbeError
from probe.registry import Entry, Registry

if TYPE_CHECKING:
    import torch

    from probe.backbones.base import Backbone
    from probe.site import ModelFacts

backbones = Registry("backbone")


@backbones.register(accepts=llada_v_config.is_llada_v, facts=llada_v_config.facts_of)
def llada_v() -> type[Backbone]:
    """LLaDA-V: Llama without a causal mask, SigLIP tiles with newlines, masked diffusion."""
    from probe.backbones.llada_v import LladaV

    return LladaV


def load(
    name: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    attention: str | None = None,
    revision: str | None = None,
    **options: Any,
) -> Backbone:
    """Load a backbone: `miniature`, a folder with a checkpoint, or a Hub id such as `GSAI-ML/LLaDA-V`.

    `dtype` is a torch type or its name; `auto` takes the stored one, except that float16 becomes float32 on
    a CPU. `attention` names an attention implementation (`sdpa`, `eager`, ...; None: the adapter's choice).
    Further `options` belong to the adapter (LLaDA-V: `vocab`, `special`, `encoder_attention`). Raises
    `ProbeError`.
    """
    checkpoint = resolve(name, revision=revision)
    adapter = adapter_of(checkpoint).function()
    options.update(device=device, dtype=dtype, attention=attention)
    return cast("Backbone", adapter.from_checkpoint(checkpoint, **options))


def facts_of(name: str | Path, *, revision: str | None = None) -> ModelFacts:
    """Sizes of a backbone without its weights. The published LLaDA-V is known without a download."""
    if str(name) == llada_v_config.PUBLISHED_NAME and revision is None and not Path(str(name)).is_dir():
        return llada_v_config.published_facts()
    checkpoint = resolve(name, revision=revision, weights=False)
    return cast("ModelFacts", adapter_of(checkpoint).meta["facts"](checkpoint))


def adapter_of(checkpoint: Checkpoint) -> Entry:
    """The adapter whose checkpoints look like this one."""
    fitting = [e for e in backbones if "accepts" in e.meta and e.meta["accepts"](checkpoint.config)]
    if len(fitting) != 1:
        kind = checkpoint.config.get("model_type")
        known = ", ".join(e.name for e in fitting or backbones)
        claim = "is claimed by several backbones" if fitting else "is of no known backbone"
        raise ProbeError(f"{checkpoint.source}: model_type {kind!r} in config.json {claim}: {known}")
    return fitting[0]
