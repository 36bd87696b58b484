"""Prompt strings and the pieces around pictures against the original's."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from probe.backbones import prompt as text
from probe.backbones.splice import IMAGE


def conversations(root: Path) -> Iterator[tuple[str, Any]]:
    for path in sorted(root.glob("prompt*/prompts.json")):
        table = json.loads(path.read_text(encoding="utf-8"))
        for i, item in enumerate(table["items"]):
            yield f"{path.parent.name}{i}", (table, item)


class StandIn:
    """A tokenizer of characters, in which every `<|...|>` is one token."""

    def __init__(self, adds_bos: bool) -> None:
        self.adds_bos = adds_bos
        self.tokens: list[str] = [text.START]

    def encode(self, string: str) -> list[int]:
        parts = re.findall(r"<\|.*?\|>|.", string, re.DOTALL)
        self.tokens += [p for p in dict.fromkeys(parts) if p not in self.tokens]
        return [0] * self.adds_bos + [self.tokens.index(p) for p in parts]

    def show(self, ids: list[int]) -> list[str]:
        """Pieces as the fixtures write them; there is an empty one between two neighbouring pictures."""
        pieces: list[str] = []
        for is_image, run in groupby(ids, lambda i: i == IMAGE):
            if is_image:
                marks = [f"<IMAGE:{i}>" for i in run]
                pieces += [part for mark in marks for part in (mark, "")][:-1]
            else:
                pieces.append("".join(self.tokens[i] for i in run))
        return pieces


def chat(table: dict[str, Any], item: dict[str, Any]) -> list[text.Message]:
    roles = table.get("roles", ["user", "assistant"])
    return text.messages([(roles[who], said) for who, said in item["turns"] if said is not None])


@pytest.mark.cases("llada_v", conversations)
def test_prompt(case: Any) -> None:
    table, item = case
    assert table.get("system_prompt", text.SYSTEM) == text.SYSTEM
    assert table.get("sep", text.END) == text.END
    assert text.render(chat(table, item)) == item["prompt"]


@pytest.mark.cases("llada_v", conversations)
@pytest.mark.parametrize("adds_bos", [False, True])
def test_pieces(case: Any, adds_bos: bool) -> None:
    _, item = case
    key = f"pieces_when_tokenizer_adds_{'bos' if adds_bos else 'no_bos'}"
    if key not in item:
        pytest.skip(f"no {key}")
    tokenizer = StandIn(adds_bos)
    got = tokenizer.show(text.to_ids(item["prompt"], tokenizer.encode, 0))
    assert [p for p in got if p] == [p for p in item[key] if p]


@pytest.mark.cases("llada_v", conversations)
def test_question_is_asked_as_in_the_evaluation(case: Any) -> None:
    """The user's text is rebuilt from the bare question, the number of pictures and the suffix."""
    _, item = case
    who, said = item["turns"][0]
    match = re.fullmatch(r"((?:<image> )*<image>)\n(.*) (/no_think|/think)", said, re.DOTALL)
    if who != 0 or not match:
        pytest.skip("the first turn is no evaluation question")
    places, question, suffix = match.groups()
    assert text.ask(question, places.count(text.PLACE), think=suffix == "/think") == said
