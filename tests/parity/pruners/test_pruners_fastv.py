"""FastV: attention received, top-k, physical drop and key mask, as published, in two ports, and as the study has it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pruner_cases import Case, check, check_best, edit_of, mask_of, of, plan_of, scored
from torch import Tensor

from probe.attend import attention_rows
from probe.site import Plan, Role
from probe.surgery import Layout, hide, make_layout, narrow, take


def layout_of(start: int, n: int, length: int) -> Layout:
    """A sequence with n visual tokens from `start` on."""
    role = torch.full((length,), int(Role.QUESTION), dtype=torch.int8)
    role[:start], role[start : start + n] = int(Role.SYSTEM), int(Role.VISUAL)
    visual = torch.full((length,), -1, dtype=torch.int64)
    visual[start : start + n] = torch.arange(n)
    return make_layout([role], [visual], "cpu")


def keep_of(case: Case) -> Any:
    """How many the case keeps, in our spelling."""
    p = case.params
    if "budget" in p:
        return {"share": p["budget"], "round": "truncate", "min": 1}
    if "prune_ratio" in p:
        return {"share": 1 - p["prune_ratio"], "round": "half_even"}
    return p["n_keep"]


@pytest.mark.cases("pruners", of("fastv"))
def test_fastv(case: Case) -> None:
    attn, hidden = case.inputs["attn"], case.inputs["hidden"]
    start, n, length = case.params["sys_len"], case.params["n_vis"], attn.shape[-1]
    rows = slice(None) if "all" in str(case.params.get("query", "")) else slice(length - 1, length)
    received = attn[0, :, rows, start : start + n].mean(1)
    queries = "all" if rows.start is None else "last"
    score = {"attention": {"layer": -1, "queries": queries, "heads": "mean"}}
    at: dict[str, Any] = {"site": "layer.input", "layer": 2}
    by_score = edit_of({"top_k": {"keep": keep_of(case)}}, {"drop": {"order": "score"}}, score, **at)
    best = plan_of(by_score, n=n, received=received).kept
    raster = edit_of({"top_k": {"keep": keep_of(case)}}, {"drop": {"positions": "keep"}}, score, **at)
    plan = plan_of(raster, n=n, received=received)
    assert plan.kept.tolist() == sorted(best.tolist())
    layout = layout_of(start, n, length)
    short, index = narrow(layout, [plan])
    masked = edit_of({"top_k": {"keep": keep_of(case)}}, "mask", score, **at)
    seen = hide(layout, [plan_of(masked, n=n, received=received)]).key_mask()
    value = scored(raster, n=n, received=received)
    check_best(best, value, plan.kept.shape[0])
    got = {
        "score": value,
        "n_keep": plan.kept.shape[0],
        "keep_indices": index[0],
        "hidden": take(hidden, index),
        "position_ids": short.position,
        "key_mask": seen if seen is not None else torch.ones(1, length, dtype=torch.bool),
    }
    check(case, got if case.tie else got | {"topk_vis": ordered(best, value)})


def ordered(best: Tensor, value: Tensor) -> Tensor:
    """The kept tokens by falling score: a plan that keeps everything names them in raster order."""
    return best[value[best].sort(descending=True, stable=True).indices]


@pytest.mark.cases("pruners", of("study_fastv"))
def test_fastv_as_the_study_has_it(case: Case) -> None:
    """Softmax of head-mean logits, summed over all rows; kept in the order of the score, renumbered."""
    q, k, n, start = case.inputs["q"], case.inputs["k"], case.params["n_vis"], case.params["sys_len"]
    length = q.shape[2]
    rows = torch.arange(length).expand(q.shape[0], -1)
    weights = attention_rows(q, k, rows, None, q.shape[-1] ** -0.5, "head_mean_logits")
    received = weights[..., start : start + n].mean(2)
    edit = edit_of(
        {"top_k": {"keep": {"share": case.params["keep_ratio"], "round": "truncate"}}},
        {"drop": {"order": "score", "positions": "compact", "lasts": "generation"}},
        {"attention": {"queries": "all", "form": "head_mean_logits", "reduce": "sum"}},
    )
    kept, scores, positions, width = [], [], [], 0
    for sample in received:
        given: dict[str, Any] = {"n": n, "received": sample, "n_queries": length}
        plan: Plan = plan_of(edit, **given)
        short, _ = narrow(layout_of(start, n, length), [plan], positions="compact")
        width = short.width
        kept.append(plan.kept)
        scores.append(scored(edit, **given))
        positions.append(short.position[0])
        check_best(plan.kept, scores[-1], mask_of(plan.kept, n).sum().item())  # type: ignore[arg-type]
    got = {"score": torch.stack(scores), "new_length": width, "position_ids": torch.stack(positions)}
    check(case, got | ({} if case.tie else {"topk_vis": torch.stack(kept)}))
