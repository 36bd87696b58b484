"""Questions, templates and answers as text."""

from __future__ import annotations

import pytest

from probe.backbones import prompt as text
from probe.backbones.splice import IMAGE
from probe.errors import ProbeError


def test_ask():
    assert text.ask("Why?", 1, think=False) == "<image>\nWhy? /no_think"
    assert text.ask("Why?", 2, think=True) == "<image> <image>\nWhy? /think"
    assert text.ask("Why?", 0, think=True) == "Why?"
    assert text.ask("Is <image> like <image>?", 2, think=True) == "Is <image> like <image>?"
    assert text.ask("Is <image> like <image>?", 1, think=False) == "Is <image> like <image>?"


def test_places_and_pictures_must_agree():
    with pytest.raises(ProbeError, match="no picture is given"):
        text.ask("What is in <image>?", 0, think=False)
    with pytest.raises(ProbeError, match="2 pictures are given, but the question names 1 place"):
        text.ask("What is in <image>?", 2, think=False)


def test_first_ids_of_later_pieces_are_dropped_only_after_a_start_token():
    def encode(piece):
        return [ord(c) for c in piece]

    assert text.to_ids("ab<image>cd<image><image>e", encode, ord("a")) == [97, 98, IMAGE, 100, IMAGE, IMAGE]
    assert text.to_ids("ab<image>cd", encode, ord("x")) == [97, 98, IMAGE, 99, 100]
    assert text.to_ids("ab<image>cd", encode, None) == [97, 98, IMAGE, 99, 100]
    assert text.to_ids("<image>cd", encode, ord("c")) == [IMAGE, 99, 100]


def test_clean():
    assert text.clean(" Yes. ") == "Yes."
    assert text.clean("Yes..") == "Yes."
    assert text.clean(" Yes.") == "Yes"
    assert text.clean("3.5") == "3.5"
    assert text.clean("") == ""


def test_shared_prefix():
    assert text.shared_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert text.shared_prefix([1, 2], [1, 2, 4]) == 2
    assert text.shared_prefix([], [1]) == 0
