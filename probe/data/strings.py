"""What several metrics need of texts: the edit distance, and the best of several references."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Levenshtein distance: the fewest insertions, deletions and substitutions that turn ``a`` into ``b``."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def best(score: Callable[[str, str], float], prediction: str, answers: Sequence[str]) -> float:
    """The highest score against any of the references; `ValueError` where there is none."""
    known(answers)
    return max(score(prediction, answer) for answer in answers)


def known(answers: Sequence[str]) -> None:
    """`ValueError` where there is no reference."""
    if not answers:
        raise ValueError("a score needs at least one reference answer")
