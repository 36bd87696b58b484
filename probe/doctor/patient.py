"""The backbone under examination, the samples that it is shown, and the plain ways to run it.

What stands here calls the adapter directly, without loop, tracer or surgery: it is what the engine is compared with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from probe.attend import KERNELS, kernel_name
from probe.backbones.base import Backbone, Prompt
from probe.backbones.checkpoint import Checkpoint
from probe.backbones.rows import Rows
from probe.canvas import Canvas, make_canvas
from probe.errors import ProbeError
from probe.site import Role

SLOTS = 6
"""Answer slots of the samples."""
PICTURES = ((96, 64), (64, 96), (64, 64), (128, 64))
QUESTIONS = ("What is it?", "Which colour has the largest thing?", "Read it.", "How many are there in all of it?")
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 2e-1}
"""By type: how far two ways to the same numbers may differ, as a share of the largest. Softmax is float32's."""

Masks = tuple[Tensor | None, ...]


class Unwell(Exception):
    """A check failed; the text says what was found and what would be right."""


class NotHere(Exception):
    """A check does not apply; the text says why."""


def expect(right: bool, reason: str) -> None:
    """Raise `Unwell` with the reason unless it is right."""
    if not right:
        raise Unwell(reason)


@dataclass(frozen=True)
class Told:
    """Rows of a batch as the language model gets them.

    `embeds (batch, length, width)` and what is known of each row; `canvas` says where each sample's slots stand.
    """

    canvas: Canvas
    embeds: Tensor
    rows: Rows

    @property
    def length(self) -> int:
        """Rows, padding included."""
        return self.embeds.shape[1]


