"""The model, the prompt and the rule that a row is measured with.

Without `--backbone` that is the *medium* shape: the LLaDA-V class with 8 layers of width 512 and random weights, 1,024
visual tokens, 40 of a question and 64 answer slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from probe.backbones import load
from probe.backbones.base import Backbone, Prompt, SpecialIds
from probe.backbones.bidirectional import llama_config
from probe.backbones.llada_v import LladaV
from probe.backbones.siglip import siglip_config
from probe.backbones.tiled_config import model_facts, tower_geometry
from probe.compile import ProbeTable, compile_recipe
from probe.decoding.caching import NoCache
from probe.decoding.policy import Caching
from probe.decoding.rule import Rule
from probe.errors import ProbeError
from probe.generate import Generated, generate
from probe.recipe import Recipe, load_recipe, parse_recipe
from probe.site import Role

SPREAD = 0.02
"""Standard deviation of prompt embeddings, as of a fresh Llama's."""
NOTHING = ProbeTable(())


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of what it is asked. `tile` pixels in patches of 8, where it has an encoder."""

    layers: int = 8
    width: int = 512
    heads: int = 8
    mlp: int = 1408
    vocabulary: int = 2048
    visual: int = 1024
    question: int = 40
    answer: int = 64
    steps: int = 16
    tile: int = 0

    def __str__(self) -> str:
        model = f"{self.layers} x {self.width}, vocabulary {self.vocabulary:,}"
        return f"{model}, {self.visual:,} visual + {self.answer} answer, {self.steps} steps"


@dataclass
class Bench:
    """What the rows of one run share. `published` is the name of a backbone to measure in place of the medium one."""

    shape: Shape = field(default_factory=Shape)
    device: str = "cpu"
    dtype: str = "float32"
    repeats: int = 5
    quick: bool = False
    published: str | None = None
    random_weights: bool = False
    published_layers: int | None = None
    seed: int = 0
    memo: dict[str, Any] = field(default_factory=dict)
    """What two rows have in common (measured once)."""

    @cached_property
    def _prompts(self) -> dict[tuple[Backbone, Shape, int], Prompt]:
        return {}

    @cached_property
    def model(self) -> Backbone:
        """The backbone that is measured."""
        if self.published is None:
            return self.medium(self.shape)
        if self.random_weights:
            from probe.backbones.random_weights import random_weights

            made = random_weights(
                self.published, layers=self.published_layers, device=self.device, dtype=self.dtype, seed=self.seed
            )
            return wordless(made)
        if self.published_layers is not None:
            raise ProbeError("--layers belongs to --random-weights, or to the medium shape; a checkpoint has its own")
        return load(self.published, device=self.device, dtype=self.dtype)

    def medium(self, shape: Shape) -> Backbone:
        """The LLaDA-V class of a shape, with random weights."""
        return _medium(shape, self.device, getattr(torch, self.dtype), self.seed)

    def sized(self, **changes: int) -> Shape:
        """The shape with some sizes changed."""
        return replace(self.shape, **changes)

    def told(self, shape: Shape | None = None) -> str:
        """A shape in words."""
        if self.published is None:
            return str(shape or self.shape)
        facts, asked = self.model.facts, shape or self.shape
        model = f"{self.published}, {facts.layers} x {facts.width}, vocabulary {facts.vocabulary:,}"
        return f"{model}, {asked.visual:,} visual + {asked.answer} answer, {asked.steps} steps"

    def prompt(self, shape: Shape | None = None, model: Backbone | None = None, sample: int = 0) -> Prompt:
        """Random visual tokens before a random question, for this model; made once, so that no time is spent on it."""
        used, asked = model or self.model, shape or self.shape
        key = used, asked, sample
        if key not in self._prompts:
            self._prompts[key] = prompt_of(used, asked, self.seed + 1 + sample)
        return self._prompts[key]

    def rule(self, shape: Shape | None = None, caching: Caching | None = None, model: Backbone | None = None) -> Rule:
        """One block, the same number of tokens in every step."""
        asked, special = shape or self.shape, (model or self.model).special
        return Rule(
            gen_length=asked.answer,
            block_length=asked.answer,
            steps=asked.steps,
            mask_id=special.mask,
            suppressed=special.suppressed,
            caching=caching or NoCache(),
        )

    def answer(
        self,
        table: ProbeTable = NOTHING,
        *,
        shape: Shape | None = None,
        caching: Caching | None = None,
        model: Backbone | None = None,
    ) -> Generated:
        """One sample through the engine."""
        used = model or self.model
        prompt, rule = self.prompt(shape, used), self.rule(shape, caching, used)
        return generate(used, [prompt], rule, table)[0]


def wordless(model: Backbone) -> Backbone:
    """A model without a tokenizer, whose answers stay ids."""
    setattr(model, "decode", _no_words)  # noqa: B010  (a method of this object alone)
    return model


def _no_words(ids: object) -> str:
    return ""


def _medium(shape: Shape, device: str, dtype: torch.dtype, seed: int) -> Backbone:
    config: Mapping[str, Any] = {
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "image_aspect_ratio": "anyres_max_4",
        "image_grid_pinpoints": "(1x1),...,(2x2)",
    }
    vision = None
    if shape.tile:
        vision = {
            "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": ENCODER_LAYERS + 1,
            "num_attention_heads": 4, "image_size": shape.tile, "patch_size": PATCH, "num_channels": 3,
            "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
        }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LladaV(
            llama_config(config, shape.vocabulary, "probe"),
            None if vision is None else siglip_config(vision, "probe"),
            facts=model_facts("medium", config, shape.vocabulary, vision),
            special=SpecialIds(mask=0, eos=1, stop=2, suppressed=(0,)),
            geometry=None if vision is None else tower_geometry(config, vision),
            source="medium",
        )
        if vision is not None:
            torch.nn.init.normal_(model.image_newline, std=SPREAD)
    model.to(device, dtype)
    model.fill_buffers()
    return wordless(model)


ENCODER_LAYERS, PATCH = 4, 8


def prompt_of(model: Backbone, shape: Shape, seed: int) -> Prompt:
    """Random visual tokens before a random question; the numbers depend on the seed alone, not on the device."""
    v, n = shape.visual, shape.visual + shape.question
    made = torch.randn(n, model.facts.width, generator=torch.Generator().manual_seed(seed)) * SPREAD
    like = model.embed(torch.tensor([model.special.mask], device=model.device))
    role = torch.full((n,), int(Role.QUESTION), dtype=torch.int8)
    role[:v] = int(Role.VISUAL)
    visual = torch.full((n,), -1)
    visual[:v] = torch.arange(v)
    none = torch.zeros(v, dtype=torch.int16)
    ids, box = torch.full((n,), -1), torch.zeros(v, 4)
    at = model.device
    return Prompt(made.to(like), ids.to(at), role.to(at), visual.to(at), box.to(at), none.to(at), none.to(at))


def table_of(model: Backbone, recipe: str, sets: list[str]) -> ProbeTable:
    """A shipped recipe (`prune/fastv`) or one's own text, with dials turned, compiled for a model."""
    loaded: Recipe = parse_recipe(recipe, sets=sets) if "\n" in recipe else load_recipe(recipe, sets)
    return compile_recipe(loaded, model.facts)
