"""Whole runs total as the harness totals them; the study's averages and closed forms of cost."""

from __future__ import annotations

import math
from typing import Any

import pytest
from metric_cases import answers_of, cases, files

from probe.closed_forms import after_layer, decode, denoising, prefill, pruned
from probe.data import METRICS
from probe.data.benchmarks import judge_score
from probe.data.letters import option_of
from probe.data.totals import acc_plus, circular, mme_total, relative_average, yes_no_f1

MEANS = {"relaxed_accuracy": ("relaxed_accuracy", "relaxed_overall", 1), "anls": ("anls", "anls", 1),
         "anls_answer_marker": ("anls_answer_marker", "anls", 1), "vqa_accuracy": ("vqa_accuracy", "exact_match", 1),
         "exact_match": ("exact_match_gqa", "exact_match", 1), "option_letter": ("option_letter", "exact_match", 1),
         "videomme": ("option_search", "videomme_perception_score", 100)}  # fmt: skip


def _mean(metric: str, cases: list[dict[str, Any]]) -> float:
    return sum(METRICS[metric](c["prediction"], answers_of(c)) for c in cases) / len(cases)


@pytest.mark.cases("metrics", files(*MEANS))
def test_the_mean_of_a_run(case: Any) -> None:
    metric, key, factor = MEANS[case["metric"]]
    assert factor * _mean(metric, case["cases"]) == pytest.approx(case["aggregate"][key], abs=1e-9)


@pytest.mark.cases("metrics", files("mmmu_pro_vision"))
def test_the_mean_of_mmmu_is_rounded(case: Any) -> None:
    assert round(_mean("letter_only", case["cases"]), 5) == case["aggregate"]["mmmu_acc"]


@pytest.mark.cases("metrics", files("relaxed_accuracy"))
def test_the_halves_of_chartqa(case: Any) -> None:
    for half in ("augmented", "human"):
        part = [c for c in case["cases"] if c["split"].startswith(half)]
        if not part:
            continue
        assert _mean("relaxed_accuracy", part) == pytest.approx(case["aggregate"][f"relaxed_{half}_split"], abs=1e-9)


@pytest.mark.cases("metrics", files("pope"))
def test_f1_of_yes(case: Any) -> None:
    def count(part: list[dict[str, Any]]) -> Any:
        return yes_no_f1([c["prediction"] for c in part], [c["answers"][0] for c in part])

    pooled = {f"pope_{k}": v for k, v in vars(count(case["cases"])).items()}
    pooled["pope_f1_score"] = pooled.pop("pope_f1")
    assert pooled == pytest.approx(case["aggregate"]["pooled"], abs=1e-9)
    splits = case["aggregate"]["per_split"]
    found = {split: count([c for c in case["cases"] if c["split"] == split]) for split in splits}
    for split, wanted in splits.items():
        assert {k: getattr(found[split], k) for k in wanted} == pytest.approx(wanted, abs=1e-9)
    mean = sum(numbers.f1 for numbers in found.values()) / len(found)
    assert mean == pytest.approx(case["aggregate"]["mean_f1_over_splits"], abs=1e-9)


@pytest.mark.cases("metrics", files("mme"))
def test_acc_and_acc_plus(case: Any) -> None:
    wanted = case["aggregate"]
    subtasks = {}
    for name in wanted["per_category"]:
        part = [c for c in case["cases"] if c["category"] == name]
        subtasks[name] = acc_plus((c["question_id"], METRICS["yes_no"](c["prediction"], c["answers"])) for c in part)
    assert subtasks == pytest.approx(wanted["per_category"], abs=1e-9)
    perception, cognition = mme_total(subtasks)
    assert perception == pytest.approx(wanted["mme_perception_score"], abs=1e-9)
    assert cognition == pytest.approx(wanted["mme_cognition_score"], abs=1e-9)
    assert perception + cognition == pytest.approx(wanted["total"], abs=1e-9)


@pytest.mark.cases("metrics", files("mmbench_static"))
def test_circular_questions(case: Any) -> None:
    def score(item: dict[str, Any]) -> float:
        return float(option_of(item["prediction"].strip(), item["options"]) in item["answers"])

    alone = [(i, score(c)) for i, c in enumerate(case["cases"])]
    assert circular(alone) == pytest.approx(case["aggregate"]["accuracy"], abs=1e-9)
    for group in case["circular_groups"]:
        assert circular((m["index"], score(m)) for m in group["members"]) == group["expected"]["score"]


@pytest.mark.cases("metrics", files("vdc_judge_reply"))
def test_the_mean_of_a_judge(case: Any) -> None:
    scores = [judge_score(c["reply"]) for c in case["cases"]]
    assert sum(scores) / len(scores) == pytest.approx(case["aggregate"]["mean_score"], abs=1e-9)


@pytest.mark.cases("metrics", cases("relative_average"))
def test_the_study_s_average(case: Any) -> None:
    _, file, row = case
    found = relative_average(row["scores"], file["baseline"])
    assert found == pytest.approx(row["expected"]["percent"], abs=1e-4)  # written with four decimals
    assert abs(found - row["expected"]["printed_percent"]) <= file["tolerance_percent"]


@pytest.mark.cases("metrics", cases("flops"))
def test_the_closed_forms_of_cost(case: Any) -> None:
    _, _, given = case
    sizes = {"width": given["hidden"], "mlp": given["ffn"]}
    n, layers = given["input_tokens"], given["layers"]
    if "keep_ratio" in given:  # how a share is rounded is not said; a whole number of tokens is the same in all ways
        kept = given["visual_tokens"] * given["keep_ratio"]
        lefts = [n - given["visual_tokens"] + share for share in (math.floor(kept), round(kept), kept)]
        possible = [pruned([after_layer(n, left, given["full_layers"], layers)], **sizes) for left in lefts]
        found = {"prefill": min(possible, key=lambda flops: abs(flops - given["expected"]["prefill"]))}
    else:
        found = {
            "prefill": prefill(n, **sizes, layers=layers),
            "decode": decode(n, given["output_tokens"], **sizes, layers=layers),
            "denoising": denoising(given["active_tokens_per_step"], **sizes, layers=layers),
        }
    assert found == pytest.approx(given["expected"], rel=1e-12)
