"""LLaVA-PruMerge and PruMerge+: outliers, neighbours, one token of the rest; the form without a class token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pruner_cases import Case, check, edit_of, of, plan_of, scored
from torch import Tensor

from probe.attend import attention_rows
from probe.errors import ProbeError
from probe.selections.counts import how_many, outlier_share


def attention_of(q: Tensor, k: Tensor, rows: Tensor) -> Tensor:
    """Attention of some rows, one head over the full width: `(row, key)`."""
    return attention_rows(q[None, None], k[None, None], rows[None], None, q.shape[-1] ** -0.5, "softmax")[0, 0]


def recipe(case: Case) -> dict[str, Any]:
    p = case.params
    merge = {
        "mode": "add_weighted",
        "neighbours": p["neighbours"],
        "append": "weighted",
        "order": "score",
        "by": {"features": {"space": "keys", "heads": "full"}},
    }
    queries = "cls"
    select: dict[str, Any]
    if "budget" in p:
        queries = "all"
        parts = [{"top_k": {"keep": {"iqr": 1.5}}}, {"stride": {"keep": "rest", "over": "all"}}]
        keep = {"share": p["budget"], "round": "truncate", "min": 1}
        select = {"then": {"keep": keep, "of": parts}}
    else:
        keep = {"iqr": 1.5} if p["adaptive"] else {"share": p["ratio"], "round": "truncate"}
        select = {"top_k": {"keep": keep}}
        if "plus" in case.function:
            wide = {"stride": {"step": {"iqr": 1.5, "divisor": 3}, "leave_last": True}}
            select = {"union": {"of": [select, wide]}}
    return {"select": select, "do": {"merge": merge}, "score": {"attention": {"queries": queries}}}


@pytest.mark.cases("pruners", of("prumerge"))
def test_prumerge(case: Case) -> None:
    with_class = "budget" not in case.params
    edit = edit_of(**recipe(case))
    got: dict[str, list[Tensor]] = {"tokens": [], "idx": [], "cls_attn": []}
    share, count = 0.0, 0
    for feat, q, k in zip(case.inputs["feat"], case.inputs["q"], case.inputs["k"], strict=True):
        rows = torch.zeros(1, dtype=torch.int64) if with_class else torch.arange(q.shape[0])
        seen = attention_of(q, k, rows).mean(0)[None, int(with_class) :]
        given: dict[str, Any] = {
            "n": seen.shape[1],
            "hidden": feat[int(with_class) :],
            "keys": k[None, int(with_class) :],
            "received": seen,
        }
        try:
            plan = plan_of(edit, **given)
        except ProbeError:
            assert case.raises
            return
        value = scored(edit, **given)
        share = outlier_share(value, 1.5)
        count = how_many(share, seen.shape[1], original=seen.shape[1], rounding="truncate")
        got["tokens"].append(given["hidden"] if plan.values is None else plan.values)
        got["idx"].append(plan.kept)
        got["cls_attn"].append(value)
    if case.raises:
        return
    stacked: dict[str, Any] = {k: torch.stack(v) for k, v in got.items()}
    if case.tie:
        del stacked["tokens"], stacked["idx"]
    ratio = share if case.params.get("adaptive", True) else case.params["ratio"]
    check(case, stacked | {"ratio": ratio, "iqr_count": round(share * stacked["cls_attn"].shape[1]), "n_keep": count})
