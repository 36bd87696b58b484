"""A model that is spread over devices gives what it gives on one: answers, signals, what is pruned."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interventions import RECORD
from PIL import Image

from probe.backbones import load
from probe.backbones.base import Backbone
from probe.backbones.placement import beside
from probe.backbones.tiny import tiny_names, write_tiny
from probe.compile import compile_recipe
from probe.composition import check_composition
from probe.encoder import encode_with_probes
from probe.errors import ProbeError
from probe.generate import Generated, generate
from probe.generation import rule_for
from probe.recipe import parse_recipe

pytest.importorskip("accelerate")

TIMES = {"seconds", "seconds_total", "peak_memory"}
FASTV = """
- at: {site: layer.input, layer: 1}
  score: {attention: {layer: -1, queries: last}}
  select: {top_k: {keep: 0.5}}
  do: {drop: {positions: keep, lasts: forward}}
"""
BETWEEN = """
- at: {site: layer.after_attention, layer: 1}
  score: norm
  select: {top_k: {keep: 0.5}}
  do: {drop: {positions: compact, lasts: generation}}
"""
PROBES = {"record": "", "fastv": FASTV, "between": BETWEEN}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`folder(name)`: a small random checkpoint in the published layout."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = write_tiny(name, tmp_path_factory.mktemp("model") / "it")
        return made[name]

    return get


@torch.no_grad()  # not inference mode: pretended devices do not go with it
def ask(model: Backbone, probes: str, cache: str | None = None) -> Generated:
    """One answer under probes."""
    steps = "generate: {gen_length: 6, steps: 6" + (f", cache: {cache}" if cache else "") + "}\n"
    recipe = parse_recipe(f"schema: 1\nname: test\n{steps}probes:\n{RECORD.strip()}\n{probes.strip()}")
    table = compile_recipe(recipe, model.facts)
    noise = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    seen = inspect.unwrap(encode_with_probes)(model, [Image.fromarray(noise)], table)
    rule = rule_for(model, recipe, {}, pictures=True)
    check_composition(recipe, table, rule.caching, rule.nominal_steps)
    return inspect.unwrap(generate)(model, [seen.assemble(model, "What is it?")], rule, table)[0]


def same(one: Generated, other: Generated) -> None:
    """The same to the last bit, but for time."""
    assert one.ids == other.ids
    assert one.arrays.keys() == other.arrays.keys()
    for name in one.arrays.keys() - TIMES:
        np.testing.assert_array_equal(one.arrays[name], other.arrays[name], err_msg=name)


def spread_over(model: Backbone, places: list[str], encoder: list[str], rest: str) -> dict[str, str]:
    """A map: decoder layers take turns over `places`, encoder layers over `encoder`, the rest is in one place.

    With one place for the encoder, what stands beside it goes there, too.
    """
    root = getattr(model, "native", model)
    names = {module: name for name, module in root.named_modules()}
    found = {"": rest}
    for layers, where in ((model.layers, places), (model.encoder_layers, encoder)):
        for i, modules in enumerate(layers):
            found[names[modules.layer]] = where[i % len(where)]
    if len(encoder) == 1:
        found |= dict.fromkeys(beside(root, model.lm), encoder[0])
    return found


@pytest.mark.parametrize("probes", PROBES)
@pytest.mark.parametrize("name", tiny_names())
def test_layers_on_disk(name: str, probes: str, folder: Callable[[str], Path]) -> None:
    plain = load(folder(name))
    spread = load(folder(name), device_map=spread_over(plain, ["cpu", "disk"], ["disk", "cpu"], "cpu"))
    away = [n for n, p in spread.named_parameters() if p.device.type == "meta"]
    assert any(".layers.1." in n for n in away), "the weights are not in memory"
    for cache in (None, "none"):
        same(ask(spread, PROBES[probes], cache), ask(plain, PROBES[probes], cache))
    assert away == [n for n, p in spread.named_parameters() if p.device.type == "meta"]


@pytest.mark.parametrize("name", tiny_names())
@pytest.mark.parametrize("how", ["cpu", "auto", "balanced"])
def test_one_device(name: str, how: Any, folder: Callable[[str], Path]) -> None:
    same(ask(load(folder(name), device_map=how), FASTV), ask(load(folder(name)), FASTV))


def on_pretended_devices(folder: Path, edits: str) -> list[dict[str, str]]:
    """What a process of its own says: torch's spare kind of device is registered for good."""
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), *sys.path])
    done = subprocess.run(
        [sys.executable, here / "run_on_pretended_devices.py", edits, folder],
        env={**os.environ, "PYTHONPATH": paths, "HF_DEACTIVATE_ASYNC_LOAD": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def nothing_differs(found: list[dict[str, str]]) -> None:
    """Every intervention gave the same, or was refused on one device as well; most gave the same."""
    assert [f for f in found if not {"same", "refused"} & f.keys()] == []
    assert sum("same" in f for f in found) >= len(found) / 2


def test_layers_on_several_devices(folder: Callable[[str], Path]) -> None:
    nothing_differs(on_pretended_devices(folder("GSAI-ML/LLaDA-V"), "fastv,append"))


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny_names())
def test_every_edit_on_several_devices(name: str, folder: Callable[[str], Path]) -> None:
    nothing_differs(on_pretended_devices(folder(name), "all"))


def test_sizes_decide_where_an_automatic_map_puts_layers(folder: Callable[[str], Path]) -> None:
    name = "GSAI-ML/LLaDA-V"
    size = sum(p.numel() * p.element_size() for p in load(folder(name)).parameters())
    spread = load(folder(name), device_map="sequential", max_memory={"cpu": int(0.8 * size)}, vocab="full")
    away = {n for n, p in spread.named_parameters() if p.device.type == "meta"}
    assert away and "model.layers.0.mlp.up_proj.weight" not in away, "the first come first"
    others = {n for n, _ in spread.named_parameters() if n.startswith(("vision_tower", "mm_projector"))}
    assert not others & away or others <= away, "encoder and projector stay together"
    same(ask(spread, FASTV), ask(load(folder(name), vocab="full"), FASTV))


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ({"": "cpu", "model.layer.0": "cpu"}, "names 'model.layer.0', which .* does not have"),
        ({"model": "cpu"}, "has no place for .* more of"),
        ({"": "nowhere"}, "says 'nowhere'; expected auto, balanced"),
        ("evenly", "says 'evenly'; expected auto, balanced"),
        ({"": "cpu", "image_newline": "disk"}, "leaves image_newline on disk; it must be on cpu"),
        ({"": "meta"}, "says 'meta'; expected auto, balanced"),
        ({"": "cuda:0", "vision_tower.encoder.layers.1": "cuda:1"}, "encoder of .* on several devices .*; give it one"),
    ],
)
def test_maps_that_do_not_fit(places: Any, said: str, folder: Callable[[str], Path]) -> None:
    with pytest.raises(ProbeError, match=said):
        load(folder("GSAI-ML/LLaDA-V"), device_map=places)


def test_a_vocabulary_that_is_cut_is_not_left_on_disk(folder: Callable[[str], Path]) -> None:
    source = folder("GSAI-ML/LLaDA-V")
    config = json.loads((source / "config.json").read_text())
    assert config["vocab_size"] > load(source).facts.vocabulary
    with pytest.raises(ProbeError, match="lm_head.weight on disk, but only the tokenizer's rows"):
        load(source, device_map={"": "cpu", "lm_head": "disk"})


def test_without_accelerate(folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ProbeError, match="needs accelerate: pip install 'dmllm-probe"):
        load(folder("GSAI-ML/LLaDA-V"), device_map="auto")
