"""Autoregressive multimodal models on transformers' own classes: what all of them share.

A baseline generates one token per step from the rows before it, so a *step* is a generated token, future slots are
simply not in the sequence, and attention is causal. Everything else means what it means on a diffusion backbone. The
native class holds the weights and is called as it is; an adapter adds how pictures become visual tokens and where
they stand.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from probe.attend import KERNELS
from probe.backbones import autoregressive_config as names
from probe.backbones import prompt as wording
from probe.backbones.base import Backbone, Features, GenerationDefaults, LayerModules, Prompt, SpecialIds
from probe.backbones.causal import keep_causal
from probe.backbones.checkpoint import Checkpoint
from probe.backbones.layout import Cells
from probe.backbones.native import load_native, native_config
from probe.backbones.placement import device_of
from probe.backbones.pruned import join, prompt_of_survivors
from probe.backbones.sequence import text_alone, with_pictures
from probe.backbones.splice import IMAGE
from probe.backbones.tokens import Tokenizer, load_tokenizer
from probe.errors import ProbeError
from probe.parallel import share_heads
from probe.site import ModelFacts

ATTENTION = "sdpa"
"""The attention kernel when none is asked for."""


class Autoregressive(Backbone):
    """A native image-text-to-text class of transformers behind the adapter contract."""

    shift = 1
    causal = True
    defaults = GenerationDefaults(unmask={"autoregressive": {}}, cache={"kv": {}})

    native_class: ClassVar[Any]
    """The class of transformers that holds the weights."""

    def __init__(
        self,
        native: Any,
        checkpoint: Checkpoint,
        *,
        facts: ModelFacts,
        special: SpecialIds,
        tokenizer: Tokenizer | None = None,
        template: str | None = None,
        revision: str = "",
    ) -> None:
        super().__init__()
        self.facts, self.special, self.tokenizer, self.template = facts, special, tokenizer, template
        self.source, self.revision = checkpoint.source, revision
        self.native = native
        self.configure(checkpoint)
        native.config.get_text_config().use_cache = False  # a cache is what the caller hands in
        keep_causal(self.lm)
        self._layers = tuple(
            LayerModules(x, x.self_attn, x.post_attention_layernorm, x.mlp, x.input_layernorm) for x in self.lm.layers
        )
        self.eval().requires_grad_(False)

    @classmethod
    @abstractmethod
    def facts_of(cls, checkpoint: Checkpoint) -> ModelFacts:
        """Sizes from the small files alone; what is not supported raises `ProbeError`."""

    @abstractmethod
    def configure(self, checkpoint: Checkpoint) -> None:
        """Take from the small files what laying out pictures needs."""

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        *,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "auto",
        attention: str | None = None,
        encoder_attention: str | None = None,
        special: SpecialIds | None = None,
        device_map: object = None,
        max_memory: Mapping[int | str, int | str] | None = None,
        tp_plan: str | None = None,
    ) -> Self:
        """Build the native class with every tensor of the checkpoint: none missing, none left over.

        `encoder_attention` is the image encoder's kernel (default: `attention`); `special` replaces the ids found in
        the checkpoint; `device_map` and `max_memory` spread the model over devices (`placement.place`);
        `tp_plan="auto"` splits every layer over the processes of a torchrun, as transformers' plan for the class says.
        """
        facts, tokenizer = cls.facts_of(checkpoint), load_tokenizer(checkpoint.folder)
        kernels = [kernel or attention or ATTENTION for kernel in (attention, encoder_attention)]
        text, vision = (KERNELS.get(kernel, kernel) for kernel in kernels)
        config = native_config(cls.native_class, checkpoint, {"text_config": text, "vision_config": vision})
        native = load_native(
            cls.native_class, checkpoint, config, device=device, dtype=dtype, device_map=device_map,
            max_memory=max_memory, tp_plan=tp_plan,
        )  # fmt: skip
        ends = names.ends_of(checkpoint) or ((tokenizer.eos,) if tokenizer and tokenizer.eos is not None else ())
        special = special or _special(native.config.image_token_id, ends, facts.vocabulary, checkpoint.source)
        model = cls(
            native,
            checkpoint,
            facts=facts,
            special=special,
            tokenizer=tokenizer,
            template=names.chat_template(checkpoint),
            revision=checkpoint.fingerprint,
        )
        if tp_plan is not None:
            for modules in model.layers:
                share_heads(modules.attention, torch.distributed.group.WORLD)
        stop = tuple(tokenizer.strings(ends)) if tokenizer else ()
        model.defaults = replace(cls.defaults, stop=stop, **names.generation_lengths(checkpoint))
        return model

    @property
    def device(self) -> torch.device:
        """Where the embeddings are, or come out."""
        return device_of(self.lm.embed_tokens)

    @property
    def dtype(self) -> torch.dtype:
        """The type of weights and activations."""
        return cast(torch.dtype, self.lm.embed_tokens.weight.dtype)

    @property
    def lm(self) -> Any:
        """The native decoder without its head; causal, also where it is given no mask."""
        return self.native.model.language_model

    @property
    def layers(self) -> Sequence[LayerModules]:
        """The decoder's layers, first to last."""
        return self._layers

    @property
    def final_norm(self) -> nn.Module:
        """The norm after the last layer."""
        return cast(nn.Module, self.lm.norm)

    def rotary(self, hidden: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """`(cos, sin)`, each `(batch, length, head size)`, angles computed in float32."""
        cos, sin = self.lm.rotary_emb(hidden, self.position_ids(position))
        return cos, sin

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings `(..., width)`."""
        return cast(Tensor, self.lm.embed_tokens(ids)).to(self.device)

    def head(self, hidden: Tensor) -> Tensor:
        """Final-normed rows to float32 logits of the token that follows; the product is in the model's type."""
        return cast(Tensor, self.native.lm_head(hidden)).float().to(self.device)

    @property
    @abstractmethod
    def picture_id(self) -> int:
        """The id that stands for a visual token in a native prompt."""

    @property
    def clip_id(self) -> int:
        """Likewise in that of a clip, where a model takes clips."""
        return self.picture_id

    @abstractmethod
    def place(self, *, clip: bool = False) -> str:
        """The text that stands for one picture, or for a clip, in a rendered prompt."""

    def is_clip(self, layouts: Sequence[Any]) -> bool:
        """Whether the only layout is that of a clip."""
        return False

    @abstractmethod
    def lay_out(self, features: Features) -> tuple[list[Tensor], Cells]:
        """Visual tokens `(tokens, width)` of every picture, and the description of all of them in order."""

    def positions(self, ids: Sequence[int], layouts: Sequence[Any]) -> Tensor | None:
        """Rotary positions of a sequence in whose ids `splice.IMAGE` stands for each picture, as in `Prompt`."""
        return None

    @torch.no_grad()
    def assemble(self, question: str, features: Features | None, *, think: bool = False) -> Prompt:
        """The chat template, visual tokens and question as one sequence."""
        if think:
            raise ProbeError(f"{self.source} has no thinking switch; leave `think` out")
        layouts = cast(Sequence[Any], features.layout) if features else ()
        ids = self.prompt_ids(question, len(layouts), clip=self.is_clip(layouts))
        position = self.positions(ids, layouts)
        if features is not None and features.survivors is not None:
            return prompt_of_survivors(ids, features.survivors.to(self.device), join(features), self.embed)
        if features is not None:
            tokens, cells = self.lay_out(features)
            prompt = with_pictures(ids, tokens, cells, self.embed, position)
            if position is None or not self.is_clip(layouts):
                return prompt
            return replace(prompt, next_position=int(position[-1].max()) + 1)  # a clip's times may be beyond the text
        other = self.prompt_ids(_another(question), 0)
        prompt = text_alone(ids, wording.shared_prefix(ids, other), self.embed, self.device)
        return replace(prompt, position=position)

    def prompt_ids(self, question: str, pictures: int, *, clip: bool = False) -> list[int]:
        """Ids of a question under the checkpoint's chat template, with `splice.IMAGE` for each of its pictures.

        A `clip` is one picture here. Pictures stand where the template puts them, or where the question has `<image>`.
        """
        tokenizer, template = self._tokenizer(), self.template
        if template is None:
            files = ", ".join(names.TEMPLATES)
            raise ProbeError(f"{self.source} has no chat template; put one into one of {files}")
        parts: list[dict[str, str]] = [{"type": "video" if clip else "image"}] * pictures
        if wording.PLACE in question:
            question = wording.ask(question, pictures, think=False).replace(wording.PLACE, self.place(clip=clip))
            parts = []
        chat = [{"role": wording.USER, "content": [*parts, {"type": "text", "text": question}]}]
        seen = self.clip_id if clip else self.picture_id
        ids = [IMAGE if i == seen else i for i in tokenizer.converse(chat, template)]
        if ids.count(IMAGE) != pictures:
            held = f"{ids.count(IMAGE)} places for {pictures} pictures"
            raise ProbeError(f"the prompt of {self.source} has {held}; the chat template and the question give places")
        return ids

    def tokenize(self, text: str) -> list[int]:
        """Ids of a bare string; the tokenizer's own special tokens are recognised, none are added."""
        return self._tokenizer().encode_bare(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The answer: special tokens left out, outer blanks dropped."""
        return self._tokenizer().decode(ids).strip()

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            files = "tokenizer.json and tokenizer_config.json"
            raise ProbeError(f"{self.source} has no tokenizer: put {files} beside its weights")
        return self.tokenizer


def _another(question: str) -> str:
    """A question that begins differently, whatever this one is: what both prompts share belongs to the template."""
    return ("b" if question.lstrip()[:1] == "a" else "a") + question


def _special(picture: int, ends: Sequence[int], vocabulary: int, source: str) -> SpecialIds:
    """The ids of decoding. There is no mask token: the one of pictures, which no answer has, stands in open slots."""
    if not ends:
        raise ProbeError(f"{source} names no token that ends an answer: put `eos_token_id` into generation_config.json")
    beyond = [i for i in (picture, *ends) if not 0 <= i < vocabulary]
    if beyond:
        raise ProbeError(f"special id {beyond[0]} is outside of the {vocabulary} rows of {source}")
    return SpecialIds(mask=picture, eos=ends[0], stop=ends[0], suppressed=())
