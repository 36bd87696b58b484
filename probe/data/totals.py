"""From single answers to a benchmark's number: F1, acc + acc+, circular questions, the study's average."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
"""The subtasks of MME that ask for knowledge; all others ask for perception."""


@dataclass(frozen=True)
class YesNo:
    """POPE's numbers over yes-no questions, each from 0 to 1. What is neither yes nor no counts as neither.

    ``yes_ratio`` is the share of questions whose reference is yes, as the harness has it.
    """

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float


def yes_no_f1(predictions: Sequence[str], answers: Sequence[str]) -> YesNo:
    """Precision, recall and F1 = 2 P R / (P + R) of the answer ``yes``, each 0 where its denominator is 0."""
    if not answers:
        raise ValueError("no answers to count")
    pairs = [(p.lower().strip(), a.lower().strip()) for p, a in zip(predictions, answers, strict=True)]
    hit = pairs.count(("yes", "yes"))
    precision = _share(hit, hit + pairs.count(("yes", "no")))
    recall = _share(hit, hit + pairs.count(("no", "yes")))
    return YesNo(
        accuracy=sum(p == a for p, a in pairs) / len(pairs),
        precision=precision,
        recall=recall,
        f1=_share(2 * precision * recall, precision + recall),
        yes_ratio=sum(a == "yes" for _, a in pairs) / len(pairs),
    )


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def acc_plus(scores: Iterable[tuple[str, float]]) -> float:
    """MME's acc + acc+ of one subtask, 0 to 200: `scores` are (picture, 1 or 0) of the questions about each picture.

    Mean over pictures of 100 times the share of its questions that are right, plus 100 if all of them are.
    """
    pictures: dict[str, list[float]] = {}
    for picture, score in scores:
        pictures.setdefault(picture, []).append(score)
    if not pictures:
        raise ValueError("no answers to count")
    return sum(100 * sum(s) / len(s) + 100 * (sum(s) == len(s)) for s in pictures.values()) / len(pictures)


def mme_total(subtasks: Mapping[str, float]) -> tuple[float, float]:
    """(perception, cognition): sums of `acc_plus` over MME's subtasks. What the study prints is their sum."""
    cognition = [score for name, score in subtasks.items() if name in COGNITION]
    return sum(s for n, s in subtasks.items() if n not in COGNITION), sum(cognition)


def circular(scores: Iterable[tuple[int, float]]) -> float:
    """MMBench: share of questions whose every copy is right; copies of question i have the index i + k million."""
    right: dict[int, bool] = {}
    for index, score in scores:
        right[index % 1_000_000] = right.get(index % 1_000_000, True) and score == 1
    if not right:
        raise ValueError("no answers to count")
    return sum(right.values()) / len(right)


def relative_average(scores: Mapping[str, float], unpruned: Mapping[str, float]) -> float:
    """The study's Avg. in percent: 100 / B * sum over the B benchmarks of score / the unpruned backbone's score.

    Not weighted and not clipped. Both must be of the same benchmarks, and no unpruned score may be 0.
    """
    if not unpruned or scores.keys() != unpruned.keys():
        missing = sorted(scores.keys() ^ unpruned.keys())
        raise ValueError(f"an average needs the same benchmarks on both sides; only one side has {missing}")
    if zero := [name for name, score in unpruned.items() if not score]:
        raise ValueError(f"the unpruned score of {zero[0]} is 0: nothing is a share of it")
    return 100 / len(scores) * sum(score / unpruned[name] for name, score in scores.items())


def total(metric: str, answers: Sequence[tuple[str, str, Sequence[str], float]]) -> float:
    """A benchmark's number from its answers, (id, prediction, references, score) each, as the study prints it.

    `yes_no_exact`: 100 times F1 of yes. `yes_no`, where ids are ``PICTURE/NUMBER``: acc + acc+. Others: 100 times the
    mean score.
    """
    if metric == "yes_no_exact":
        return 100 * yes_no_f1([p for _, p, _, _ in answers], [r[0] for _, _, r, _ in answers]).f1
    if metric == "yes_no" and all("/" in name for name, _, _, _ in answers):
        return acc_plus((name.rpartition("/")[0], score) for name, _, _, score in answers)
    return 100 * sum(score for _, _, _, score in answers) / len(answers)
