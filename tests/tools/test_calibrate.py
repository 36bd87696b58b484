"""Rules of calibration on numbers of one's own, and against the model that they are about."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from probe import data
from probe.backbones.base import Backbone
from probe.calibrate import first_candidate, merges_for, tokens_left, unseen_layers, withdraw_layer
from probe.calibrate_run import calibrate
from probe.compile import ProbeTable, compile_recipe
from probe.compile_call import bind
from probe.errors import ProbeError
from probe.generate import generate
from probe.generation import rule_for
from probe.recipe import load_recipe, parse_recipe, shipped_recipes
from probe.recipe_at import Layers
from probe.registry import calibrations, selections
from probe.trace import open_trace


def test_the_layer_is_the_first_that_is_near_enough() -> None:
    divergence = torch.tensor([[0.4, 0.02, 0.03, 0.0], [0.2, 0.0, 0.01, 0.0]])
    first = Layers.parse_one(2)
    for eta in (0.5, 0.05, 0.015, 0.0):
        means = [0.3, 0.01, 0.02, 0.0]
        assert withdraw_layer(divergence, 6, eta=eta, first=first).value == 2 + next(
            i for i, m in enumerate(means) if m <= eta + 1e-9
        )
    with pytest.raises(ProbeError, match="no layer from 2 to 4"):
        withdraw_layer(divergence[:, :3], 6, eta=0.001, first=first)


def test_the_search_begins_at_the_published_layer_on_the_published_depth() -> None:
    default = calibrations["withdraw_layer"].params().first  # type: ignore[attr-defined]
    assert first_candidate(default, 32) == 5


@pytest.mark.parametrize(("patches", "layers"), [(36, 3), (729, 26), (17, 4)])
def test_merging_leaves_what_the_matching_itself_leaves(patches: int, layers: int) -> None:
    matching = selections["bipartite"].function
    for r in (0, 1, 3, patches // 4, patches):
        n = patches
        for _ in range(layers):
            features, protected = torch.randn(n, 4), torch.zeros(n, dtype=torch.bool)
            n = matching(features, None, protected, torch.ones(n), r=r).kept.shape[0]
        assert tokens_left(patches, layers, r) == n


def test_the_r_of_the_study_follows_from_its_shares() -> None:
    """729 patches in 26 layers: r = 14, 21 and 25 leave 365, 183 and 79."""
    for r, left in ((14, 365), (21, 183), (25, 79)):
        assert tokens_left(729, 26, r) == left
        assert merges_for(729, 26, keep=left).value == r
    found = merges_for(36, 3, keep=0.5)
    distance = [abs(tokens_left(36, 3, r) - 18) for r in range(19)]
    assert distance[found.value] == min(distance)
    with pytest.raises(ProbeError, match="no fixed number"):
        merges_for(0, 3)
    with pytest.raises(ProbeError, match="in no layer"):
        merges_for(36, 0)


def mass(*steps: list[float]) -> torch.Tensor:
    return torch.tensor(steps)


def test_layers_around_the_spike_and_those_that_look_in_one_step_stay() -> None:
    quiet = [0.1, 0.1, 0.8, 0.1, 0.1, 0.1]
    assert unseen_layers([mass(quiet, quiet)]).value == [0, 4, 5]
    assert unseen_layers([mass(quiet)], margin=0).value == [0, 1, 3, 4, 5]
    once = [0.1, 0.1, 0.8, 0.1, 0.1, 0.7]
    assert unseen_layers([mass(quiet, once, quiet)]).value == [0, 4]
    assert unseen_layers([mass(quiet), mass(once)], low=0.45).value == [0, 4]
    assert unseen_layers([mass(quiet), mass(once)], low=0.6).value == [0, 4, 5]
    with pytest.raises(ProbeError, match="no layer can be skipped"):
        unseen_layers([mass([0.5, 0.6, 0.5])])


SHORT = ["generate.gen_length=4", "generate.steps=2"]


def test_divergence_is_that_of_the_slots_decoded_at_the_step(miniature: Backbone) -> None:
    recipe = load_recipe("vtw", SHORT)
    found = calibrate(recipe, backbone=miniature, samples=2, settings=["eta=100", "first=2"])
    assert found.recipe.dial["layer"] == 2
    expected = []
    for number, sample in enumerate(data.load("world/mixed", 2)):
        prompt = miniature.encode(sample.images, sample.question)
        rule = rule_for(miniature, recipe, sample.generate, pictures=True)
        logits = []
        for layer in (None, 2, 3, 4, 5):
            table = ProbeTable(())
            if layer is not None:
                table = compile_recipe(recipe.with_sets([f"layer={layer}"]), miniature.facts)
            seen: dict = {}
            generate(miniature, [prompt], rule, table, samples=[number], collected=seen)
            step = seen[0][1][0].double()
            logits.append(step[:, step.isfinite().all(0)])  # suppressed tokens are -inf on both sides
        log_p = [x.log_softmax(-1) for x in logits]
        kl = torch.nn.functional.kl_div
        expected.append([kl(log_p[0], p, log_target=True, reduction="batchmean").item() for p in log_p[1:]])
    means = torch.tensor(expected).mean(0)
    for i, layer in enumerate((2, 3, 4, 5)):
        if layer > 2 and means[i] >= means[:i].min():
            continue
        near = calibrate(recipe, backbone=miniature, samples=2, settings=[f"eta={float(means[i]) * 1.001}", "first=2"])
        assert near.recipe.dial["layer"] == layer
        assert f"{layer}: {means[i]:.2g}" in near.text.replace("\n# ", " ")


def test_a_late_start_compares_at_the_step_where_the_recipe_acts(miniature: Backbone) -> None:
    late = calibrate(load_recipe("vtw", [*SHORT, "start=50%"]), backbone=miniature, samples=1, settings=["eta=100"])
    first = calibrate(load_recipe("vtw", SHORT), backbone=miniature, samples=1, settings=["eta=100"])
    assert late.findings["layer"].evidence[1] != first.findings["layer"].evidence[1]
    with pytest.raises(ProbeError, match="no intervention acts"):
        calibrate(load_recipe("vtw", [*SHORT, "start=100%"]), backbone=miniature, samples=1)


def test_a_calibrated_recipe_reads_back_runs_and_says_why(probe_command: Callable[..., str], tmp_path: Path) -> None:
    probe_command("calibrate", "tome", "--with", "keep=0.25", "-o", "mine.yaml")
    recipe = load_recipe("mine.yaml")
    text = Path("mine.yaml").read_text()
    assert text.startswith("# ToMe (Bolya et al.")
    assert "leaves 9 of a view's 36 patches" in text
    assert recipe.dial["r"] == 9
    assert recipe.calibrate["r"].params == {"keep": 0.25}
    assert recipe.hash == load_recipe("tome", ["r=9"]).hash
    probe_command(
        "run", "mine.yaml", "--limit", "1", "--no-baseline", "-o", "out", *[w for s in SHORT for w in ("-s", s)]
    )
    with open_trace(Path("out/tome.trace.h5")) as trace:
        assert trace.row("visual_tokens", 0).max() == 9 * len(set(trace.row("patch_view", 0).tolist()))
    with pytest.raises(ProbeError, match="there already"):
        probe_command("calibrate", "tome", "-o", "mine.yaml")
    printed = probe_command("calibrate", "tome")
    assert parse_recipe(printed).dial["r"] == 6


def test_layers_come_from_a_trace_or_from_a_run(probe_command: Callable[..., str]) -> None:
    few = ("--limit", "2", "--no-time", *[w for s in SHORT for w in ("-s", s)])
    probe_command("run", "record/attention_mass", *few, "-o", "rec")
    sets = [w for s in SHORT for w in ("-s", s)]
    search = ("--with", "low=0.999", "--with", "margin=0")
    trace = probe_command("calibrate", "layer_skip", "--trace", "rec/attention_mass.trace.h5", *search, *sets)
    ran = probe_command("calibrate", "layer_skip", "--samples", "2", *search, *sets)
    assert parse_recipe(trace).dial["layer"] == parse_recipe(ran).dial["layer"]
    assert len(parse_recipe(ran).dial["layer"]) == 5
    assert "from attention_mass.trace.h5" in trace
    assert "2 samples" in ran


@pytest.mark.parametrize("info", shipped_recipes(), ids=lambda i: i.name)
def test_shipped_calibrations_name_rules_that_exist(info: object) -> None:
    recipe = load_recipe(info.path)  # type: ignore[attr-defined]
    for dial, part in recipe.calibrate.items():
        assert dial in recipe.dial
        bind(calibrations[part.name], part.params, 0, 1, varies=False)


def test_what_is_wrong_is_said(miniature: Backbone) -> None:
    recipe = (
        "schema: 1\nname: x\ndial: {layer: 3}\ncalibrate: {%s}\n"
        "probes: [{at: {site: layer.input, layer: $layer}, do: withdraw}]\n"
    )
    with pytest.raises(ProbeError, match="no dial `lair` to calibrate; did you mean `layer`"):
        parse_recipe(recipe % "lair: withdraw_layer")
    for said, words in (
        ("layer: withdraw_later", "did you mean `withdraw_layer`"),
        ("layer: {withdraw_layer: {etta: 1}}", "did you mean `eta`"),
        ("layer: {withdraw_layer: {eta: high}}", "should be a number"),
    ):
        with pytest.raises(ProbeError, match=words):
            calibrate(parse_recipe(recipe % said), backbone=miniature, samples=1)
    with pytest.raises(ProbeError, match="names no dial to calibrate"):
        calibrate(load_recipe("fastv"), backbone=miniature)
    with pytest.raises(ProbeError, match="no parameter|has a parameter `eta`"):
        calibrate(load_recipe("tome"), backbone=miniature, settings=["eta=1"])
