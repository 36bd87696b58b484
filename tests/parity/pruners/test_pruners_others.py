"""FasterVLM, VisPruner, HiPrune, HoloV, FOLDER, GlobalCom2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pruner_cases import Case, check, check_best, edit_of, mask_of, of, plan_of, scored
from torch import Tensor

from probe.errors import ProbeError
from probe.site import Plan

CLS = {"attention": {"queries": "cls", "heads": "mean"}}


def masks(case: Case, edit: Any, given: Any, batch: int, n: int) -> tuple[Tensor, list[Plan]]:
    plans = [plan_of(edit, n=n, **given(b)) for b in range(batch)]
    for plan in plans:
        assert plan.kept.unique().shape[0] == plan.kept.shape[0]
    return torch.stack([mask_of(p.kept, n) for p in plans]), plans


@pytest.mark.cases("pruners", of("fastervlm"))
def test_fastervlm(case: Case) -> None:
    att, count = case.inputs["att"], case.params["n_keep"]
    edit = edit_of({"top_k": {"keep": count}}, {"drop": {"order": "raster"}}, CLS)
    mask, plans = masks(case, edit, lambda b: {"received": att[b]}, att.shape[0], att.shape[2])
    score = torch.stack([scored(edit, n=att.shape[2], received=a) for a in att])
    for plan, value in zip(plans, score, strict=True):
        check_best(plan.kept, value, min(count, att.shape[2]))
    check(case, {"score": score} if case.tie else {"kept_mask": mask, "score": score})


@pytest.mark.cases("pruners", of("vispruner"))
def test_vispruner(case: Case) -> None:
    """The important ones by attention; the rest, in falling attention, less the doubles."""
    p, att, feat = case.params, case.inputs["att"], case.inputs["feat"]
    important = {"top_k": {"keep": {"budget": p["important_ratio"], "round": "truncate"}}}
    unlike = {"deduplicate": {"keep": "rest", "step": p["step"], "score": {"features": {"space": "hidden"}}}}
    edit = edit_of({"then": {"keep": p["n_keep"], "of": [important, unlike]}}, "drop", CLS)
    n = att.shape[2]
    mask, plans = masks(case, edit, lambda b: {"received": att[b], "hidden": feat[b]}, att.shape[0], n)
    for b, plan in enumerate(plans):
        assert plan.kept.shape[0] == min(p["n_keep"], n)
        best = att[b].mean(0).topk(int(p["n_keep"] * p["important_ratio"])).values
        assert att[b].mean(0)[plan.kept].topk(best.shape[0]).values.tolist() == pytest.approx(best.tolist())
    if not case.raises:
        check(case, {} if case.tie else {"kept_mask": mask})


@pytest.mark.cases("pruners", of("hiprune"))
def test_hiprune(case: Case) -> None:
    """Anchors of the object layer with their neighbours, then the best of the deep layer."""
    p, shallow, deep = case.params, case.inputs["shallow"], case.inputs["deep"]
    batch, n = shallow.shape
    count = case.expected.get("per_image", int(p["retention"] / batch))
    anchors = {
        "keep": {"budget": p["alpha"] / 5, "round": "half_even"},
        "score": {"attention": {"queries": "all", "layer": -1}},
    }
    parts = [{"dilate": {"of": {"top_k": anchors}}}, {"top_k": {"keep": "rest"}}]
    edit = edit_of(
        {"then": {"keep": count, "of": parts}},
        "drop",
        {"attention": {"queries": "all", "layer": 0}},
        layer=p["object_layer"],
    )

    kept = []
    for b in range(batch):
        source = {"n": n, "columns": p["grid_width"]}
        plan = plan_in_layers(edit, source, {0: deep[b], -1: shallow[b]})
        kept.append(mask_of(plan.kept, n))
        assert plan.kept.shape[0] == min(count, n)
    check(case, {"per_image": count} if case.tie else {"kept_mask": torch.stack(kept), "per_image": count})


def plan_in_layers(edit: Any, values: dict[str, Any], received: dict[int, Tensor]) -> Plan:
    """A plan whose scores read several layers."""
    from pruner_cases import CLOCK, Given

    from probe.decide import decide

    class Several(Given):
        def give(self, name: str, params: Any) -> Any:
            return received[params["layer"]][None] if name == "received" else super().give(name, params)

    plan = decide(edit, Several(values), CLOCK)
    return Plan(torch.arange(values["n"])) if plan is None else plan


@pytest.mark.cases("pruners", of("holov"))
def test_holov(case: Case) -> None:
    """Crops share the budget by mean score; zero rows, which fill up crops that are too small, are not made here."""
    p, tok, att = case.params, case.inputs["tok"], case.inputs["att"]
    n = att.shape[1]
    variance = {"similarity": {"space": "hidden", "stat": "variance"}}
    score = {"combine": {"of": [CLS, variance], "weights": [1000.0, 0.09]}}
    inside = {"top_k": {"keep": "rest", "score": CLS}}
    select = {"budget": {"groups": {"crops": p["crops"]}, "keep": p["n_keep"], "of": inside}}
    edit = edit_of(select, {"drop": {"order": "score"}}, score)
    tokens, index = [], []
    for b in range(att.shape[0]):
        plan = plan_of(edit, n=n, hidden=tok[b], received=att[b][None])
        kept = plan.kept if plan.kept.shape[0] < n or p["n_keep"] < n else crops_in_turn(att[b], p["crops"])
        filler = max(p["n_keep"] - kept.shape[0], 0)
        tokens.append(torch.cat([tok[b][kept], torch.zeros(filler, tok.shape[2])]))
        index.append(torch.cat([kept, torch.full((filler,), -1)]))
    if case.raises:
        return
    got = {"tokens": torch.stack(tokens), "kept_index": torch.stack(index)}
    if "kept_index" in case.expected and (case.expected["kept_index"] < 0).any():
        # the original pads inside its own order of crops; what it keeps is the same
        for b, want in enumerate(case.expected["kept_index"].tolist()):
            assert [i for i in got["kept_index"][b].tolist() if i >= 0] == [i for i in want if i >= 0]
            where = [i for i in want if i >= 0]
            torch.testing.assert_close(case.expected["tokens"][b][case.expected["kept_index"][b] >= 0], tok[b][where])
        return
    check(case, {} if case.tie else got)


def crops_in_turn(att: Tensor, crops: int) -> Tensor:
    """Everything, crop by crop, in falling attention: a recipe that keeps all decides nothing."""
    base, longer = divmod(att.shape[0], crops)
    sizes = [base + (i < longer) for i in range(crops)]
    parts, start = [], 0
    for size in sizes:
        parts.append(start + att[start : start + size].sort(descending=True, stable=True).indices)
        start += size
    return torch.cat(parts)


@pytest.mark.cases("pruners", of("folder"))
def test_folder(case: Case) -> None:
    p, x = case.params, case.inputs["x"]
    n = x.shape[1]
    protect = {"protect": ["cls"]} if p.get("class_token_protected") else {}
    merge = {"mode": "size_mean", "carry_size": True, "scale": "log_size", "order": "raster"} | protect
    edit = edit_of({"bipartite": {"r": p["r"], "rounds": "until"}}, {"merge": merge}, {"features": {"space": "hidden"}})
    cls = torch.zeros(n, dtype=torch.bool)
    cls[0] = bool(protect)
    tokens, sizes = [], []
    for sample in x:
        plan = plan_of(edit, n=n, hidden=sample, cls=cls)
        tokens.append(sample if plan.values is None else plan.values)
        sizes.append((torch.ones(n) if plan.size is None else plan.size)[:, None])
        assert float(sizes[-1].sum()) == pytest.approx(n)
        assert not protect or plan.kept[0] == 0
    check(
        case, {"size": torch.stack(sizes)} if case.tie else {"tokens": torch.stack(tokens), "size": torch.stack(sizes)}
    )


@pytest.mark.cases("pruners", of("globalcom2"))
def test_globalcom2(case: Case) -> None:
    p, own, tiles = case.params, case.inputs["global_attn"], case.inputs["crop_attn"]
    (rows, columns), side = p["grid"], p["tokens_per_side"]
    thumbnail = {"thumbnail": {"queries": "cls"}}
    both = {"combine": {"of": [CLS, thumbnail], "normalise": "l2"}}
    select = {
        "budget": {
            "groups": "view",
            "shares": "softmax",
            "temperature": p["temperature"],
            "keep": p["retention"],
            "round": "truncate",
            "of": {"top_k": {"keep": "rest", "score": both}},
        }
    }
    edit = edit_of(select, {"drop": {"order": "score"}}, {"thumbnail": {"queries": "cls", "mode": "area"}})
    received = torch.cat([own, tiles.flatten()])
    n = received.shape[0]
    boxes = [grid_boxes(side, 0, 0, 1, 1)]
    boxes += [grid_boxes(side, r, c, rows, columns) for r in range(rows) for c in range(columns)]
    view = torch.arange(1 + rows * columns).repeat_interleave(side * side)
    given: dict[str, Any] = {"n": n, "received": received[None], "box": torch.cat(boxes), "view": view}
    try:
        plan = plan_of(edit, **given)
    except ProbeError:
        assert case.raises
        return
    kept = [plan.kept[view[plan.kept] == v] - v * side * side for v in range(1 + rows * columns)]
    region = scored(edit, **given)[side * side :].reshape(rows * columns, -1).sum(1)
    share = (region.double() / p["temperature"]).softmax(0)
    scales = (p["retention"] * (1 + share - share.mean())).clamp(max=1.0)
    got: dict[str, Any] = {"thumbnail_kept": kept[0], "scales": scales.tolist()}
    got |= {f"kept{j}": found for j, found in enumerate(kept[1:])}
    for j, found in enumerate(kept[1:]):
        assert found.shape[0] == min(int(side * side * scales[j]), side * side)
    check(case, {"scales": got["scales"]} if case.tie else got)


def grid_boxes(side: int, row: int, column: int, rows: int, columns: int) -> Tensor:
    """What the tokens of one tile see, as fractions of the picture: `(side * side, 4)`."""
    edge = torch.arange(side) / side
    y, x = torch.meshgrid((row + edge) / rows, (column + edge) / columns, indexing="ij")
    return torch.stack([x, y, x + 1 / side / columns, y + 1 / side / rows], -1).flatten(0, 1)
