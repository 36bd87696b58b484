"""On a GPU the same comes out as on the processor: every recipe that runs on a miniature, in float32."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from probe.backbones import load
from probe.backbones.base import Backbone
from probe.recipe import load_recipe
from probe.recipe_files import shipped_recipes
from probe.runner import run
from probe.trace import open_trace

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

KINDS = ("prune/", "record/", "quickstart")
ELSEWHERE = {"prune/dyvte"}  # wants the weights of a router that nobody has given
RECIPES = [
    i.name
    for i in shipped_recipes()
    if i.name.startswith(KINDS) and i.name not in ELSEWHERE and "text_image" not in i.path.read_text()
]
EXACT = ("token", "commit_step", "visual_kept", "visual_tokens", "flops", "rows_computed", "prediction")
CLOSE_CALLS = ("prune/tome", "prune/vispruner", "prune/sparsevlm_rank")
"""They match like to like, or count a rank: where two are as good as equal, a last digit decides between them."""


@cache
def _backbone(name: str, device: str) -> Backbone:
    return load(name, device=device, dtype="float32")


def _traces(name: str, backbone: str, folder: Path, sets: list[str]) -> list[Path]:
    recipe = load_recipe(name, sets).replace(data={"task": "world/mixed", "limit": 2})
    return [
        run(recipe, backbone=_backbone(backbone, d), out=folder / d, baseline=False, timed=False).trace
        for d in ("cpu", "cuda")
    ]


def _same(traces: list[Path]) -> None:
    with open_trace(traces[0]) as here, open_trace(traces[1]) as there:
        assert here.variables.keys() == there.variables.keys()
        assert here.array("failed").tolist() == there.array("failed").tolist()
        for variable in here.variables:
            if re.match("seconds|peak_memory", variable):
                continue
            for row in range(here.n_samples):
                a, b = (t.row(variable, row) for t in (here, there))
                if variable in EXACT:
                    np.testing.assert_array_equal(b, a, err_msg=variable)
                elif np.issubdtype(np.asarray(a).dtype, np.floating):
                    np.testing.assert_allclose(b, a, rtol=2e-3, atol=2e-3, err_msg=variable)


@pytest.mark.parametrize("name", [r for r in RECIPES if r not in CLOSE_CALLS])
def test_a_gpu_finds_what_the_processor_finds(name: str, tmp_path: Path) -> None:
    _same(_traces(name, "miniature", tmp_path, []))


@pytest.mark.parametrize("name", CLOSE_CALLS)
def test_close_calls_fall_alike_nearly_always(name: str, tmp_path: Path) -> None:
    here, there = (open_trace(path) for path in _traces(name, "miniature", tmp_path, []))
    with here, there:
        for row in range(here.n_samples):
            first = (t.row("visual_kept", row)[0] for t in (here, there))  # later steps may have gone another way
            a, b = first
            assert (a == b).mean() > 0.9


@pytest.mark.parametrize("cache_", ["prefix", "none"])
@pytest.mark.parametrize("name", ["prune/divprune", "prune/fastv", "prune/vtw", "record/attention_mass"])
def test_over_the_adapted_ones_cache_too(name: str, cache_: str, tmp_path: Path) -> None:
    _same(_traces(name, "miniature-adapted", tmp_path, [f"generate.cache={cache_}"]))


@pytest.mark.parametrize("name", ["prune/divprune", "prune/fastv", "prune/vtw"])
def test_on_an_autoregressive_one(name: str, tmp_path: Path) -> None:
    _same(_traces(name, "miniature-ar", tmp_path, []))
