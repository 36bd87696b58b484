"""Single answers score as the field's harness scores them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from metric_cases import answers_of, cases

from probe.data import METRICS
from probe.data.benchmarks import judge_score, marked_answer, yes_no_label
from probe.data.letters import found_letter, lone_letter, option_of
from probe.data.vqa import normalised

OURS = {
    "relaxed_accuracy": "relaxed_accuracy",
    "anls": "anls",
    "anls_answer_marker": "anls_answer_marker",
    "vqa_accuracy": "vqa_accuracy",
    "exact_match": "exact_match_gqa",
    "option_letter": "option_letter",
    "mme": "yes_no",
    "pope": "yes_no_exact",
    "mmmu_pro_vision": "letter_only",
    "videomme": "option_search",
}
READ = {"mme": ("label", yes_no_label), "videomme": ("letter", found_letter),
        "vqa_accuracy": ("normalised_prediction", normalised), "anls_answer_marker": ("extracted", marked_answer),
        "mmmu_pro_vision": ("parsed", str.strip)}  # fmt: skip
OTHERS = {"mmbench_static", "vdc_judge_reply", "relative_average", "flops"}


@pytest.mark.cases("metrics", cases(*OURS))
def test_a_single_answer_scores_as_the_harness_says(case: Any) -> None:
    metric, _, given = case
    score = METRICS[OURS[metric]](given["prediction"], answers_of(given))
    assert score == pytest.approx(given["expected"]["score"], abs=1e-9)


@pytest.mark.cases("metrics", cases(*READ))
def test_what_is_read_from_the_text_is_the_same(case: Any) -> None:
    metric, _, given = case
    key, read = READ[metric]
    assert read(given["prediction"]) == given["expected"][key]


@pytest.mark.cases("metrics", cases("mmbench_static"))
def test_an_option_is_read_as_mmbench_reads_it(case: Any) -> None:
    _, _, given = case
    text, options = given["prediction"].strip(), given["options"]
    assert lone_letter(text, options) == given["expected"]["prefetched_letter"]
    assert (option_of(text, options) in given["answers"]) == given["expected"]["score"]


@pytest.mark.cases("metrics", cases("vdc_judge_reply"))
def test_a_judge_reply_gives_its_score(case: Any) -> None:
    assert judge_score(case[2]["reply"]) == case[2]["expected"]["score"]


@pytest.mark.cases("metrics", lambda folder: [("files", folder)])
def test_every_file_of_the_set_is_read_by_a_test(case: Path) -> None:
    assert {path.stem for path in case.glob("*.json")} <= {*OURS, *OTHERS}
