"""Backbones by name, and `load`: a folder, a Hub id or a miniature's name to a model behind the adapter contract.

An adapter is a function registered in `backbones` that returns its class (imported only when needed), with
`accepts(config)` to recognise a checkpoint by its `config.json`, and two answers that need no weights:
`facts(checkpoint)` for its sizes and `count(checkpoint, sizes)` for the visual tokens of a sample; `published` names
models for which even the small files are not needed, and `tiny` builders of small random ones (`probe.backbones.tiny`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from probe.backbones import (
    diffusion_gemma_config,
    dimple_config,
    lavida_config,
    llada_v_config,
    llava_next_config,
    qwen_vl_config,
)
from probe.backbones.checkpoint import EMBEDDED, Checkpoint, check_sizes, resolve
from probe.errors import ProbeError
from probe.registry import Entry, Registry

if TYPE_CHECKING:
    import torch

    from probe.backbones.base import Backbone
    from probe.site import ModelFacts

backbones = Registry("backbone")
INSTALLED = "Installed with the package. "
"""What the description of an embedded checkpoint begins with."""


@dataclass(frozen=True)
class Published:
    """A model on the Hub whose sizes and visual tokens are known without a download."""

    name: str
    facts: Callable[[], ModelFacts]
    count: Callable[..., int]


@dataclass(frozen=True)
class KnownBackbone:
    """One line of the list of backbones."""

    name: str
    layers: int
    width: int
    vocabulary: int
    about: str


@backbones.register(
    accepts=llada_v_config.is_llada_v,
    facts=llada_v_config.facts_of,
    count=llada_v_config.visual_count,
    published=(
        Published(llada_v_config.PUBLISHED_NAME, llada_v_config.published_facts, llada_v_config.published_count),
    ),
    tiny={llada_v_config.PUBLISHED_NAME: "probe.backbones.tiny.tiled:write_llada_v"},
)
def llada_v() -> type[Backbone]:
    """LLaDA-V: Llama without a causal mask, SigLIP tiles with newlines, masked diffusion."""
    from probe.backbones.llada_v import LladaV

    return LladaV


@backbones.register(
    accepts=lavida_config.is_lavida,
    facts=lavida_config.facts_of,
    count=lavida_config.visual_count,
    published=(
        Published(lavida_config.DREAM_NAME, lavida_config.dream_facts, lavida_config.published_count),
        Published(lavida_config.LLADA_NAME, lavida_config.llada_facts, lavida_config.published_count),
    ),
    tiny={
        lavida_config.DREAM_NAME: "probe.backbones.tiny.tiled:write_lavida_dream",
        lavida_config.LLADA_NAME: "probe.backbones.tiny.tiled:write_lavida_llada",
    },
)
def lavida() -> type[Backbone]:
    """LaViDa: Dream (Qwen2, logits shifted) or LLaDA (Llama) without a causal mask, pooled SigLIP tiles."""
    from probe.backbones.lavida import Lavida

    return Lavida


@backbones.register(
    accepts=dimple_config.is_dimple,
    facts=dimple_config.facts_of,
    count=dimple_config.visual_count,
    published=(Published(dimple_config.PUBLISHED_NAME, dimple_config.published_facts, dimple_config.published_count),),
    tiny={dimple_config.PUBLISHED_NAME: "probe.backbones.tiny.dimple:write_dimple"},
)
def dimple() -> type[Backbone]:
    """Dimple: Qwen2 without a causal mask, Qwen2.5-VL's tower at the picture's own size, shifted logits."""
    from probe.backbones.dimple import Dimple

    return Dimple


@backbones.register(
    accepts=diffusion_gemma_config.is_diffusion_gemma,
    facts=diffusion_gemma_config.facts_of,
    count=diffusion_gemma_config.visual_count,
    published=(
        Published(
            diffusion_gemma_config.PUBLISHED_NAME,
            diffusion_gemma_config.published_facts,
            diffusion_gemma_config.published_count,
        ),
    ),
    tiny={diffusion_gemma_config.PUBLISHED_NAME: "probe.backbones.tiny.diffusion_gemma:write_gemma"},
)
def diffusion_gemma() -> type[Backbone]:
    """DiffusionGemma: canvases that are re-noised, behind a causal prefix with Gemma 4's soft tokens."""
    from probe.backbones.diffusion_gemma import DiffusionGemma

    return DiffusionGemma


