"""The three kinds of miniature: what each is made of, and which batches it trains on when.

``from_scratch`` is masked diffusion from nothing. ``autoregressive`` predicts the next token under causal attention.
``adapted`` starts from an autoregressive one, sees in both directions from its first step, and predicts masked tokens
from the row before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import SiglipVisionModel

from probe.zoo import distil
from probe.zoo.export import export
from probe.zoo.export_contrast import export_lavida, export_llava
from probe.zoo.model import language_config, qwen2_config
from probe.zoo.tokenizer import CHATML, LLADA, Spelling
from probe.zoo.tower import Tower

PACKED_UNTIL = 0.8  # the share of the training from scratch that packs groups
ADAPTED_PACKED_UNTIL = 0.6
DESCRIBE_FROM = 0.3  # from here on long answers, and among them descriptions, take most of the steps
CURRICULUM_UNTIL = 0.4  # the share over which one- and two-line pages give way to whole ones


@dataclass(frozen=True)
class Size:
    """How large everything is. ``pictures`` counts the scenes, and the whole pages; None: as the kind has it."""

    pictures: int | None = None
    tower_width: int = 128
    tower_layers: int = 3
    tower_steps: int | None = None
    tower_batch: int | None = None
    hidden: int = 192
    layers: int = 6
    heads: int = 4
    mlp: int = 512
    images: int = 16
    short_groups: int = 8
    long_groups: int = 3
    compiled: bool = True


SMOKE = Size(
    pictures=24, tower_width=32, tower_layers=1, tower_steps=6, tower_batch=9, hidden=32, layers=2, heads=2,
    mlp=64, images=4, short_groups=2, long_groups=1, compiled=False,
)  # fmt: skip


@dataclass
class Plan:
    """What the next batch is, as a function of the step and of the training's progress in [0, 1].

    ``packed``: groups behind a prefix. ``causal``: nothing sees what follows it. ``apart``: the prompt, question
    included, does not see the answer, as with LaViDa's cache of it.
    """

    packed: bool
    long: bool
    images: int
    groups: int
    scenes: float
    brief: float
    causal: bool = False
    apart: bool = False

    @staticmethod
    def at(step: int, progress: float, size: Size) -> Plan:
        """From scratch: packed, then whole."""
        packed = progress < PACKED_UNTIL
        # Colours, shapes and pages are learned first, descriptions last: half long steps, later three quarters.
        early = progress < DESCRIBE_FROM
        long = step % 2 == 1 if early else step % 4 != 0
        groups = (size.long_groups if long else size.short_groups) if packed else 1
        scenes = 0.7 if long and not early else 0.5
        return Plan(packed, long, size.images if packed else 2 * size.images, groups, scenes, _brief(progress))

    @staticmethod
    def autoregressive(step: int, progress: float, size: Size) -> Plan:
        """Always packed, which under causal attention is what inference does; a long answer needs no second copy."""
        long = step % 2 == 1
        images, groups = (3 * size.images // 2, 1) if long else (size.images, size.short_groups)
        return Plan(True, long, images, groups, 0.5, _brief(progress), causal=True)

    @staticmethod
    def adapted(step: int, progress: float, size: Size) -> Plan:
        """Packed, then one question per sequence: everything sees everything, or the prompt only itself, in turns."""
        packed = progress < ADAPTED_PACKED_UNTIL
        long = step % 4 != 0 if packed else step % 2 == 1
        apart = not packed and step // 2 % 2 == 1
        groups = (size.long_groups if long else size.short_groups) if packed else 1
        images = size.images if packed else 3 * size.images // 2
        return Plan(packed or apart, long, images, groups, 0.6 if long else 0.5, 0.1, apart=apart)


def _brief(progress: float) -> float:
    return max(0.1, 0.9 - 0.8 * progress / CURRICULUM_UNTIL)


@dataclass(frozen=True)
class Kind:
    """What sets a kind apart. ``tower`` begins a tower from the first miniature's; None: taught from nothing."""

    spelling: Spelling
    config: Callable[..., Any]
    export: Callable[..., None]
    plan: Callable[[int, float, Size], Plan]
    steps: int
    muon: float
    adamw: float
    pictures: int
    tower_steps: int
    tower_batch: int
    tower: Callable[[SiglipVisionModel, int], Tower] | None = None
    tower_muon: float = 2e-3


KINDS: dict[str, Kind] = {
    "from_scratch": Kind(LLADA, language_config, export, Plan.at, 3_100, 3e-3, 2e-3, 15_000, 1_100, 64),
    "autoregressive": Kind(
        CHATML, qwen2_config, export_llava, Plan.autoregressive, 2_000, 3e-3, 2e-3, 15_000, 400, 60,
        distil.clip_from, 1e-3,
    ),
    "adapted": Kind(
        CHATML, qwen2_config, export_lavida, Plan.adapted, 1_000, 1.5e-3, 1e-3, 6_000, 1_000, 18,
        distil.fine_from, 3e-3,
    ),
}  # fmt: skip
