"""Equal budget means equal: realised retention of recipes told the same `keep`, and what is no share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from probe.backbones.base import Backbone
from probe.budget import at_budget, layer_average, measure
from probe.errors import ProbeError
from probe.recipe import load_recipe, shipped_recipes
from probe.selections import token_count

PRUNERS = [i.name for i in shipped_recipes() if i.name.startswith("prune/")]
QUICK = ["generate.gen_length=4", "generate.steps=2"]


def test_one_keep_is_one_budget(miniature: Backbone) -> None:
    names = ["fastv", "divprune", "random", "uniform", "vtw", "tome", "trim", "late_step", "pyramiddrop"]
    lines = {e.name: e for e in measure(names, keep=0.25, backbone=miniature, samples=1, sets=QUICK)}
    assert list(lines) == ["none", *names]
    none = lines["none"]
    assert (none.nominal, none.layer_average, none.trajectory_average, none.flops) == (1, 1, 1, 1)
    for name in ("fastv", "divprune", "random", "uniform", "late_step", "pyramiddrop"):
        assert lines[name].nominal == 0.25, name
    for name in ("divprune", "random", "uniform"):
        assert lines[name].trajectory_average == 0.25
    assert lines["fastv"].layer_average == pytest.approx((2 + 4 * 0.25) / 6)
    assert lines["late_step"].trajectory_average == pytest.approx((1 + 0.25) / 2)
    assert (lines["vtw"].nominal, lines["vtw"].layer_average) == (0, 0.5)
    assert "no share" in lines["vtw"].remark
    assert "no share: r = 9" in lines["tome"].remark
    assert abs(lines["tome"].nominal - 0.25) < 0.03
    assert "text tower" in lines["trim"].cannot
    assert np.isnan(lines["trim"].flops)
    assert not lines["fastv"].remark
    assert 0 < lines["uniform"].flops < lines["fastv"].flops < 1


@pytest.mark.parametrize("name", PRUNERS)
def test_every_pruner_is_told_or_says_why_not(name: str, miniature: Backbone) -> None:
    recipe = load_recipe(name)
    told, remark = at_budget(recipe, 0.25, miniature.facts)
    keep = told.dial.get("keep")
    share = keep == 0.25 or (isinstance(keep, dict) and keep.get("share") == 0.25)
    assert share or remark


def test_the_layer_average_is_of_the_first_step_that_lacks_tokens() -> None:
    shares = np.array([[1.0, 1.0], [1.0, 0.5], [0.5, 0.5]])
    assert layer_average(shares) == 0.75
    assert layer_average(np.ones((2, 2))) == 1.0


def test_the_command_prints_the_table_and_keeps_the_traces(probe_command: Callable[..., str]) -> None:
    sets = [w for s in QUICK for w in ("--set", s)]
    said = probe_command("budget", "random", "trim", "--keep", "0.5", "--samples", "1", *sets, "-o", "kept")
    assert "random" in said and "50.0%" in said
    assert "trim does not run here" in said
    assert Path("kept/random/random.trace.h5").is_file()
    for keep in ("0", "1.5"):
        with pytest.raises(ProbeError, match="share of the visual tokens"):
            probe_command("budget", "random", "--keep", keep)
    assert token_count(0.5, 192, "half_even") == 96


def test_recipes_are_listed_with_place_dials_and_paper_and_shown_one_by_one(probe_command: Callable[..., str]) -> None:
    listed = probe_command("recipes")
    for info in shipped_recipes():
        assert info.name in listed
    said = " ".join(listed.split())
    assert "prune/fastv: after layer 2, keep the visual tokens" in said
    assert "at layer.input $layer" not in said
    told = "at layer.input 2: attention > top_k > drop dials keep=0.5, start=0.0, layer=2, queries=last Chen et al."
    assert told in said
    shown = probe_command("recipes", "fastv")
    assert "# FastV (Chen et al." in shown
    assert "select: {top_k: {keep: $keep, round: floor}}" in shown
    with pytest.raises(ProbeError, match="did you mean `prune/fastv`"):
        probe_command("recipes", "prune/fastw")
