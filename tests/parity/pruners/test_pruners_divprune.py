"""DivPrune: greedy max-min diversity, as published and with the study's random start."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pruner_cases import Case, check, edit_of, of, plan_of
from torch import Tensor
from torch.nn.functional import normalize

from probe.errors import ProbeError

PAIRS = {"similarity": {"space": "embedding", "stat": "pairwise"}}


def kept_of(x: Tensor, select: dict[str, Any], order: str) -> Tensor:
    edit = edit_of({"greedy_diverse": select}, {"drop": {"order": order}}, PAIRS, site="before_lm", layer=None)
    return plan_of(edit, n=x.shape[0], embedding=x).kept


def share(case: Case) -> dict[str, Any]:
    return {"share": case.params.get("ratio", case.params.get("keep_ratio")), "round": "half_even"}


def is_farthest_first(x: Tensor, order: list[int], start_free: bool = False) -> bool:
    """Whether each token of a greedy order is (one of) the farthest from those before it; brute force."""
    unit = normalize(x, dim=-1)
    distance = 1 - unit @ unit.T
    n = x.shape[0]
    if n > 1 and order and not start_free:
        nearest = [min(float(distance[j, i]) for i in range(n) if i != j) for j in range(n)]
        if nearest[order[0]] < max(nearest) - 1e-5:
            return False
    for step in range(1, len(order)):
        apart = distance[:, order[:step]].amin(1)
        apart[order[:step]] = -1
        if float(apart[order[step]]) < float(apart.max()) - 1e-5:
            return False
    return True


@pytest.mark.cases("pruners", of("divprune"))
def test_divprune(case: Case) -> None:
    x = case.inputs["x"]
    batch = x if x.dim() == 3 else x[None]
    n, count = batch.shape[1], round(case.params["ratio"] * batch.shape[1])
    orders, kept, distances = [], [], []
    for sample in batch:
        try:
            order = kept_of(sample, {"keep": share(case)}, "score") if count < n else greedy_of_all(sample)
        except ProbeError:
            assert case.raises
            return
        assert sorted(order.tolist()) == kept_of(sample, {"keep": share(case)}, "raster").tolist()
        assert order.unique().shape[0] == min(count, n)
        assert is_farthest_first(sample, order.tolist())
        orders.append(order)
        kept.append(order.sort().values)
        unit = normalize(sample, dim=-1)
        distances.append(1 - unit @ unit.T)
    got = {"order": torch.stack(orders), "kept": torch.stack(kept), "distance": torch.stack(distances)}
    if not case.raises:
        check(case, got if x.dim() == 3 else {k: v[0] for k, v in got.items()} | {"n_keep": count})


def greedy_of_all(x: Tensor) -> Tensor:
    """The greedy order where everything stays: a recipe then decides nothing, the function still has an order."""
    from probe.selections import greedy_diverse

    unit = normalize(x, dim=-1)
    return greedy_diverse(unit @ unit.T, x.shape[0], torch.Generator(), keep=1.0)


@pytest.mark.cases("pruners", of("study_divprune"))
def test_divprune_from_a_given_pivot(case: Case) -> None:
    x, pivot = case.inputs["x"], case.params["pivot"]
    select = {"keep": share(case), "start": "given", "first": pivot}
    order, kept = kept_of(x, select, "score"), kept_of(x, select, "raster")
    assert is_farthest_first(x, order.tolist(), start_free=True)
    check(case, {"order": order, "kept": kept})
