"""Scores in [0, 1] of a predicted text against reference texts: pure functions, best reference counts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

Metric = Callable[[str, Sequence[str]], float]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _tokens(text: str) -> list[str]:
    """Words and punctuation marks; a word in capitals, as on the world's pages, counts letter by letter."""
    pieces = re.findall(r"\w+|[^\w\s]", text)
    return [t for p in pieces for t in (p if p.isupper() and p.isalpha() else [p])]


def _plain(text: str) -> str:
    """Case and runs of blanks do not count, nor does one full stop at the end."""
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


def _distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Levenshtein distance: the fewest insertions, deletions and substitutions that turn ``a`` into ``b``."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def _best(score: Callable[[str, str], float], prediction: str, answers: Sequence[str]) -> float:
    if not answers:
        raise ValueError("a score needs at least one reference answer")
    return max(score(prediction, answer) for answer in answers)


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction equals a reference, else 0; case, blanks and one final full stop do not count."""
    return _best(lambda p, a: float(_plain(p) == _plain(a)), prediction, answers)


def token_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Position by position: (number of i with p_i = a_i) / (number of tokens in a).

    Tokens are words and marks, and single letters within words in capitals, so that a page is compared
    letter by letter in reading order. What the prediction has beyond the reference's length does not count.
    An empty reference is met by an empty prediction only.
    """

    def score(p: str, a: str) -> float:
        got, wanted = _tokens(p), _tokens(a)
        if not wanted:
            return float(not got)
        return sum(x == y for x, y in zip(got, wanted, strict=False)) / len(wanted)

    return _best(score, prediction, answers)


def edit_similarity(prediction: str, answers: Sequence[str]) -> float:
    """1 - Levenshtein(p, a) / max(|p|, |a|) over words, without case and marks; 1 for two empty texts."""

    def score(p: str, a: str) -> float:
        x, y = _words(p), _words(a)
        return 1 - _distance(x, y) / max(len(x), len(y), 1)

    return _best(score, prediction, answers)


def agreement(a: str, b: str) -> float:
    """How far two predictions agree, symmetric: (number of i with a_i = b_i) / max(|a|, |b|) over tokens.

    Tokens are those of :func:`token_accuracy`; 1 for two empty texts.
    """
    x, y = _tokens(a), _tokens(b)
    return sum(p == q for p, q in zip(x, y, strict=False)) / max(len(x), len(y)) if x or y else 1.0


METRICS: Mapping[str, Metric] = {
    "exact_match": exact_match,
    "token_accuracy": token_accuracy,
    "edit_similarity": edit_similarity,
}
