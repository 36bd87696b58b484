"""`load`: settings of loading stand in the recipe, count towards what is done, and are refused if nobody knows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import probe
from probe.data import Sample
from probe.data.tasks import load as load_task
from probe.errors import ProbeError
from probe.recipe import parse_recipe
from probe.trace import open_trace

BARE = "schema: 1\nname: bare\ngenerate: {gen_length: 2, steps: 2, block_length: 2}\n"


def test_what_is_computed_counts_where_it_is_computed_does_not() -> None:
    bare, eager = parse_recipe(BARE), parse_recipe(BARE, sets=["load.attention=eager"])
    assert eager.load == {"attention": "eager"} and eager.hash != bare.hash
    for placed in ("load.device_map=auto", 'load.device_map={"": cpu}', "load.max_memory={0: 20GiB}"):
        assert parse_recipe(BARE, sets=[placed]).hash == bare.hash


def test_a_run_loads_as_the_recipe_says(tiny_folder: Path, tmp_path: Path) -> None:
    samples: list[Sample] = list(load_task("world/short", 1))
    recipe = parse_recipe(BARE, sets=[f"backbone={tiny_folder}", "load.attention=eager"])
    result = probe.run(recipe, samples=samples, out=tmp_path)
    with open_trace(result.trace) as trace:
        assert "eager" in trace.header.attention_kernel


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("load.device=cuda", "--device"),
        ("load.dtype=float32", "--dtype"),
        ("load.max_pixel=3", "'max_pixel'"),
        ("load.tp_plan=auto", "device_map"),
        ("load.attention=egaer", "egaer"),
        ("load=3", "load"),
    ],
)
def test_settings_that_nobody_knows(given: str, said: str, tiny_folder: Path, tmp_path: Path) -> None:
    samples: Any = list(load_task("world/short", 1))
    with pytest.raises(ProbeError, match=said):
        recipe = parse_recipe(BARE, source="bare.yaml", sets=[f"backbone={tiny_folder}", given])
        probe.run(recipe, samples=samples, out=tmp_path)
