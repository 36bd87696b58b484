"""LaViDa (Li et al., arXiv 2505.16839) with either of its decoders: only where it differs from its family.

LaViDa-Dream is a bidirectional Qwen2 whose row p predicts token p + 1; LaViDa-LLaDA is a bidirectional Llama, not
shifted, whose tensors are named as OLMo's. Both pool every view from 27 x 27 patches to 14 x 14 tokens after the
projector, and both answer over a cache of the prompt that is written once. Neither knows padding; here padded keys
are masked, so a batch gives what its samples give one by one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self

import torch
from torch import nn
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config

from probe.backbones import lavida_config as names
from probe.backbones import prompt as text
from probe.backbones.anyres import POOLS, Geometry
from probe.backbones.base import GenerationDefaults, SpecialIds
from probe.backbones.bidirectional import llama_config, qwen2_config
from probe.backbones.checkpoint import Checkpoint
from probe.backbones.layout import Plain
from probe.backbones.tiled import TiledBackbone
from probe.backbones.tokens import Tokenizer, within
from probe.errors import ProbeError
from probe.site import ModelFacts

DREAM_DEFAULTS = GenerationDefaults(
    gen_length=256, block_length=256, steps=256, cache={"prefix": {}},
    unmask={"dream": {"algorithm": "topk_margin", "top_k": 50, "capped": True}},
)  # fmt: skip
LLADA_DEFAULTS = GenerationDefaults(
    gen_length=256, block_length=128, steps=256, cache={"prefix": {}}, unmask={"lavida_llada": {}}
)
"""As evaluated: greedily, over the prompt's cache. 50 is transformers' old default `top_k`, which the sampler reads
from the model's config; it changes which tokens come first."""

OLMO_TENSORS = {
    "model.embed_tokens": "model.transformer.wte",
    "model.norm": "model.transformer.ln_f",
    "lm_head": "model.transformer.ff_out",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}
"""What LLaDA calls a Llama's modules; those of a layer stand under `model.transformer.blocks.N`."""