class Patient:
    """A backbone, the checkpoint that it came from (if any), and samples to show it."""

    def __init__(self, backbone: Backbone, checkpoint: Checkpoint | None = None, **options: Any) -> None:
        self.backbone, self.checkpoint, self.options = backbone, checkpoint, options
        self.answers: dict[tuple[int, str, str], Any] = {}
        """What was generated so far (`runs.answers`)."""

    @cached_property
    def sees_pictures(self) -> bool:
        """Whether it takes pictures."""
        try:
            self.backbone.encode_images([self.picture(PICTURES[0])])
        except ProbeError:
            return False
        return True

    @property
    def speaks(self) -> bool:
        """Whether there is a tokenizer."""
        return getattr(self.backbone, "tokenizer", None) is not None

    @cached_property
    def dtype(self) -> torch.dtype:
        """The type of activations."""
        return self.backbone.embed(torch.tensor([self.backbone.special.mask], device=self.device)).dtype

    @cached_property
    def device(self) -> torch.device:
        """Where the embeddings are."""
        return next(self.backbone.lm.parameters()).device

    @property
    def described(self) -> dict[str, str | int]:
        """Sizes, type and place, for a headline."""
        facts = self.backbone.facts
        return {
            "layers": facts.layers,
            "width": facts.width,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "attention": kernel_name(str(getattr(self.backbone.lm.config, "_attn_implementation", ""))),
        }

    @property
    def tolerance(self) -> float:
        """How far two ways to the same numbers may differ, as a share of the largest."""
        return TOLERANCE.get(self.dtype, 1e-2)

    @property
    def precise(self) -> bool:
        """Whether rounding is so small that single numbers can be compared."""
        return self.tolerance <= TOLERANCE[torch.float32]

    @property
    def compares_later(self) -> bool:
        """Whether later steps of a generation can be compared, too.

        Where a pass is told what the one before expected (`condition`), rounding grows twentyfold with every pass, and
        only in float64 is it small enough.
        """
        told = type(self.backbone).condition is not Backbone.condition
        return self.dtype is torch.float64 if told else self.precise

    def picture(self, size: tuple[int, int]) -> Image.Image:
        """Blocks of noise in colour, the same every time."""
        noise = np.random.default_rng(size).integers(0, 255, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
        return Image.fromarray(noise.repeat(8, 0).repeat(8, 1))

    @cached_property
    def prompts(self) -> list[Prompt]:
        """Four samples of different lengths: a picture and a question each, or what the backbone can do of it."""
        return [self._prompt(size, question) for size, question in zip(PICTURES, QUESTIONS, strict=True)]

    def _prompt(self, size: tuple[int, int], question: str) -> Prompt:
        if not self.speaks:
            return self._unspoken(len(question), sum(size) // 8)
        return self.backbone.encode([self.picture(size)] if self.sees_pictures else [], question)

    def _unspoken(self, text: int, visual: int) -> Prompt:
        """A sample of random tokens, for a backbone without a tokenizer: some of them stand for a picture."""
        generator = torch.Generator().manual_seed(text * 1000 + visual)
        ids = torch.randint(self.backbone.facts.vocabulary, (2 + visual + text,), generator=generator).to(self.device)
        at = torch.arange(len(ids), device=self.device) - 2
        seen = (at >= 0) & (at < visual)
        role = torch.where(seen, int(Role.VISUAL), int(Role.QUESTION)).to(torch.int8)
        role[:2] = int(Role.SYSTEM)
        one = torch.zeros(visual, dtype=torch.int16, device=self.device)
        box = torch.tensor([0.0, 0.0, 1.0, 1.0], device=self.device).expand(visual, 4)
        embeds = self.backbone.embed(ids)
        return Prompt(embeds, ids.masked_fill(seen, -1), role, torch.where(seen, at, -1), box, one, one)

    @cached_property
    def mask_embed(self) -> Tensor:
        """`(width,)`: what stands at an open slot."""
        return self.backbone.embed(torch.tensor(self.backbone.special.mask, device=self.device))

    def told(self, prompts: Sequence[Prompt], answer: Tensor | None = None) -> Told:
        """Prompts with their slots behind them: open ones, or the embeddings `answer (slots, width)` for each."""
        slots = SLOTS if answer is None else answer.shape[0]
        canvas = make_canvas(prompts, self.mask_embed, slots)
        layout, embeds = canvas.layout, canvas.embeds.clone()
        if answer is not None:
            for b, start in enumerate(canvas.prompt_length):
                embeds[b, start : start + slots] = answer.to(embeds.dtype)
        picture = torch.full_like(layout.visual, -1)
        for b, prompt in enumerate(prompts):
            if prompt.n_visual:
                own = prompt.picture.to(picture.device).long()[layout.visual[b].clamp(min=0)]
                picture[b] = torch.where(layout.visual[b] >= 0, own, -1)
        place = torch.arange(layout.width, device=embeds.device).expand_as(layout.row)
        opened = layout.role == int(Role.ANSWER)
        padded = any(n != layout.width for n in layout.length)
        rows = Rows(layout.position, picture, opened, layout.row >= 0 if padded else None, place)
        return Told(canvas, embeds, rows)

    @cached_property
    def one(self) -> Told:
        """The first sample alone."""
        return self.told(self.prompts[:1])

    def states(self, embeds: Tensor, query: Rows, masks: Any, past: Any = None) -> Tensor:
        """`(batch, length, width)`: final-normed hidden states of these rows."""
        given = masks
        if isinstance(masks, tuple):
            given = masks[0] if len(masks) == 1 else masks
        out = self.backbone.lm(
            inputs_embeds=embeds,
            position_ids=self.backbone.row_ids(query),
            attention_mask=given,
            past_key_values=past,
            use_cache=False,
        )
        return cast(Tensor, out.last_hidden_state)

    def whole(self, told: Told) -> Tensor:
        """The states of a whole sequence under the backbone's own masks."""
        return self.states(told.embeds, told.rows, self.backbone.sees(told.rows, told.rows))

    def written(self, masks: Masks, told: Told) -> tuple[Tensor, ...]:
        """The masks of a whole sequence written out: `(batch, 1, length, length)` bool, one per kind of layer."""
        n, batch = told.length, told.embeds.shape[0]
        full = torch.ones(batch, 1, n, n, dtype=torch.bool, device=told.embeds.device)
        return tuple(full if m is None else m.expand(batch, 1, n, n) for m in masks)

    def apart(self, got: Tensor, wanted: Tensor) -> float:
        """How different two results are: the largest difference as a share of the largest number.

        In 16-bit types the root mean square of both instead: single numbers are rounded too much to say anything.
        Infinite where either is not finite.
        """
        if not (got.isfinite().all() and wanted.isfinite().all()):
            return float("inf")
        a, b = got.double(), wanted.double()
        size = (lambda x: x.abs().amax()) if self.precise else (lambda x: x.square().mean().sqrt())
        return float(size(a - b) / size(b).clamp(min=1e-12))

    def expect_close(self, got: Tensor, wanted: Tensor, what: str) -> float:
        """Raise `Unwell` where two ways to the same numbers differ by more than rounding; returns by how much."""
        gap = self.apart(got, wanted)
        expect(gap <= self.tolerance, f"{what}: they differ by {gap:.1e}; {self.tolerance:.0e} may be")
        return gap

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Attention and experts as plain matrix products, in decoder and encoder, for the time of a `with` block.

        Raises `NotHere` where the decoder's attention runs on a kernel that does not hand on its rows.
        """
        own = getattr(self.backbone.lm.config, "_attn_implementation", None)
        if own not in KERNELS.values():
            raise NotHere(f"attention runs on `{own}`; load with attention=`sdpa` or `eager` to look at its rows")
        modules = [*self.backbone.lm.modules(), *(x.attention for x in self.backbone.encoder_layers)]
        configs = {id(c): c for m in modules if (c := getattr(m, "config", None)) is not None}
        before = []
        try:
            for config in configs.values():
                for setting, plain in {
                    "_attn_implementation": KERNELS["eager"],
                    "_experts_implementation": "eager",
                }.items():
                    if getattr(config, setting, None) is not None:
                        before.append((config, setting, getattr(config, setting)))
                        setattr(config, setting, plain)
            yield
        finally:
            for config, setting, value in reversed(before):
                setattr(config, setting, value)


class KeptKeys:
    """A cache by duck typing: what the first pass writes stands before what later ones bring."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.frozen = False

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keys (after rotary) and values of a layer: kept, or put behind what is kept."""
        if not self.frozen:
            self.kept[layer_idx] = key, value
            return key, value
        first, second = self.kept[layer_idx]
        return torch.cat([first, key], 2), torch.cat([second, value], 2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many keys are kept."""
        return self.kept[layer_idx][0].shape[2] if layer_idx in self.kept else 0


def part(rows: Rows, at: slice) -> Rows:
    """Some of the rows, with their places among all columns."""
    real = None if rows.real is None else rows.real[:, at]
    place = None if rows.place is None else rows.place[:, at]
    return replace(rows, position=rows.position[:, at], picture=rows.picture[:, at], open=rows.open[:, at],
                   real=real, place=place)  # fmt: skip


def modules_of(layer: Any) -> dict[str, nn.Module]:
    """The modules of a layer that hooks attach to, by the names of the contract, in the order in which they run."""
    found = {"pre_attention_norm": layer.pre_attention_norm, "attention": layer.attention}
    found |= {"pre_mlp_norm": layer.pre_mlp_norm, "mlp": layer.mlp, "layer": layer.layer}
    return {name: module for name, module in found.items() if module is not None}
