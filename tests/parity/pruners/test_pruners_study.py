"""Progressive pruning and ToMe inside SigLIP, as the study's release has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pruner_cases import Case, check, edit_of, of, plan_of, scored
from torch import Tensor


@pytest.mark.cases("pruners", of("study_progressive"))
def test_progressive(case: Case) -> None:
    p = case.params
    edit = edit_of(
        {"top_k": {"keep": {"cumulative": "one_minus_progress", "round": "half_even"}}},
        {"drop": {"positions": "compact", "lasts": "generation"}},
        {"similarity": {"space": "hidden", "stat": "nearest", "sign": -1}},
        site="final",
        layer=None,
    )
    left, got = p["n_vis"], {}
    for j, fraction in enumerate(p["fractions"]):
        given: dict[str, Any] = {"n": left, "original": p["n_vis"], "progress": fraction}
        given["hidden"] = case.inputs[f"x{j}"][:left]
        plan = plan_of(edit, **given)
        got[f"nn_similarity{j}"] = -scored(edit, **given)
        left = plan.kept.shape[0]
        got |= {f"kept{j}": plan.kept, f"left{j}": left}
    check(case, {k: v for k, v in got.items() if not (case.tie and k.startswith("kept"))})


@pytest.mark.cases("pruners", of("study_tome"))
def test_tome_in_the_encoder(case: Case) -> None:
    """Keys of all heads side by side, size-weighted means, original order."""
    p = case.params
    edit = edit_of(
        {"bipartite": {"r": p["r"]}},
        {"merge": {"mode": "size_mean", "carry_size": True, "order": "raster"}},
        {"features": {"space": "keys", "heads": "full"}},
    )
    got: dict[str, list[Tensor]] = {}
    for b, x in enumerate(case.inputs["hidden"]):
        size = torch.ones(x.shape[0])
        for layer in range(p["layers"]):
            n = x.shape[0]
            keys = case.inputs[f"key{layer}"][b, :n]
            plan = plan_of(edit, n=n, hidden=x, keys=keys.reshape(n, 2, -1).transpose(0, 1), size=size)
            x = x if plan.values is None else plan.values
            size = size[plan.kept] if plan.size is None else plan.size
            got.setdefault(f"hidden{layer}", []).append(x)
            got.setdefault(f"size{layer}", []).append(size)
            got.setdefault(f"positions{layer}", []).append(plan.kept)
            assert float(size.sum()) == pytest.approx(case.inputs["hidden"].shape[1])
    stacked: dict[str, Any] = {k: torch.stack(v) for k, v in got.items()}
    check(case, {} if case.tie else stacked)
