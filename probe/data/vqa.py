"""VQA accuracy, with texts made alike as the VQA challenge makes them: numbers, articles, apostrophes, marks."""

from __future__ import annotations

import re
from collections.abc import Sequence

from probe.data.strings import known

_NUMBERS = {
    word: str(value)
    for value, words in enumerate(
        ("none zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
    for word in words.split()
}
_ARTICLES = {"a", "an", "the"}
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_APOSTROPHES = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't
    it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
    somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's
    they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's
    where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
    couldn't've hadn't've he'd've it'd've mightn't've 'ow's'at she'd've shouldn't've somebody'd've someone'd've
    something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've
"""


def _one_missing(word: str) -> list[str]:
    """The word with one of its apostrophes left out."""
    return [word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'"]


_RESTORED = {short: word for word in _APOSTROPHES.split() for short in _one_missing(word)}
_RESTORED["somebody'd"] = "somebodyd"  # the other way round in the challenge's list


def normalised(text: str) -> str:
    """A text as VQA accuracy compares it.

    Lower case; ``'s`` becomes a word; numbers up to ten in digits; no articles; a left-out apostrophe back in its
    place. A mark is taken out if a blank stands beside it anywhere (or if a comma groups digits), else it becomes a
    blank. The first 32 full stops that no digit follows are taken out.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    grouped = re.search(r"(?<=\d),+(?=\d)", text) is not None
    out = text
    for mark in _MARKS:
        loose = grouped or f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if loose else " ")
    out = re.sub(r"\.(?!\d)", "", out, count=32)  # the challenge passes a flag, 32, where the count belongs
    words = [_NUMBERS.get(word, word) for word in out.lower().split()]
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """TextVQA, VQAv2: mean over the annotators of min(1, number of the others who say the same / 3).

    Three equal answers of ten make a prediction right. A single reference leaves nobody to agree: the score is 0.
    """
    known(answers)
    said = normalised(prediction.strip())
    votes = [normalised(answer) == said for answer in answers]
    return sum(min(1.0, (sum(votes) - own) / 3) for own in votes) / len(votes)