def _published_of(config: Any) -> tuple[Published, ...]:
    """The published models of a config module, each with its name filled in."""
    return tuple(
        Published(name, partial(config.published_facts, name), partial(config.published_count, name))
        for name in config.PUBLISHED
    )


@backbones.register(
    accepts=llava_next_config.is_llava_next,
    facts=llava_next_config.facts_of,
    count=llava_next_config.visual_count,
    published=_published_of(llava_next_config),
    tiny={
        "llava-hf/llava-v1.6-mistral-7b-hf": "probe.backbones.tiny.autoregressive:write_llava_mistral",
        "llava-hf/llava-v1.6-vicuna-7b-hf": "probe.backbones.tiny.autoregressive:write_llava_vicuna",
    },
)
def llava_next() -> type[Backbone]:
    """LLaVA-NeXT: causal Llama or Mistral, CLIP tiles with newlines, one token per step."""
    from probe.backbones.llava_next import LlavaNext

    return LlavaNext


@backbones.register(
    accepts=qwen_vl_config.is_qwen_vl,
    facts=qwen_vl_config.facts_of,
    count=qwen_vl_config.visual_count,
    published=_published_of(qwen_vl_config),
    tiny={"Qwen/Qwen2.5-VL-7B-Instruct": "probe.backbones.tiny.autoregressive:write_qwen_vl"},
)
def qwen_vl() -> type[Backbone]:
    """Qwen2.5-VL: causal Qwen2, windowed encoder at the picture's own size, one token per step."""
    from probe.backbones.qwen_vl import QwenVL

    return QwenVL


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

    `miniature-ar` and `miniature-adapted` come with the package as well (docs/miniature.md).

    `dtype` is a torch type or its name; `auto` takes the stored one, except that float16 becomes float32 on
    a CPU. `attention` names an attention implementation (`sdpa`, `eager`, ...; None: the adapter's choice).
    `device_map` and `max_memory` spread a model over devices (`placement.place`). Further `options` belong to the
    adapter (all: `special`, `encoder_attention`; LLaDA-V and LaViDa: `vocab`; LaViDa: `rope_dtype`, `pool`, `several`;
    Dimple: `min_pixels`, `max_pixels`, `pixels`; autoregressive models: `tp_plan`, and Qwen2.5-VL `min_pixels`,
    `max_pixels`, `fps`). Raises `ProbeError`.
    """
    checkpoint = resolve(name, revision=revision)
    entry = adapter_of(checkpoint)
    with _told(checkpoint):
        if "facts" in entry.meta:
            _check(checkpoint, entry.meta["facts"](checkpoint))
        load_it = entry.function().from_checkpoint
        try:
            model = load_it(checkpoint, device=device, dtype=dtype, attention=attention, **options)
        except TypeError as error:
            if "unexpected keyword argument" not in str(error):
                raise
            strange = str(error).rsplit(" ", 1)[-1]
            if strange == "'tp_plan'":
                words = "is not one of transformers' own classes, which alone have plans for tensor parallelism"
                raise ProbeError(f"{checkpoint.source} {words}; spread it with `device_map`") from error
            raise ProbeError(f"{checkpoint.source} is not loaded with a setting called {strange}") from error
    model.load_options = dict(options)
    return cast("Backbone", model)


def facts_of(name: str | Path, *, revision: str | None = None) -> ModelFacts:
    """Sizes of a backbone without its weights. Published models are known without a download."""
    if published := _published(name, revision):
        return published.facts()
    checkpoint = resolve(name, revision=revision, weights=False)
    with _told(checkpoint):
        return _check(checkpoint, adapter_of(checkpoint).meta["facts"](checkpoint))


def adapter_class(name: str | Path, *, revision: str | None = None) -> type[Backbone]:
    """The adapter's class of a backbone, without its weights."""
    return cast("type[Backbone]", entry_of(name, revision=revision).function())


def entry_of(name: str | Path, *, revision: str | None = None) -> Entry:
    """The adapter of a backbone, its class not imported. Published models are known without a download."""
    for entry in backbones:
        if revision is None and any(p.name == str(name) for p in entry.meta.get("published", ())):
            return entry
    return adapter_of(resolve(name, revision=revision, weights=False))


def visual_count(
    name: str | Path, sizes: Sequence[tuple[int, int]], *, revision: str | None = None, **options: Any
) -> int:
    """Visual tokens of a sample whose pictures have these (width, height), without weights or pixels.

    `options` are those of `load`; the ones that decide how pictures are cut or sized count.
    """
    if published := _published(name, revision):
        return published.count(sizes, **_named(published.count, options))
    checkpoint = resolve(name, revision=revision, weights=False)
    with _told(checkpoint):
        count = adapter_of(checkpoint).meta["count"]
        return int(count(checkpoint, sizes, **_named(count, options)))


def _check(checkpoint: Checkpoint, facts: ModelFacts) -> ModelFacts:
    check_sizes(checkpoint.source, layers=facts.layers, encoder_layers=facts.encoder_layers)
    return facts


@contextmanager
def _told(checkpoint: Checkpoint) -> Iterator[None]:
    """Whatever a checkpoint's files make a library stumble over, as one message that names the checkpoint."""
    try:
        yield
    except (ProbeError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and "out of memory" in str(error).lower():
            raise
        first = next((line for line in str(error).splitlines() if line.strip()), "").strip()
        told = f"{type(error).__name__}: {first[:200]}" if first else type(error).__name__
        raise ProbeError(
            f"{checkpoint.source}: its config.json, tokenizer or weights do not make a model ({told}); "
            "compare them with those of the published checkpoint"
        ) from error


def _named(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a function has by name."""
    return {k: v for k, v in options.items() if k in signature(function).parameters}


def known_backbones() -> list[KnownBackbone]:
    """The checkpoints that have a name of their own: the embedded ones, then the published ones."""
    embedded = [n for n, folder in EMBEDDED.items() if folder.is_dir()]
    found = [(n, f"{INSTALLED}{adapter_of(resolve(n)).summary}") for n in embedded]
    found += [(p.name, entry.summary) for entry in backbones for p in entry.meta.get("published", ())]
    sizes = [(about, facts_of(name)) for name, about in found]
    return [KnownBackbone(f.name, f.layers, f.width, f.vocabulary, about) for about, f in sizes]


def _published(name: str | Path, revision: str | None) -> Published | None:
    """The published model of this name, unless the user means a folder or a particular revision."""
    if revision is not None or Path(name).is_dir():
        return None
    models = (p for entry in backbones for p in entry.meta.get("published", ()))
    return next((p for p in models if p.name == str(name)), None)


def adapter_of(checkpoint: Checkpoint) -> Entry:
    """The adapter whose checkpoints look like this one."""
    fitting = [e for e in backbones if "accepts" in e.meta and e.meta["accepts"](checkpoint.config)]
    if len(fitting) != 1:
        kind = checkpoint.config.get("model_type")
        known = ", ".join(e.name for e in fitting or backbones)
        claim = "is claimed by several backbones" if fitting else "is of no known backbone"
        raise ProbeError(f"{checkpoint.source}: model_type {kind!r} in config.json {claim}: {known}")
    return fitting[0]
