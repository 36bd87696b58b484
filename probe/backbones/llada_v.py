"""LLaDA-V (You et al. 2025) on transformers' own Llama and SigLIP: only where it differs from its family.

The decoder is Llama with full attention; tiles are not pooled, but a large map is shrunk. Logits are not shifted. The
published loader forces the encoder to float16 and runs the decoding loop under float16 autocast; here everything runs
in the one type that was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers.models.llama.configuration_llama import LlamaConfig

from probe.backbones import llada_v_config as names
from probe.backbones import prompt as text
from probe.backbones.base import GenerationDefaults, SpecialIds
from probe.backbones.bidirectional import llama_config
from probe.backbones.checkpoint import Checkpoint
from probe.backbones.tiled import TiledBackbone
from probe.backbones.tiled_config import generation_lengths
from probe.backbones.tokens import Tokenizer, special_ids
from probe.site import ModelFacts


class LladaV(TiledBackbone):
    """LLaDA-V behind the adapter contract. Without an encoder it is the language model alone."""

    defaults = GenerationDefaults(gen_length=128, block_length=128, steps=128, stop=(names.EOT.text,))

    @classmethod
    def decoder_config(cls, config: Mapping[str, Any], vocabulary: int, attention: str) -> LlamaConfig:
        """A Llama."""
        return llama_config(config, vocabulary, attention)

    @classmethod
    def facts_of(cls, checkpoint: Checkpoint) -> ModelFacts:
        """Sizes from the small files alone."""
        return names.facts_of(checkpoint)

    @classmethod
    def special_of(
        cls, checkpoint: Checkpoint, tokenizer: Tokenizer | None, given: SpecialIds | None, vocabulary: int
    ) -> SpecialIds:
        """The ids of the tokenizer's special tokens; mask, ends and headers are never predicted."""
        return special_ids(tokenizer, given, vocabulary, checkpoint.source)

    @classmethod
    def defaults_of(cls, checkpoint: Checkpoint) -> GenerationDefaults:
        """The published lengths, unless generation_config.json says others."""
        return replace(cls.defaults, **generation_lengths(checkpoint.folder))

    def ask(self, question: str, pictures: int, *, think: bool) -> str:
        """The question behind its pictures, with the thinking switch."""
        return text.ask(question, pictures, think=think)

    def render(self, chat: Sequence[text.Message]) -> str:
        """By the checkpoint's own template, or as the published one writes it."""
        return super().render(chat) if self._tokenizer().has_template else text.render(chat)

    def clean(self, answer: str) -> str:
        """One trailing full stop dropped, outer blanks dropped."""
        return text.clean(answer)
