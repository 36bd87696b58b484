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

if not (torch.cuda.is_available() or __import__("os").environ.get("FAKE")):
    pytest.skip("no CUDA device", allow_module_level=True)

KINDS = ("prune/", "record/", "quickstart")
RECIPES = [i.name for i in shipped_recipes() if i.name.startswith(KINDS) and "text_image" not in i.path.read_text()]
EXACT = ("token", "commit_step", "visual_kept", "visual_tokens", "flops", "rows_computed", "prediction")
SETTLED = {"prune/dyvte"}  # wants weights of a router that nobody has given


@cache
def _backbone(name: str, device: str) -> Backbone:
    return load(name, device=device, dtype="float32")


def _same(name: str, backbone: str, folder: Path, sets: list[str]) -> None:
    recipe = load_recipe(name, sets).replace(data={"task": "world/mixed", "limit": 2})
    traces = []
    for side, device in enumerate(("cpu", __import__("os").environ.get("FAKE","cuda"))):
        out = folder / str(side)
        traces.append(run(recipe, backbone=_backbone(backbone, device), out=out, baseline=False, timed=False).trace)
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


@pytest.mark.parametrize("name", [r for r in RECIPES if r not in SETTLED])
def test_a_gpu_finds_what_the_processor_finds(name: str, tmp_path: Path) -> None:
    _same(name, "miniature", tmp_path, [])


@pytest.mark.parametrize("cache_", ["prefix", "none"])
@pytest.mark.parametrize("name", ["prune/divprune", "prune/fastv", "prune/vtw", "record/everything"])
def test_on_the_adapted_one_over_its_cache_too(name: str, cache_: str, tmp_path: Path) -> None:
    if name in RECIPES:
        _same(name, "miniature-adapted", tmp_path, [f"generate.cache={cache_}"])


@pytest.mark.parametrize("name", ["prune/divprune", "prune/fastv", "prune/vtw"])
def test_on_an_autoregressive_one(name: str, tmp_path: Path) -> None:
    _same(name, "miniature-ar", tmp_path, [])
