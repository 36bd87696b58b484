"""Layers that decide for themselves by the attention that visual tokens receive: what is recorded is what decides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from probe.backbones import load
from probe.backbones.base import Backbone
from probe.generate import Generated
from probe.site import SEGMENTS, Fate

VISUAL = [SEGMENTS.index("visual"), SEGMENTS.index("newline")]
Runner = Callable[..., list[Generated]]


@pytest.fixture(scope="module")
def miniature() -> Backbone:
    return load("miniature")


def masses(run_probes: Runner, backbone: Backbone, prompts: Any, queries: str) -> np.ndarray:
    """`(layer,)`: the share of these rows' attention that goes to the picture at the first step, unpruned."""
    probe = f"- at: {{site: layer.attention, layers: all}}\n  record: [{{attention_mass: {{queries: {queries}}}}}]\n"
    (bare,) = run_probes(backbone, prompts, probe)
    return np.asarray(bare.arrays["attention_mass"][0][..., VISUAL].sum(-1).reshape(-1))


def between(mass: np.ndarray, layer: int) -> float:
    """A threshold that the layer is below, and of those before it none."""
    before = mass[:layer].min(initial=1.0)
    assert mass[layer] < before, "the weights give no such layer"
    return float((mass[layer] + before) / 2)


@pytest.mark.parametrize("queries", ["question", "answer"])
def test_tokens_are_withdrawn_behind_the_first_layer_below(
    queries: str, miniature: Backbone, run_probes: Runner, prompts_for: Any
) -> None:
    prompts = prompts_for(miniature, 1)
    mass = masses(run_probes, miniature, prompts, queries)
    layer = int(mass[:-1].argmin())
    probe = (
        "- at: {site: layer.output, layers: all, steps: first}\n"
        f"  score: {{mass: {{queries: {queries}}}}}\n"
        f"  select: {{threshold: {{value: {between(mass, layer)}}}}}\n"
        "  do: {withdraw: {lasts: forward}}\n"
    )
    (done,) = run_probes(miniature, prompts, probe)
    n = prompts[0].n_visual
    left = [n] * (layer + 1) + [0] * (len(mass) - layer - 1)
    assert done.arrays["visual_tokens"][0].tolist() == left
    assert (done.arrays["visual_tokens"][1:] == n).all()


def test_a_layer_is_skipped_by_its_own_attention(miniature: Backbone, run_probes: Runner, prompts_for: Any) -> None:
    """Known before it runs, from its own norm and projections; the first layer below is the first that is skipped."""
    prompts = prompts_for(miniature, 1)
    mass = masses(run_probes, miniature, prompts, "answer")
    layer = int(mass.argmin())
    probe = (
        "- at: {site: layer.input, layers: all, steps: first}\n"
        "  score: {mass: {queries: answer, projected: true}}\n"
        f"  select: {{threshold: {{value: {between(mass, layer)}}}}}\n"
        "  do: skip_layers\n"
    )
    (done,) = run_probes(miniature, prompts, probe)
    fates = done.arrays["visual_kept"][0]
    assert (fates[:layer] == int(Fate.KEPT)).all()
    assert (fates[layer] == int(Fate.SKIPPED)).all()
    assert (done.arrays["visual_kept"][1:] == int(Fate.KEPT)).all()
