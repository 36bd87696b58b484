"""ToMe: matching, merging, un-merging, sizes carried through layers, whole blocks, schedules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pruner_cases import Case, check, edit_of, of, plan_of
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

from probe.attend import eager_attention
from probe.decide import decide
from probe.operations import sources, unmerge
from probe.selections import bipartite, merges_per_layer
from probe.site import Choice, Plan

KEYS = {"features": {"space": "keys", "heads": "mean"}}
HIDDEN = {"features": {"space": "hidden"}}


def protected(case: Case) -> dict[str, Any]:
    """Class token (the first) and distillation token (the one behind it) as protected tokens."""
    some = [name for name in ("class_token", "distill_token") if case.params.get(name)]
    return {"protect": ["cls"]} if some else {}


def class_rows(case: Case, n: int) -> Tensor:
    mask = torch.zeros(n, dtype=torch.bool)
    mask[0] = bool(case.params.get("class_token"))
    if case.params.get("distill_token") and n > 1:
        mask[1] = True
    return mask


def merging(r: int, mode: str = "size_mean", order: str = "unmerged_first", **options: Any) -> dict[str, Any]:
    do = {"merge": {"mode": mode, "carry_size": True, "order": order, **options}}
    return {"select": {"bipartite": {"r": r}}, "do": do}


def merged(case: Case, x: Tensor, metric: Tensor, size: Tensor, r: int, **options: Any) -> tuple[Tensor, Plan]:
    """One sample through the vocabulary: new hidden states `(k, width)`, and the plan."""
    edit = edit_of(**merging(r, **options, **protected(case)), score=KEYS)
    n = x.shape[0]
    plan = plan_of(edit, n=n, hidden=x, keys=metric[None], size=size, cls=class_rows(case, n))
    return x if plan.values is None else plan.values, plan


def sizes(plan: Plan, size: Tensor) -> Tensor:
    return size[plan.kept] if plan.size is None else plan.size


@pytest.mark.cases("pruners", of("tome_match"))
def test_match_and_merge(case: Case) -> None:
    x, metric, r = case.inputs["x"], case.inputs["metric"], case.params["r"]
    batch, n = x.shape[:2]
    got: dict[str, list[Tensor]] = {k: [] for k in ("merged", "size", "mean", "unmerged", "source")}
    names = ("unm_idx", "src_idx", "dst_idx")
    for b in range(batch):
        ones = torch.ones(n)
        new, plan = merged(case, x[b], metric[b], ones, r)
        into = torch.arange(n) if plan.into is None else plan.into
        got["merged"].append(new)
        got["size"].append(sizes(plan, ones)[:, None])
        got["mean"].append(merged(case, x[b], metric[b], ones, r, mode="mean")[0])
        got["unmerged"].append(unmerge(new, into))
        got["source"].append(sources(into, new.shape[0]).to(x.dtype))
        for name, found in zip(names, indices(case, metric[b], ones, r), strict=True):
            got.setdefault(name, []).append(found)
        assert float(sizes(plan, ones).sum()) == n
        assert new.shape[0] == n - merge_count(case, n, r)
    check(case, {k: torch.stack(v) for k, v in got.items()} | {"noop": r <= 0 or plan.into is None})


def merge_count(case: Case, n: int, r: int) -> int:
    spared = sum(bool(case.params.get(k)) for k in ("class_token", "distill_token"))
    return max(min(r, (n - spared) // 2), 0)


def indices(case: Case, metric: Tensor, ones: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unmerged, merged and joined tokens in the numbering of the even and of the odd ones, heaviest match first."""
    n = metric.shape[0]
    choice = bipartite(metric, None, class_rows(case, n), ones, r=r)
    assert isinstance(choice, Choice)
    assert choice.into is not None
    source = torch.tensor([j for j in range(n) if choice.into[j] != j], dtype=torch.int64)
    unit = metric / metric.norm(dim=-1, keepdim=True)
    weight = (unit[source] * unit[choice.into[source]]).sum(-1)
    source = source[weight.sort(descending=True, stable=True).indices]
    even = choice.kept[choice.kept % 2 == 0]
    return even // 2, source // 2, choice.into[source] // 2


