"""Metric values computed by hand."""

from __future__ import annotations

import pytest

from probe.data.metrics import (
    FEWEST_VOTES,
    METRICS,
    agreement,
    edit_similarity,
    exact_match,
    token_accuracy,
    unfit,
    word_f1,
)


def test_exact_match_forgives_case_blanks_and_one_full_stop() -> None:
    assert exact_match(" Red ", ["red"]) == 1
    assert exact_match("red.", ["blue", "red"]) == 1
    assert exact_match("red..", ["red"]) == 0
    assert exact_match("dark red", ["red"]) == 0
    assert exact_match("", ["red"]) == 0


def test_token_accuracy_compares_pages_letter_by_letter_in_order() -> None:
    assert token_accuracy("BAKO DIRU", ["BAKO DIRU"]) == 1
    assert token_accuracy("BAKO DIRO", ["BAKO DIRU"]) == 7 / 8
    assert token_accuracy("DIRU BAKO", ["BAKO DIRU"]) == 0  # no letter stands where it should
    assert token_accuracy("BAKO", ["BAKO DIRU"]) == 4 / 8  # what is missing is wrong
    assert token_accuracy("BAKO DIRU MISO", ["BAKO DIRU"]) == 1  # what is too much does not count


def test_token_accuracy_takes_other_words_and_marks_whole() -> None:
    assert token_accuracy("red circle, blue star", ["red circle, pink star"]) == 4 / 5
    assert token_accuracy("blue", ["pale", "blue"]) == 1
    assert token_accuracy("", [""]) == 1
    assert token_accuracy("x", [""]) == 0


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("red circle, blue star", "Red circle; blue star", 1.0),
        ("red circle blue star", "red circle", 1 - 2 / 4),  # two insertions
        ("circle blue star", "red circle blue star", 1 - 1 / 4),  # one deletion, no shift
        ("green ring", "red circle", 0.0),
        ("", "red", 0.0),
        ("", "", 1.0),
    ],
)
def test_edit_similarity(prediction: str, answer: str, expected: float) -> None:
    assert edit_similarity(prediction, [answer]) == pytest.approx(expected)


def test_agreement_is_symmetric_and_counts_missing_tokens() -> None:
    assert agreement("BAKO", "BAKU") == 3 / 4
    assert agreement("red star", "red") == agreement("red", "red star") == 1 / 2
    assert agreement("", "") == 1
    assert agreement("", "red") == 0


def test_word_f1_counts_words_in_any_order() -> None:
    assert word_f1("star red", ["red star"]) == 1
    assert word_f1("the red star", ["red star"]) == pytest.approx(2 * 2 / 5)
    assert word_f1("red red", ["red"]) == pytest.approx(2 / 3)  # the second one has no partner
    assert (word_f1("", [""]), word_f1("", ["red"])) == (1, 0)


def _right(name: str) -> list[str]:
    """References that a metric can use, the first of which is right."""
    kinds = [["red circle"], ["B"], ["Yes"], ["red circle"] * FEWEST_VOTES]
    return next(answers for answers in kinds if not unfit(name, answers))


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_is_one_for_the_answer_and_refuses_to_guess_without_one(name: str) -> None:
    answers = _right(name)
    said = f"Answer: {answers[0]}" if name.endswith("marker") else answers[0]
    assert METRICS[name](said, answers) == 1
    assert METRICS[name](f"  {said} ", answers) == 1
    assert METRICS[name]("teapots", answers) == 0
    with pytest.raises(ValueError, match="reference"):
        METRICS[name](said, [])


def test_references_under_which_nothing_could_be_right_are_named() -> None:
    assert unfit("vqa_accuracy", ["red"] * (FEWEST_VOTES - 1))
    assert METRICS["vqa_accuracy"]("red", ["red"] * (FEWEST_VOTES - 1)) < 1
    assert METRICS["vqa_accuracy"]("red", ["red"] * FEWEST_VOTES) == 1
    assert "letter" in unfit("option_letter", ["red"]) and not unfit("option_letter", ["C"])
    assert "yes" in unfit("yes_no", ["maybe"]) and not unfit("yes_no", ["No"])
