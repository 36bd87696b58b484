"""Short ways to run probes on the tiny backbone."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from interventions import RECORD
from PIL import Image

from probe.backbones.base import Backbone, Prompt
from probe.compile import compile_recipe
from probe.data import load
from probe.generate import Generated, generate
from probe.loop import Rule
from probe.recipe import parse_recipe

HEADER = "schema: 1\nname: test\nprobes:\n"
Runner = Callable[..., list[Generated]]


@cache
def _pictures(n: int) -> list[tuple[Image.Image, str]]:
    return [(s.images[0], s.question) for s in load("world/mixed", n)]


@pytest.fixture(scope="session")
def prompts_for() -> Callable[[Backbone, int], list[Prompt]]:
    """`prompts_for(backbone, n)`: n prompts of different lengths; every third picture is wide, so has other tiles."""

    def make(backbone: Backbone, n: int) -> list[Prompt]:
        out = []
        for i, (picture, question) in enumerate(_pictures(n)):
            seen = picture.resize((96, 48)) if i % 3 == 1 else picture
            out.append(backbone.encode([seen], question))
        return out

    return make


@pytest.fixture(scope="session")
def run_probes() -> Runner:
    """`run_probes(backbone, prompts, yaml_of_probes, **rule)`: the probes on a batch, 8 slots in 4 steps."""

    def go(backbone: Backbone, prompts: list[Prompt], probes: str = RECORD, **settings: Any) -> list[Generated]:
        samples = settings.pop("samples", None)
        code = settings.pop("code_probes", ())
        table = compile_recipe(parse_recipe(HEADER + probes), backbone.facts)
        rule = Rule(
            **{"gen_length": 8, "block_length": 8, "steps": 4} | settings,
            mask_id=backbone.special.mask,
            suppressed=backbone.special.suppressed,
        )
        return generate(backbone, prompts, rule, table, samples=samples, code_probes=code)

    return go