@pytest.mark.cases("pruners", of("tome_chain"))
def test_sizes_are_carried_through_layers(case: Case) -> None:
    """The matching is on the current features; together the sizes stay the number of original tokens."""
    states = case.inputs["x0"]
    got: dict[str, list[Tensor]] = {}
    for b in range(states.shape[0]):
        x, size = states[b], torch.ones(states.shape[1])
        for layer in range(case.params["layers"]):
            for name, found in zip(
                ("unm_idx", "src_idx", "dst_idx"), indices(case, x, size, case.params["r"]), strict=True
            ):
                got.setdefault(f"{name}{layer}", []).append(found)
            edit = edit_of(**merging(case.params["r"], **protected(case)), score=HIDDEN)
            plan = plan_of(edit, n=x.shape[0], hidden=x, size=size, cls=class_rows(case, x.shape[0]))
            x, size = x if plan.values is None else plan.values, sizes(plan, size)
            assert float(size.sum()) == pytest.approx(states.shape[1])
            got.setdefault(f"x{layer}", []).append(x)
            got.setdefault(f"size{layer}", []).append(size[:, None])
    check(case, {k: torch.stack(v) for k, v in got.items()})


@pytest.mark.cases("pruners", of("tome_block"))
def test_whole_blocks(case: Case) -> None:
    """Attention with the log-size bias, then merging on its head-mean keys, then the MLP."""
    heads, eps = case.params["num_heads"], case.params["norm_eps"]
    got: dict[str, list[Tensor]] = {}
    for b in range(case.inputs["x"].shape[0]):
        x = case.inputs["x"][b]
        size = torch.ones(x.shape[0])
        for block in range(case.params["blocks"]):
            w = {k.split(".", 1)[1]: v for k, v in case.inputs.items() if k.startswith(f"block{block}.")}
            width = x.shape[1]
            seen = layer_norm(x, (width,), w["norm1.weight"], w["norm1.bias"], eps)
            qkv = linear(seen, w["attn.qkv.weight"], w["attn.qkv.bias"])
            q, k, v = qkv.reshape(-1, 3, heads, width // heads).permute(1, 2, 0, 3)
            bias = size.log()[None, None, None] if case.params["prop_attn"] else None
            out, _ = eager_attention(torch.nn.Identity(), q[None], k[None], v[None], bias)
            x = x + linear(out[0].flatten(1), w["attn.proj.weight"], w["attn.proj.bias"])
            edit = edit_of(**merging(case.params["r"], **protected(case)), score=KEYS)
            plan = plan_of(edit, n=x.shape[0], hidden=x, keys=k, size=size, cls=class_rows(case, x.shape[0]))
            x, size = x if plan.values is None else plan.values, sizes(plan, size)
            seen = layer_norm(x, (width,), w["norm2.weight"], w["norm2.bias"], eps)
            inner = gelu(linear(seen, w["mlp.0.weight"], w["mlp.0.bias"]))
            x = x + linear(inner, w["mlp.2.weight"], w["mlp.2.bias"])
            got.setdefault(f"x{block}", []).append(x)
            got.setdefault(f"size{block}", []).append(size[:, None])
    check(case, {k: torch.stack(v) for k, v in got.items()})


@pytest.mark.cases("pruners", of("tome_schedule"))
def test_merges_per_layer(case: Case) -> None:
    r, kind = case.params["r"], case.params["kind"]
    check(case, {"r_per_layer": merges_per_layer(r, case.params["num_layers"], inflection=kind == "tuple")})


def test_nothing_is_decided_where_nothing_would_merge() -> None:
    from pruner_cases import CLOCK, Given

    x = torch.eye(4)
    edit = edit_of(**merging(0), score=HIDDEN)
    assert decide(edit, Given({"n": 4, "hidden": x}), CLOCK) is None
