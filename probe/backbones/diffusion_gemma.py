"""DiffusionGemma (Google, 2026) on transformers' own modules: canvases of tokens that are re-noised, not masked.

A causal prefix (prompt and finished canvases, soft tokens of one picture seeing each other) and an open canvas that
sees it and itself. Logits are not shifted; they are soft-capped. A canvas begins as noise, and each pass is told what
the pass before expected (`condition`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Self, cast

import torch
from PIL import Image
from torch import Tensor, nn
from transformers.models.gemma4.modeling_gemma4 import Gemma4VisionModel, Gemma4VisionRotaryEmbedding

from probe.attend import KERNELS
from probe.backbones import diffusion_gemma_config as names
from probe.backbones import gemma_prompt as text
from probe.backbones.base import Backbone, Features, GenerationDefaults, LayerModules, Prompt, SpecialIds
from probe.backbones.checkpoint import Checkpoint, Tensors, choose_dtype
from probe.backbones.diffusion_gemma_modules import (
    DECODER,
    GemmaCosts,
    GemmaStack,
    costs,
    ids_of,
    layer_modules,
    parts,
    published_name,
    read_config,
)
from probe.backbones.placement import likely_device
from probe.backbones.prompt import shared_prefix
from probe.backbones.rows import Rows
from probe.backbones.splice import IMAGE
from probe.backbones.tokens import Tokenizer, load_tokenizer
from probe.backbones.weights import Spread, take
from probe.errors import ProbeError
from probe.site import ModelFacts, Role

EMBEDDING_NAME = "model.embed_tokens.weight"
EMBEDDING = f"{DECODER}embed_tokens.weight"


class DiffusionGemma(Backbone):
    """DiffusionGemma behind the adapter contract."""

    reads_rows = True

    def __init__(
        self,
        config: Any,
        *,
        facts: ModelFacts,
        special: SpecialIds,
        grid: names.Grid,
        ends: tuple[int, ...] = (),
        tokenizer: Tokenizer | None = None,
        source: str = "",
        revision: str = "",
    ) -> None:
        super().__init__()
        self.facts, self.special, self.source, self.revision = facts, special, source, revision
        self.config, self.grid, self.ends, self.tokenizer = config, grid, ends, tokenizer
        self.canvas_length = int(config.canvas_length)
        self.model = GemmaStack(config.text_config)
        self.vision_tower = Gemma4VisionModel(config.vision_config)
        self.embed_vision = parts.DiffusionGemmaMultimodalEmbedder(config.vision_config, config.text_config)
        self._layers = layer_modules(self.model)
        self._encoder_layers = tuple(_encoder_modules(layer) for layer in self.vision_tower.encoder.layers)
        self.eval().requires_grad_(False)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        *,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "auto",
        attention: str | None = None,
        encoder_attention: str | None = None,
        experts: str | None = None,
        special: SpecialIds | None = None,
        device_map: object = None,
        max_memory: Mapping[int | str, int | str] | None = None,
    ) -> Self:
        """Build on no device, then take every tensor from the checkpoint: none missing, none left over.

        `attention` and `encoder_attention` are `sdpa` or `eager`; `experts` is how transformers runs them
        (`grouped_mm`, `batched_mm` or `eager`; None: `grouped_mm`, in float64 `eager`). `special` replaces the ids
        found in the tokenizer. `device_map` and `max_memory` spread the model over devices (`placement.place`).
        """
        source, facts = checkpoint.source, names.facts_of(checkpoint)
        kernel, encoder_kernel = _kernel(attention or "sdpa"), _kernel(encoder_attention or attention or "sdpa")
        config = read_config(checkpoint.config, source, kernel, encoder_kernel, experts or "grouped_mm")
        tokenizer, ends = load_tokenizer(checkpoint.folder), names.end_ids(checkpoint)
        with torch.device("meta"):
            model = cls(
                config,
                facts=facts,
                special=special or _special(tokenizer, ends, int(config.text_config.vocab_size), source),
                grid=names.grid_of(checkpoint),
                ends=ends,
                tokenizer=tokenizer,
                source=source,
                revision=checkpoint.fingerprint,
            )
        spread = None if device_map is None else Spread(device_map, max_memory)
        with checkpoint.tensors(str(device) if spread is None else "cpu") as weights:
            stored = weights.read(EMBEDDING, 1).dtype if EMBEDDING in weights.shapes else torch.float32
            model._take(weights, checkpoint, choose_dtype(dtype, stored, likely_device(device, device_map)), spread)
        if experts is None and model.dtype is torch.float64:
            config.text_config._experts_implementation = "eager"
        gen_length, block_length, steps = names.lengths_of(checkpoint)
        stop = tuple(token for i in ends if tokenizer and (token := tokenizer.token_of(i)))
        model.defaults = GenerationDefaults(
            gen_length=gen_length,
            block_length=block_length,
            steps=steps,
            stop=stop,
            stop_without_pictures=True,
            unmask={"renoise": names.sampling_of(checkpoint)},
            cache={"blocks": {}},
        )
        return model

    def _take(self, weights: Tensors, checkpoint: Checkpoint, dtype: torch.dtype, spread: Spread | None) -> None:
        """Put the checkpoint's tensors in and compute the buffers that it does not hold."""
        published = {name: published_name(name) for name in self.state_dict()}
        finish = take(self, weights, published, dtype, checkpoint.folder, spread=spread)
        self.model.fill_buffers()
        self.vision_tower.encoder.rotary_emb = Gemma4VisionRotaryEmbedding(self.config.vision_config).to(self.device)
        finish()
        self.eval().requires_grad_(False)

    def used_directly(self) -> Sequence[str]:
        """The embedding, which is the head as well."""
        return [EMBEDDING_NAME]

    @property
    def device(self) -> torch.device:
        """Where the weights are, or the sequence is looked after."""
        return self.home or cast(Tensor, self.model.embed_tokens.weight).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of weights and activations."""
        return cast(Tensor, self.model.embed_tokens.weight).dtype

    @property
    def lm(self) -> GemmaStack:
        """Encoder and decoder in one stack; rows that are not open are the encoder's."""
        return self.model

    @property
    def layers(self) -> Sequence[LayerModules]:
        """The stack's layers, first to last."""
        return self._layers

    @property
    def final_norm(self) -> nn.Module:
        """The norm after the last layer."""
        return cast(nn.Module, self.model.norm)

    @property
    def encoder_layers(self) -> Sequence[LayerModules]:
        """The image encoder's layers."""
        return self._encoder_layers

    @cached_property
    def costs(self) -> GemmaCosts:
        """What layers, head and self-conditioning cost."""
        return costs(self.config.text_config)

    def row_ids(self, rows: Rows) -> Tensor:
        """`(batch, length, 3)`: position, picture, open."""
        return ids_of(rows)

    def sees(self, query: Rows, key: Rows) -> tuple[Tensor | None, ...]:
        """Who may attend to whom, for each kind of layer: causal rows, pictures, the open canvas, windows."""
        return self.model.sees(query, key)

    def rotary(self, hidden: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """`(cos, sin)`, each `(batch, length, sum of head sizes)`: one table after the other; layers take theirs."""
        return self.model.tables(hidden, position)

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings `(..., width)`, scaled by the square root of the width."""
        return cast(Tensor, self.model.embed_tokens(ids))

    def condition(self, embeds: Tensor, logits: Tensor | None) -> Tensor:
        """The open canvas as the layers meet it: self-conditioned, and normed also without `logits`."""
        return self.model.condition(embeds, logits)

    def head(self, hidden: Tensor) -> Tensor:
        """Final-normed rows to float32 logits, `c * tanh(x / c)`; the head is the embedding."""
        logits = nn.functional.linear(hidden.to(self.device), cast(Tensor, self.model.embed_tokens.weight)).float()
        cap = float(self.config.text_config.final_logit_softcapping)
        return torch.tanh(logits / cap) * cap

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> Features:
        """Soft tokens `(1, tokens of all pictures, width)`; the layout is each picture's tokens across and down.

        Pictures go through the encoder one by one and unpadded.
        """
        if not images:
            raise ProbeError("no picture to encode; leave the features out for a question without pictures")
        tokens = []
        for image in images:
            pixels, places = text.patches(image, self.grid)
            seen = self.vision_tower(pixels[None].to(self.device), places[None].to(self.device)).last_hidden_state
            tokens.append(self.embed_vision(seen))
        return Features(torch.cat(tokens)[None], tuple(self.grid.fit(*image.size) for image in images))

    def encode_flops(self, features: Features) -> float:
        """Patch embedding, layers, pooling and projection of every picture."""
        vision = self.config.vision_config
        sizes = {
            "width": vision.hidden_size,
            "mlp": vision.intermediate_size,
            "heads": vision.num_attention_heads,
            "kv_heads": vision.num_key_value_heads,
            "head_size": vision.head_dim,
            "layers": vision.num_hidden_layers,
            "patch": self.grid.patch,
            "pool": self.grid.pool,
        }
        grids = cast(Sequence[tuple[int, int]], features.layout)
        counts = (across * down * self.grid.pool**2 for across, down in grids)
        return float(sum(text.encode_cost(sizes, n, self.facts.width) for n in counts))

    @torch.no_grad()
    def assemble(self, question: str, features: Features | None, *, think: bool = False) -> Prompt:
        """Template, soft tokens and question as one sequence."""
        tokenizer = self._tokenizer()
        grids = cast(Sequence[tuple[int, int]], features.layout) if features else ()
        message = text.parts_of(question, len(grids))
        prompt = tokenizer.template(text.chat(message), enable_thinking=think) or text.render(message, think=think)
        ids = self._encode(prompt)
        if features is None:
            before = self._encode(prompt[: prompt.rfind(question.strip())])
            return self.without_pictures(ids, shared_prefix(before, ids))
        return self.with_pictures(ids, features)

    @torch.no_grad()
    def with_pictures(self, ids: Sequence[int], features: Features) -> Prompt:
        """A sequence from ids in which the config's `image_token_id` stands for each picture."""
        config, grids = self.config, cast(Sequence[tuple[int, int]], features.layout)
        counts = [across * down for across, down in grids]
        image, begin, end = (int(i) for i in (config.image_token_id, config.boi_token_id, config.eoi_token_id))
        row = torch.tensor(text.widen(list(ids), counts, image, begin, end), device=self.device)
        soft = row == image
        embeds = self.embed(row.masked_fill(soft, self.special.mask))
        embeds[soft] = features.projected[0].to(embeds)
        role = torch.full_like(row, Role.QUESTION, dtype=torch.int8)
        role[: int(soft.nonzero()[0])] = Role.SYSTEM
        role[soft] = Role.VISUAL
        picture = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(self.device, torch.int16)
        box = torch.cat([text.boxes(*grid) for grid in grids]).to(self.device)
        visual = torch.where(soft, soft.cumsum(0) - 1, -1)
        return Prompt(embeds, row.masked_fill(soft, IMAGE), role, visual, box, picture, picture)

    @torch.no_grad()
    def without_pictures(self, ids: Sequence[int], system: int) -> Prompt:
        """A sequence of text alone, the first `system` positions of which belong to the template."""
        row = torch.tensor(list(ids), device=self.device)
        role = torch.full_like(row, Role.QUESTION, dtype=torch.int8)
        role[:system] = Role.SYSTEM
        none = torch.zeros(0, dtype=torch.int16, device=self.device)
        box = torch.zeros(0, 4, device=self.device)
        return Prompt(self.embed(row), row, role, torch.full_like(row, -1), box, none, none)

    def tokenize(self, text: str) -> list[int]:
        """Ids of a bare string; the tokenizer's own special tokens are recognised, none are added."""
        return self._tokenizer().encode_bare(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The answer: before the first end, after any thoughts, without special tokens and outer blanks."""
        tokenizer = self._tokenizer()
        return tokenizer.decode(text.answer_ids(ids, self.ends, tokenizer.id_of(text.THOUGHT_OVER))).strip()

    def _encode(self, prompt: str) -> list[int]:
        tokenizer = self._tokenizer()
        return tokenizer.encode_bare(prompt) if prompt.startswith(text.BOS) else tokenizer.encode(prompt)

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            files = "tokenizer.json and tokenizer_config.json"
            raise ProbeError(f"{self.source} has no tokenizer: put {files} beside its weights")
        return self.tokenizer


def _encoder_modules(layer: Any) -> LayerModules:
    def join(residual: Tensor, mlp: Tensor, ids: Tensor) -> Tensor:
        return residual + cast(Tensor, layer.post_feedforward_layernorm(mlp))

    return LayerModules(
        layer, layer.self_attn, layer.pre_feedforward_layernorm, layer.mlp, layer.input_layernorm, join=join
    )


def _kernel(name: str) -> str:
    if name not in KERNELS:
        raise ProbeError(f"attention={name!r}; DiffusionGemma's masks run on: {', '.join(KERNELS)}")
    return KERNELS[name]


def _special(tokenizer: Tokenizer | None, ends: Sequence[int], vocabulary: int, source: str) -> SpecialIds:
    mask = tokenizer.id_of(names.MASK) if tokenizer else None
    if tokenizer and mask is None:
        raise ProbeError(f"the tokenizer of {source} lacks {names.MASK}; give `special` ids instead")
    chosen = SpecialIds(mask=4 if mask is None else mask, eos=ends[0], stop=ends[min(1, len(ends) - 1)], suppressed=())
    beyond = [i for i in (chosen.mask, *ends) if not 0 <= i < vocabulary]
    if beyond:
        raise ProbeError(f"special id {beyond[0]} is outside of the {vocabulary} rows of {source}")
    return chosen