class Lavida(TiledBackbone):
    """LaViDa behind the adapter contract. Without an encoder it is the language model alone."""

    shift_varies = True

    several = "stack"

    def __init__(self, decoder: LlamaConfig | Qwen2Config, *arguments: Any, **more: Any) -> None:
        super().__init__(decoder, *arguments, **more)
        self.dream = isinstance(decoder, Qwen2Config)
        self.shift = 1 if self.dream else 0

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        *,
        rope_dtype: str = "float32",
        pool: str | None = None,
        several: str = "stack",
        **options: Any,
    ) -> Self:
        """The model of a checkpoint: options as `tiled_loading.load_tiled`, and those in which published runs differ.

        `rope_dtype="bfloat16"` rounds Dream's rotary frequencies, as casting the whole module to bfloat16 does in
        the published evaluation. `pool` overrides the config's pooling (`bilinear`, `average`, or `none` as in the
        low-resolution model). `several` pictures are a `stack`, as evaluated (each a padded square of 27 x 27
        tokens, not pooled), or a `list` (each pooled, with a newline at its end).
        """
        for name, value, known in (
            ("rope_dtype", rope_dtype, ("float32", "bfloat16")),
            ("pool", pool, (None, *POOLS, "none")),
            ("several", several, ("stack", "list")),
        ):
            if value not in known:
                raise ProbeError(f"{name}={value!r}; known: {', '.join(k for k in known if k)}")
        model = super().from_checkpoint(checkpoint, **options)
        model.several = several
        if pool is not None:
            model.geometry = replace(model._geometry(), pool=None if pool == "none" else pool)
        if rope_dtype == "bfloat16":
            if not model.dream:
                raise ProbeError("rope_dtype='bfloat16' is for LaViDa-Dream; LLaDA keeps its frequencies in float32")
            round_frequencies(model.model.rotary_emb, torch.bfloat16)
        return model

    @classmethod
    def decoder_config(cls, config: Mapping[str, Any], vocabulary: int, attention: str) -> LlamaConfig | Qwen2Config:
        """A Qwen2 for Dream, a Llama for LLaDA."""
        make = qwen2_config if names.is_dream(config) else llama_config
        return make(names.decoder_fields(config), vocabulary, attention)

    @classmethod
    def facts_of(cls, checkpoint: Checkpoint) -> ModelFacts:
        """Sizes from the small files alone."""
        return names.facts_of(checkpoint)

    @classmethod
    def special_of(
        cls, checkpoint: Checkpoint, tokenizer: Tokenizer | None, given: SpecialIds | None, vocabulary: int
    ) -> SpecialIds:
        """Mask and end as the config says, else by their strings, else the published numbers; nothing is banned."""
        if given is None:
            tokens = names.DREAM_SPECIAL if names.is_dream(checkpoint.config) else names.LLADA_SPECIAL
            ids = {k: tokenizer.id_of(t.text) if tokenizer else t.id for k, t in tokens.items()}
            told = {k: checkpoint.config.get(f"{k}_token_id") for k in ("mask", "eos")}
            ids.update({k: int(v) for k, v in told.items() if v is not None})
            mask, eos, stop = ids["mask"], ids["eos"], ids["stop"]
            if mask is None or eos is None:
                lacking = tokens["mask" if mask is None else "eos"].text
                raise ProbeError(f"the tokenizer of {checkpoint.source} lacks {lacking}; give `special` ids instead")
            given = SpecialIds(mask, eos, stop if stop is not None and stop < vocabulary else eos, ())
        return within(given, vocabulary, checkpoint.source)

    @classmethod
    def defaults_of(cls, checkpoint: Checkpoint) -> GenerationDefaults:
        """The settings of the published evaluation."""
        return DREAM_DEFAULTS if names.is_dream(checkpoint.config) else LLADA_DEFAULTS

    @classmethod
    def geometry_of(cls, config: Mapping[str, Any], vision: Mapping[str, Any]) -> Geometry:
        """Tiles, canvases and pooling."""
        return names.geometry(config, vision)

    @classmethod
    def tied(cls, config: Mapping[str, Any]) -> bool:
        """LLaDA says so in a field of its own; what transformers adds to its config means nothing."""
        return bool(config.get("tie_word_embeddings" if names.is_dream(config) else "weight_tying"))

    @classmethod
    def published_name(cls, name: str, config: Mapping[str, Any]) -> str:
        """The checkpoint's name of one of this class's own parameters."""
        if names.is_dream(config) or not name.startswith(("model.", "lm_head.")):
            return super().published_name(name, config)
        module, leaf = name.rsplit(".", 1)
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
        if layer:
            return f"model.transformer.blocks.{layer[1]}.{OLMO_TENSORS.get(layer[2], layer[2])}.{leaf}"
        return f"{OLMO_TENSORS.get(module, module)}.{leaf}"

    def plain(self, width: int, height: int) -> Plain:
        """A padded square: bare patches, or pooled and closed by a newline when pictures come as a list."""
        if self.several == "list":
            return Plain(self._geometry(), width, height, closed=True)
        return super().plain(width, height)

    def ask(self, question: str, pictures: int, *, think: bool) -> str:
        """The question behind its pictures; there is no thinking switch."""
        if think:
            raise ProbeError("LaViDa has no thinking switch: leave `generate.think` out")
        return text.ask(question, pictures)

    def clean(self, answer: str) -> str:
        """Without leading exclamation marks (id 0, the filler of prompts) and, for Dream, written-out turn ends."""
        answer = answer.lstrip("!")
        return (answer.replace("<|im_end|>\n", "") if self.dream else answer).strip()


def round_frequencies(rotary: nn.Module, dtype: torch.dtype) -> None:
    """Round the rotary frequencies to a type, as casting the module would; angles stay float32."""
    frequency = rotary.get_buffer("inv_freq")
    rotary.register_buffer("inv_freq", frequency.to(dtype).to(frequency.dtype), persistent=False)
