"""VisionZip: dominant tokens by attention, contextual ones as targets that the rest joins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pruner_cases import Case, check, edit_of, of, plan_of
from torch import Tensor
from torch.nn.functional import normalize


def recipe(case: Case, n: int) -> dict[str, Any]:
    """With a class token: it is protected and counts as kept. Without: attention averaged over heads and queries."""
    p = case.params
    merge = {"assign": "targets", "mode": "add_mean", "order": "parts", "by": {"features": {"space": "keys"}}}
    if "dominant" in p:
        first, second, heads, protect = p["dominant"], p["contextual"], "sum", ["cls"]
    else:
        first, second = (
            {"number": int(p["budget"] * n * p[f"{kind}_share"]), "min": 1} for kind in ("dominant", "contextual")
        )
        heads, protect = "mean", []
    parts = [{"top_k": {"keep": first}}, {"stride": {"keep": second}}]
    return {
        "select": {"then": {"of": parts}},
        "do": {"merge": merge | {"protect": protect}},
        "score": {"attention": {"queries": "cls" if protect else "all", "heads": heads}},
    }


def count_of(keep: Any) -> int:
    return keep if isinstance(keep, int) else max(keep["number"], keep["min"])


@pytest.mark.cases("pruners", of("visionzip"))
def test_visionzip(case: Case) -> None:
    attn, hidden, metric = (case.inputs[k] for k in ("attn", "hidden", "metric"))
    n = hidden.shape[1]
    with_class = "dominant" in case.params
    parts = recipe(case, n)
    edit = edit_of(**parts)
    got: dict[str, list[Tensor]] = {"tokens": [], "dominant_set": [], "assignment": []}
    targets = torch.empty(0)
    counts = (0, 0)
    for b in range(hidden.shape[0]):
        received = attn[b, :, 0] if with_class else attn[b].mean(1)
        cls = torch.zeros(n, dtype=torch.bool)
        cls[0] = with_class
        plan = plan_of(edit, n=n, hidden=hidden[b], keys=metric[b][None], received=received, cls=cls)
        assert plan.values is not None
        assert plan.into is not None
        first = with_class + count_of(parts["select"]["then"]["of"][0]["top_k"]["keep"])
        dominant, joined = plan.kept[:first], plan.kept[first:]
        rest = torch.tensor([j for j in range(n) if j not in set(dominant.tolist())])
        targets = torch.searchsorted(rest, joined)
        others = torch.tensor([j for j in rest.tolist() if j not in set(joined.tolist())], dtype=torch.int64)
        got["tokens"].append(plan.values)
        got["dominant_set"].append(dominant)
        got["assignment"].append(plan.into[others] - first)
        counts = (first - with_class, joined.shape[0])
        unit = normalize(metric[b], dim=-1)
        best = (unit[others] @ unit[joined].T).amax(1)
        assert ((unit[others] * unit[plan.kept[plan.into[others]]]).sum(1) >= best - 1e-5).all()
    stacked: dict[str, Any] = {k: torch.stack(v) for k, v in got.items()}
    named = {"n_dominant": counts[0], "n_contextual": counts[1]}
    check(case, named if case.tie else stacked | named | {"targets": targets})
