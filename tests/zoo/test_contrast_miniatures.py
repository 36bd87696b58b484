"""The shipped contrast pair: stored as their classes are published, alike but for training, and that they see."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from probe.backbones import known_backbones, load, visual_count
from probe.backbones.base import Backbone
from probe.backbones.checkpoint import EMBEDDED
from probe.backbones.lavida import Lavida
from probe.backbones.llava_next import LlavaNext
from probe.data import load as samples_of
from probe.errors import ProbeError
from probe.recipe import load_recipe, shipped_recipes
from probe.runner import RunResult
from probe.runner import run as run_recipe
from probe.site import Site
from probe.trace import open_trace
from probe.zoo.export import published_names
from probe.zoo.export_contrast import llava_name
from probe.zoo.measure import scores_of
from probe.zoo.world import SIZE

PAIR = {"miniature-ar": LlavaNext, "miniature-adapted": Lavida}


@cache
def backbone(name: str) -> Backbone:
    return load(name)


def shapes(name: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and stored type of every tensor."""
    with safe_open(EMBEDDED[name] / "model.safetensors", "pt") as file:
        slices = {k: file.get_slice(k) for k in file.keys()}  # noqa: SIM118  (no mapping)
        return {k: (tuple(s.get_shape()), str(s.get_dtype())) for k, s in slices.items()}


@pytest.mark.parametrize("name", PAIR)
def test_a_small_folder_in_sixteen_bit_loads_as_its_class(name: str) -> None:
    assert (EMBEDDED[name] / "model.safetensors").stat().st_size < 10_000_000
    assert {kind for _, kind in shapes(name).values()} == {"F16"}
    assert type(backbone(name)) is PAIR[name]
    assert name in {b.name for b in known_backbones()}


def test_they_differ_in_training_and_in_what_the_classes_force() -> None:
    """Same tokenizer, same visual span; decoder, head, projector and newline of one size; each name has its twin."""
    ar, adapted = (EMBEDDED[name] for name in PAIR)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (ar / file).read_bytes() == (adapted / file).read_bytes()
    assert visual_count("miniature-ar", [(SIZE, SIZE)]) == visual_count("miniature-adapted", [(SIZE, SIZE)]) == 192
    decoder = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    one, other = (json.loads((folder / "config.json").read_text()) for folder in (ar, adapted))
    for key in (*decoder, "rope_theta", "rms_norm_eps"):
        assert one["text_config"][key] == other[key], key
    stored = shapes("miniature-adapted")
    twins = {llava_name(k): next(iter(published_names({k: None}, {}))) for k in _training_names()}
    others = {k: v for k, v in shapes("miniature-ar").items() if not k.startswith("vision_tower.")}
    assert {k: stored[twins[k]] for k in others} == others


def _training_names() -> list[str]:
    from probe.zoo.model import Miniature, qwen2_config

    return list(Miniature(qwen2_config(114), 128).state_dict())


def test_both_read_the_same_prompt() -> None:
    """The same ids at the same places, the picture in the same span."""
    sample = next(samples_of("world/short", 1))
    one, other = (backbone(name).encode(sample.images, sample.question) for name in PAIR)
    assert torch.equal(one.ids, other.ids) and torch.equal(one.role, other.role)
    assert torch.equal(one.visual, other.visual) and one.n_visual == 192


FLOORS = {
    "miniature-ar": {"short": 0.85, "read_words": 0.97, "read_codes": 0.95, "describe": 0.95},
    "miniature-adapted": {"short": 0.85, "read_words": 0.97, "read_codes": 0.95, "describe": 0.95},
}
"""Well under the measured means (docs/miniature.md), so that a broken path shows and chance does not."""
WAYS = [("miniature-ar", None), ("miniature-adapted", "none"), ("miniature-adapted", "prefix")]


@pytest.mark.parametrize("task", ["short", "read_words", "read_codes", "describe"])
@pytest.mark.parametrize(("name", "cache"), WAYS)
def test_they_answer_reserved_questions(name: str, cache: str | None, task: str) -> None:
    """As published: the autoregressive one over its cache, the other with and without the prompt's."""
    if task == "short":
        parts = [list(samples_of(f"world/{t}", 8)) for t in ("colour", "shape", "letter")]
    else:
        parts = [list(samples_of(f"world/{task}", 3))]
    scores = [scores_of(backbone(name), part, len(part), cache)[:, 0].mean() for part in parts]
    assert min(scores) >= FLOORS[name][task]


PRUNERS = [i.name for i in shipped_recipes() if i.name.startswith("prune/")]
USUAL = [f"prune/{name}" for name in ("random", "divprune", "fastv", "vtw")]
COMES = {"jump": -1.0, "confidence": 0.0, "below": 1.0}
"""Dials of recipes that wait for a signal, turned so that it comes."""
REFUSED = {
    "text_image": "comes with no text tower",
    "router": "file",
    "masked": "one token after the other",
    "final": "reads the hidden states of visual tokens",
}


def refusal(recipe: str, way: tuple[str, str | None]) -> str | None:
    """Why a pruner cannot run on one of the pair, in words of the message; None where it can."""
    found = load_recipe(recipe)
    text, (name, cache) = found.replace(about="").to_yaml(), way
    if "text_image" in text:
        return REFUSED["text_image"]
    if "file" in found.dial:  # the weights of a pruner of its own, which nobody has given
        return REFUSED["router"]
    if name == "miniature-ar" and re.search(r"\bmasked\b", text):
        return REFUSED["masked"]
    return REFUSED["final"] if cache == "prefix" and any(p.at.site is Site.FINAL for p in found.probes) else None


def run(recipe: str, way: tuple[str, str | None], folder: Path) -> RunResult:
    found = load_recipe(recipe)
    dials = [f"{k}={v}" for k, v in COMES.items() if k in found.dial]
    dials += [f"generate.cache={way[1]}"] if way[1] else []
    found = found.with_sets(dials).replace(data={"task": "world/short", "limit": 1})
    return run_recipe(found, backbone=backbone(way[0]), out=folder, baseline=False, timed=False)


def check(recipe: str, way: tuple[str, str | None], folder: Path) -> None:
    """It runs and says what became of the picture, or it is refused with the reason."""
    why, reason = refusal(recipe, way), ""
    try:
        result = run(recipe, way, folder)
    except ProbeError as error:  # before anything ran
        reason = str(error)
    else:
        with open_trace(result.trace) as trace:
            reason = str(trace.array("failed")[0])
            assert reason or trace.row("visual_tokens", 0).shape[1] == 6
    assert why in reason if why else not reason


@pytest.mark.parametrize("recipe", USUAL)
@pytest.mark.parametrize("way", WAYS)
def test_usual_pruners_run(way: tuple[str, str | None], recipe: str, tmp_path: Path) -> None:
    assert refusal(recipe, way) is None
    check(recipe, way, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [p for p in PRUNERS if p not in USUAL])
@pytest.mark.parametrize("way", WAYS)
def test_every_pruner_runs_or_says_why_not(way: tuple[str, str | None], recipe: str, tmp_path: Path) -> None:
    check(recipe, way, tmp_path)


def test_the_wheel_takes_the_folders() -> None:
    """They lie inside the package, and every file of theirs is one that a checkpoint is read from."""
    import probe

    for name in PAIR:
        assert Path(probe.__file__).parent in EMBEDDED[name].parents
        assert {f.suffix for f in EMBEDDED[name].iterdir()} == {".json", ".safetensors"}
