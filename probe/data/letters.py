"""Multiple choice: which option a text means, by the rules of the benchmarks. Standard library only."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from itertools import product

from probe.data.strings import best

_PHRASES = [
    *("".join(p) for p in product(("", "the "), ("", "correct ", "best "), ("answer is",))),
    *("".join(p) for p in product(("", "the "), ("correct ", "best "), ("option is",))),
    *("".join(p) for p in product(("", "the "), ("", "correct "), ("choice is",))),
    *("i choose", "i select", "i pick", "my answer is", "my choice is"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
]
"""Words after which the harness expects an option's letter."""
_WRITTEN = (("({})", 6), ("{}.", 5), ("{}:", 4), ("{})", 3), ("{} ", 2))
"""Ways to write a letter, and how much each is trusted."""
_AROUND = ("{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})", ":{}).")
"""Marks around a lone letter, in the order in which MMBench looks for them."""


def option_letter(prediction: str, answers: Sequence[str]) -> float:
    """ScienceQA: the text is the letter in either case, or begins with a capital and a full stop, and it is that."""
    text = prediction.strip()

    def score(p: str, a: str) -> float:
        wanted = a.strip().lower()
        begins = len(p) >= 2 and p[0].isupper() and p[1] == "."
        return float(p.lower() == wanted or (begins and p[0].lower() == wanted))

    return best(score, text, answers)


def letter_only(prediction: str, answers: Sequence[str]) -> float:
    """MMMU-Pro with the question in the picture: the whole text is the letter."""
    return best(lambda p, a: float(p == a), prediction.strip(), answers)


def found_letter(text: str, letters: Sequence[str] = "ABCD") -> str:
    """The option's letter in a free text, ``""`` if there is none: of the best trusted ways to write it the last.

    From most to least trusted: at the beginning or at the end with no letter beside it, after words such as ``the
    answer is``, ``(A)``, ``A.``, ``A:``, ``A)``, ``A`` before a blank; if none of these occurs, anywhere.
    """
    text = text.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    bare, text = text.strip(), f" {text} "
    seen: list[tuple[int, int, str]] = []  # trust, place, letter
    for (form, trust), letter in product(_WRITTEN, letters):
        if form.format(letter) in text:
            seen.append((trust, text.rfind(form.format(letter)), letter))
    lower = text.lower()
    for phrase in _PHRASES:
        if phrase in lower:
            after = lower.find(phrase) + len(phrase)
            seen += [(7, text.find(letter, after), letter) for letter in letters if text.find(letter, after) >= 0]
    for letter in letters:
        if bare.startswith(letter) and not bare[1:2].isalpha():
            seen.append((10, 0, letter))
        if bare.endswith(letter) and not bare[-2:-1].isalpha():
            seen.append((9, len(text) - 1, letter))
    seen = seen or [(0, text.rfind(letter), letter) for letter in letters if letter in text]
    return max(seen, key=lambda found: found[:2])[2] if seen else ""


def option_search(prediction: str, answers: Sequence[str]) -> float:
    """Video-MME: the letter from A to D that :func:`found_letter` finds, without case."""
    letter = found_letter(prediction)
    return best(lambda _, a: float(letter.lower() == a.lower()), prediction, answers)


def lone_letter(text: str, options: Mapping[str, str]) -> str:
    """MMBench's first look: the only letter from A to E that stands alone, else the only option that is quoted.

    A lone ``A`` in a text of more than three words may be an article and is passed over. Marks may stand around a
    letter. `options` are texts by letter. ``""`` where neither look finds exactly one.
    """
    words = text.split()
    letters = string.ascii_uppercase[:5]
    alone = [letter for letter in letters if letter in words]
    if len(alone) == 1 and not ("A" in words and len(words) > 3):
        return alone[0]
    for form in _AROUND:
        marked = [letter for letter in letters if form.format(letter) in words]
        if len(marked) == 1:
            return marked[0]
    quoted = [letter for letter, option in options.items() if str(option).lower() in text.lower()]
    return quoted[0] if len(quoted) == 1 else ""


def option_of(text: str, options: Mapping[str, str]) -> str:
    """MMBench without a judge: :func:`lone_letter`, else :func:`found_letter` among the options; ``""`` for none."""
    return lone_letter(text, options) or found_letter(text, sorted(options))
