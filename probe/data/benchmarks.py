"""Scores of single answers by the rules of published benchmarks, oddities included: standard library only.

Each function says whose rule it is; the field's harness gives the same numbers. Blanks around a prediction never
count. Rules about several answers at once (F1, acc+, circular questions) are in `probe.data.totals`.
"""

from __future__ import annotations

import ast
import string
from collections.abc import Sequence

from probe.data.strings import best, distance

_PUNCTUATION = str.maketrans("", "", string.punctuation)
MARKER = "Answer:"
"""What LLaDA-V's document questions ask the model to write before its answer."""


def exact_match_gqa(prediction: str, answers: Sequence[str]) -> float:
    """GQA: equal once case and ASCII punctuation are gone. Blanks inside count, so ``yes .`` is not ``yes``."""

    def score(p: str, a: str) -> float:
        return float(p.lower().translate(_PUNCTUATION) == a.lower().translate(_PUNCTUATION))

    return best(score, prediction.strip(), answers)


def yes_no_label(prediction: str) -> str:
    """MME: ``yes``, ``no`` or ``other``, read from the beginning of a text.

    Without full stops and case: ``y`` or ``n`` alone, or ``yes``, else ``no``, within the first four characters.
    """
    text = prediction.lower().strip().replace(".", "")
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text, "other")
    return next((label for label in ("yes", "no") if label in text[:4]), "other")


def yes_no(prediction: str, answers: Sequence[str]) -> float:
    """MME: the label of the text (:func:`yes_no_label`) is the reference, ``yes`` or ``no``."""
    label = yes_no_label(prediction)
    return best(lambda _, a: float(a.lower().strip().replace(".", "") == label), prediction, answers)


def yes_no_exact(prediction: str, answers: Sequence[str]) -> float:
    """POPE: the whole text is the reference without case; ``Yes.`` is wrong."""
    return best(lambda p, a: float(p == a.lower().strip()), prediction.lower().strip(), answers)


def _number(text: str) -> float | None:
    """As Python reads floats; with a percent sign at the end, hundredths of it."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """ChartQA (Masry et al., 2022): numbers within 5 % of the reference, |p - a| / |a| <= 0.05; texts without case.

    A number is what Python reads as a float, ``12%`` being 0.12; ``1,000`` and ``$5`` are texts, and so is
    everything that is compared with a reference of 0.
    """

    def score(p: str, a: str) -> float:
        x, y = _number(p), _number(a)
        if x is None or not y:
            return float(p.lower() == a.lower())
        return float(abs(x - y) / abs(y) <= 0.05)

    return best(score, prediction.strip(), answers)


def _anls(prediction: str, answers: Sequence[str]) -> float:
    def share(p: str, a: str) -> float:
        # the length is that of the texts in capitals, as they came: `ß` counts twice
        length = max(len(p.upper()), len(a.upper()))
        return 1 - (distance(_squeezed(a), _squeezed(p)) / length if length else 0.0)

    score = best(share, prediction, answers)
    return score if score >= 0.5 else 0.0


def _squeezed(text: str) -> str:
    return " ".join(text.lower().split())


def anls(prediction: str, answers: Sequence[str]) -> float:
    """DocVQA, InfographicVQA: normalised Levenshtein similarity, 1 - distance(p, a) / max(|p|, |a|), 0 below 0.5.

    The distance does not see case and runs of blanks; the lengths are those of the texts as they are.
    """
    return _anls(prediction.strip(), answers)


def marked_answer(prediction: str) -> str | None:
    """LLaDA-V's document questions: what follows the last ``Answer:``, and in it the last colon; None without it.

    Asterisks are taken out first, and full stops, commas and spaces at the ends last.
    """
    _, marker, after = prediction.strip().replace("*", "").rpartition(MARKER)
    return after.rpartition(":")[2].strip("., ") if marker else None


def anls_answer_marker(prediction: str, answers: Sequence[str]) -> float:
    """:func:`anls` of :func:`marked_answer`; a text without the marker counts as the word ``None``."""
    found = marked_answer(prediction)
    return _anls("None" if found is None else found, answers)


def judge_score(reply: str) -> int:
    """VideoDetailCaption: ``score`` in a judge's reply, a Python dictionary, as a whole number; 0 if it has none."""
    try:
        found = ast.literal_eval(reply)
        return int(found["score"]) if isinstance(found, dict) and "score" in found else 0
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError, OverflowError):
        return 0
