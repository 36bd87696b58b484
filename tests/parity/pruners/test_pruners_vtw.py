"""VTW: withdrawal at a layer, and the layer that its criterion chooses."""

from __future__ import annotations

import pytest
import torch
from pruner_cases import FACTS, Case, check, of, plan_of
from test_pruners_fastv import layout_of

from probe.compile import compile_recipe
from probe.errors import ProbeError
from probe.layer_choice import earliest_layer, kl_to_full
from probe.recipe import Recipe
from probe.surgery import narrow, take


@pytest.mark.cases("pruners", of("vtw_withdraw"))
def test_withdrawal(case: Case) -> None:
    p, hidden, ids = case.params, case.inputs["hidden"], case.inputs["position_ids"]
    at = {"site": "layer.input", "layer": p["withdraw_layer"]}
    probe = {"at": at, "do": {"withdraw": {"positions": p["positions"]}}}
    table = compile_recipe(Recipe.model_validate({"schema": 1, "name": "vtw", "probes": [probe]}), FACTS)
    acting = [x.edit for x in table.probes if x.layer == p["current_layer"] and x.edit is not None]
    layout = layout_of(p["sys_len"], p["n_vis"], hidden.shape[1])
    for edit in acting:
        plan = plan_of(edit, n=p["n_vis"]) if p["n_vis"] else None
        layout, index = narrow(layout, [plan], positions=p["positions"])
        hidden = take(hidden, index)
    check(case, {"hidden": hidden, "position_ids": ids.gather(1, layout.position)})


@pytest.mark.cases("pruners", of("vtw_layer"))
def test_choice_of_the_layer(case: Case) -> None:
    first = case.params["first_candidate_layer"]
    kl = kl_to_full(case.inputs["logits_full"], case.inputs["logits_withdrawn"])
    try:
        layer = earliest_layer(kl, case.params["eta"], first)
    except ProbeError:
        assert case.raises or case.expected.get("layer") is None
        assert (kl.mean(0) > case.params["eta"]).all()
        if not case.raises:
            check(case, {"kl": kl, "kl_mean": kl.mean(0), "first_index": None, "layer": None})
        return
    assert not case.raises
    check(case, {"kl": kl, "kl_mean": kl.mean(0), "first_index": layer - first, "layer": layer})
    assert kl.shape == torch.Size(case.inputs["logits_withdrawn"].shape[:2])
