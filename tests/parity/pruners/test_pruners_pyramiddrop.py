"""PyramidDrop: the last instruction token's attention, computed ahead with the next layer's norm and projections."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pruner_cases import Case, check, check_best, edit_of, of, plan_of, scored
from test_pruners_fastv import layout_of
from torch import Tensor

from probe.attend import attention_rows
from probe.surgery import narrow, take


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * (x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt())


def rotated(x: Tensor, position: Tensor, theta: float) -> Tensor:
    """Rotary embedding in the halves convention; `x (head, length, size)`."""
    size = x.shape[-1]
    frequency = theta ** (-torch.arange(0, size, 2).float() / size)
    angle = position.float()[:, None] * frequency
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
    return x * cos + torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1) * sin


def ahead(case: Case, x: Tensor, row: int) -> Tensor:
    """Attention of one row in the layer that is about to run, `(head, length)`."""
    p, i = case.params, case.inputs
    heads, length = p["heads"], x.shape[0]
    seen = rms_norm(x, i["ln_w"], p["rms_eps"])
    q, k = ((seen @ i[w].T).reshape(length, heads, -1).transpose(0, 1) for w in ("wq", "wk"))
    here = torch.arange(length)
    q, k = rotated(q, here, p["rope_theta"]), rotated(k, here, p["rope_theta"])
    causal = (here[None] <= here[:, None])[None, None]
    rows = torch.tensor([[row]])
    return attention_rows(q[None], k[None], rows, causal, q.shape[-1] ** -0.5, "softmax")[0, :, 0]


@pytest.mark.cases("pruners", of("pyramiddrop"))
def test_pyramiddrop(case: Case) -> None:
    p, x = case.params, case.inputs["x"]
    start, now, original = p["image_start"], p["n_vis_now"], p["n_vis_original"]
    share = p["ratios"][p["stage"] + 1]
    edit = edit_of(
        {"top_k": {"keep": {"share": share, "round": "truncate"}}},
        {"drop": {"positions": "compact", "order": "raster"}},
        {"attention": {"queries": "last_prompt", "projected": True}},
        site="layer.input",
    )
    got: dict[str, Any] = {}
    states, positions = [], []
    for b, text in enumerate(p["prompt_len"]):
        length = text + now
        sample = x[b, :length]
        received = ahead(case, sample, length - 1)[:, start : start + now]
        given: dict[str, Any] = {"n": now, "original": original, "received": received}
        plan = plan_of(edit, **given)
        check_best(plan.kept, scored(edit, **given), min(int(original * share), now))
        layout, index = narrow(layout_of(start, now, length), [plan], positions="compact")
        states.append(take(sample[None], index)[0])
        positions.append(layout.position[0])
        got[f"kept{b}"] = start + plan.kept
        got[f"score{b}"] = scored(edit, **given)
    longest = max(s.shape[0] for s in states)
    got["hidden"] = torch.nn.utils.rnn.pad_sequence(states, batch_first=True)
    got["position_ids"] = torch.nn.utils.rnn.pad_sequence(positions, batch_first=True)
    got["attention_mask"] = torch.stack([torch.arange(longest) < s.shape[0] for s in states])
    got["n_keep"] = got["kept0"].shape[0]
    for position in positions:
        assert position.tolist() == list(range(position.shape[0]))
    check(case, {k: v for k, v in got.items() if not (case.tie and (k.startswith("kept") or k == "hidden"))})
