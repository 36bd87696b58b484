"""Scores in [0, 1] of a predicted text against reference texts: pure functions, best reference counts.

`METRICS` names all of them, for `metric:` in a file of questions.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from probe.data.benchmarks import anls, anls_answer_marker, exact_match_gqa, relaxed_accuracy, yes_no, yes_no_exact
from probe.data.letters import letter_only, option_letter, option_search
from probe.data.strings import best, distance
from probe.data.vqa import vqa_accuracy

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


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction equals a reference, else 0; case, blanks and one final full stop do not count."""
    return best(lambda p, a: float(_plain(p) == _plain(a)), prediction, answers)


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

    return best(score, prediction, answers)


def edit_similarity(prediction: str, answers: Sequence[str]) -> float:
    """1 - Levenshtein(p, a) / max(|p|, |a|) over words, without case and marks; 1 for two empty texts."""

    def score(p: str, a: str) -> float:
        x, y = _words(p), _words(a)
        return 1 - distance(x, y) / max(len(x), len(y), 1)

    return best(score, prediction, answers)


def word_f1(prediction: str, answers: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over words, in any order: 2 |p & a| / (|p| + |a|), as multisets.

    Without case and marks; 1 for two empty texts.
    """

    def score(p: str, a: str) -> float:
        x, y = Counter(_words(p)), Counter(_words(a))
        total = x.total() + y.total()
        return 2 * (x & y).total() / total if total else 1.0

    return best(score, prediction, answers)


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
    "word_f1": word_f1,
    "exact_match_gqa": exact_match_gqa,
    "option_letter": option_letter,
    "option_search": option_search,
    "letter_only": letter_only,
    "yes_no": yes_no,
    "yes_no_exact": yes_no_exact,
    "relaxed_accuracy": relaxed_accuracy,
    "anls": anls,
    "anls_answer_marker": anls_answer_marker,
    "vqa_accuracy": vqa_accuracy,
}

_LETTER = ("option_letter", "option_search", "letter_only")
_YES_NO = ("yes_no", "yes_no_exact")
FEWEST_VOTES = 4
"""With fewer references than this no answer can be right under `vqa_accuracy`, which counts three others."""


def unfit(metric: str, answers: Sequence[str]) -> str:
    """What is wrong with these references under a metric, since no answer could ever be right; `""` if nothing is."""
    if metric in _LETTER and not all(len(a.strip()) == 1 and a.strip().isupper() for a in answers):
        return f"`{metric}` compares with an option's letter in capitals, such as `B`"
    if metric in _YES_NO and not all(a.strip().lower() in ("yes", "no") for a in answers):
        return f"`{metric}` compares with `yes` or `no`"
    if metric == "vqa_accuracy" and len(answers) < FEWEST_VOTES:
        return f"`vqa_accuracy` counts votes: give {FEWEST_VOTES} `answers` or more, or use `exact_match`"
    return ""
