"""TRIM: similarity to the question, count by outliers or as a share, the mean of the dropped; the study's towers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pruner_cases import Case, check, check_best, edit_of, mask_of, of, plan_of, scored
from torch import Tensor
from torch.nn.functional import layer_norm

from probe.errors import ProbeError
from probe.selections.counts import outlier_share

SCORE = {"text_image": {"metric": "dot", "sign": -1, "softmax": True}}
PLAIN = {"text_image": {"metric": "dot", "sign": 1}}


def in_common_space(case: Case) -> Tensor:
    """Patches after the post-norm and the visual projection, `(batch, n, p)`."""
    x, weight = case.inputs["x"], case.inputs["ln_w"]
    seen = layer_norm(x, weight.shape, weight, case.inputs["ln_b"], case.params["post_layernorm_eps"])
    return seen if "proj" not in case.inputs else seen @ case.inputs["proj"].T


def keep_of(case: Case, image: Tensor) -> tuple[Any, float]:
    """How many patches stay, in our spelling, and the share that this means."""
    p, batch = case.params, image.shape[0]
    if "prune_ratio" in p:  # the study: a fixed share, at least one and not all
        share = 1 - p["prune_ratio"]
        return {"share": share, "round": "truncate", "min": 1, "spare": 1}, share
    if p["k"] >= 0:
        return {"share": p["k"], "round": "truncate"}, p["k"]
    edit = edit_of({"top_k": {"keep": 1}}, "append", SCORE)
    pooled = torch.cat([scored(edit, **given(case, image, b)) for b in range(batch)])
    share = outlier_share(pooled, 1.5)
    return ({"iqr": 1.5} if batch == 1 else {"share": share, "round": "truncate"}), share


def given(case: Case, image: Tensor, b: int) -> dict[str, Any]:
    return {
        "n": image.shape[1],
        "hidden": case.inputs["x"][b],
        "image_features": image[b],
        "text_features": case.inputs["text"][b],
    }


def run(case: Case) -> dict[str, Any]:
    image = in_common_space(case)
    keep, share = keep_of(case, image)
    edit = edit_of({"top_k": {"keep": keep}}, {"append": {"what": "mean", "order": "raster"}}, SCORE)
    got: dict[str, list[Tensor]] = {"tokens": [], "kept_mask": [], "softmax_score": [], "dot": []}
    count = 0
    for b in range(image.shape[0]):
        plan, n = plan_of(edit, **given(case, image, b)), image.shape[1]
        value = scored(edit, **given(case, image, b))
        check_best(plan.kept, value, plan.kept.shape[0])
        count = plan.kept.shape[0]
        got["tokens"].append(case.inputs["x"][b] if plan.values is None else plan.values)
        got["kept_mask"].append(mask_of(plan.kept, n))
        got["softmax_score"].append(value)
        got["dot"].append(scored(edit_of({"top_k": {"keep": 1}}, "drop", PLAIN), **given(case, image, b)))
        assert plan.appended == (plan.kept.shape[0] < n)
    stacked: dict[str, Any] = {k: torch.stack(v) for k, v in got.items()}
    if case.tie:
        del stacked["kept_mask"], stacked["tokens"]
    return stacked | {"n_kept": count, "actual_dim": count + 1, "ratio": share}


@pytest.mark.cases("pruners", of("trim"))
def test_trim(case: Case) -> None:
    """Where the original fails (nothing kept, or no place for the mean), ours keeps what it can."""
    try:
        got = run(case)
    except ProbeError:
        assert case.raises
        return
    assert not case.raises or torch.isfinite(got["softmax_score"]).all()
    if not case.raises:
        check(case, got)


@pytest.mark.cases("pruners", of("study_trim"))
def test_trim_as_the_study_has_it(case: Case) -> None:
    check(case, run(case))
