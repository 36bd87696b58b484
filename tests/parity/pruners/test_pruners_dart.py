"""DART: pivots by the L1 norm of keys, then the tokens least like each pivot."""

from __future__ import annotations

import pytest
import torch
from pruner_cases import Case, check, edit_of, of, plan_of
from torch import Tensor
from torch.nn.functional import normalize

from probe.errors import ProbeError
from probe.scores import norm
from probe.selections import ranked
from probe.selections.pivots import pivot_turns


def rows_of(case: Case, length: int) -> tuple[Tensor, Tensor]:
    """Rows of the visual tokens and of the text behind them."""
    start, n = case.params["v_start"], case.params["n_vis"]
    return torch.arange(start, start + n), torch.arange(start + n, length)


@pytest.mark.cases("pruners", of("dart"))
def test_dart(case: Case) -> None:
    p, keys, hidden = case.params, case.inputs["keys"][0], case.inputs["hidden"][0]
    visual, text = rows_of(case, hidden.shape[0])
    n, many = p["n_vis"], p["pivot_image"] + p["pivot_text"]
    keep = {"share": 1 - p["reduction_ratio"], "round": "truncate"}
    select = {"pivots": {"keep": keep, "image": p["pivot_image"], "text": p["pivot_text"], "order": "hash"}}
    edit = edit_of(
        select,
        {"drop": {"positions": "keep", "order": "raster"}},
        {"norm": {"space": "keys", "p": 1.0, "layer": -1}},
        site="layer.input",
    )
    try:
        plan = plan_of(
            edit,
            n=n,
            keys=keys[:, visual],
            hidden=hidden[visual],
            text_keys=keys[:, text],
            text_hidden=hidden[text],
            row=visual,
            text_row=text,
        )
    except ProbeError:
        assert case.raises
        return
    first = visual[ranked(norm(None, keys[:, visual], space="keys", p=1.0))[: p["pivot_image"]]]
    second = text[ranked(norm(None, keys[:, text], space="keys", p=1.0))[: p["pivot_text"]]]
    both = torch.cat([first, second])
    each = int(n * (1 - p["reduction_ratio"]) / many)
    assert set(first.tolist()) <= set(visual[plan.kept].tolist())
    assert plan.kept.shape[0] == min(p["pivot_image"] + each * many, n)
    if case.tie or case.raises:
        return
    order = both[pivot_turns(both.tolist(), "hash")].tolist()
    check_least_similar(normalize(hidden, dim=-1), visual, first, order, each, visual[plan.kept])
    got = {"kept": visual[plan.kept], "image_pivots": first, "text_pivots": second}
    check(case, got | {"pivot_order": order, "per_pivot": each})


def check_least_similar(unit: Tensor, visual: Tensor, first: Tensor, order: list[int], each: int, kept: Tensor) -> None:
    """Brute force over Python lists."""
    free = [v for v in visual.tolist() if v not in set(first.tolist())]
    taken = set(first.tolist())
    for pivot in order:
        near = sorted(free, key=lambda v: float(unit[v] @ unit[pivot]))[:each]
        taken |= set(near)
        free = [v for v in free if v not in taken]
    assert taken == set(kept.tolist())
