"""From rendered pictures to training batches: token ids of prompts and answers, cached features, curriculum.

Short batches pack eight look-up questions behind a picture, long batches three independently masked copies
of the one long answer. Questions of one sort all cost the same number of tokens, so a batch has no padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from probe.zoo.tokenizer import EOS, LLADA, PICTURE, SYSTEM_SENTENCE, Spelling
from probe.zoo.world import Item, Picture, ask, short_tasks

SHORT_ANSWER, LONG_ANSWER = 2, 48
PADDING_WEIGHT = 0.2


class Prompts:
    """Token ids exactly as inference sees them: the prompt string is cut at ``<image>`` and each piece is
    tokenised by itself; the first token of the second piece, the newline, is dropped (a quirk of the
    published code)."""

    def __init__(self, folder: str, spelling: Spelling = LLADA) -> None:
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        self.spelling = spelling
        self._cache: dict[tuple[str, str], list[int]] = {}
        self.opening = torch.tensor(self.pieces("")[0])
        self.mask, self.end, self.padding = (self.id(t) for t in (spelling.mask, spelling.end, spelling.padding))
        self.bos, self.eos = self.id(spelling.bos), self.id(EOS)
        self.suppressed = [self.id(t) for t in spelling.suppressed]

    def id(self, token: str) -> int:
        """The id of one token."""
        ids = self.tokenizer.convert_tokens_to_ids([token])
        assert isinstance(ids, list)
        return ids[0]

    def pieces(self, question: str, suffix: str | None = None) -> tuple[list[int], list[int]]:
        """Ids before and after the picture; without a `suffix`, with the usual one."""
        suffix = self.spelling.suffixes[0] if suffix is None else suffix
        messages = [
            {"role": "system", "content": SYSTEM_SENTENCE},
            {"role": "user", "content": f"{PICTURE}\n{question} {suffix}".rstrip()},
        ]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        before, after = (self.tokenizer(p, add_special_tokens=False).input_ids for p in str(text).split(PICTURE))
        return before, after[1:]

    def question(self, text: str, suffix: str | None = None) -> list[int]:
        """Ids of everything between the picture and the answer."""
        suffix = self.spelling.suffixes[0] if suffix is None else suffix
        key = (text, suffix)
        if key not in self._cache:
            self._cache[key] = self.pieces(text, suffix)[1]
        return self._cache[key]

    def answer(self, text: str, length: int) -> list[int]:
        """Answer tokens, the end of the turn, then padding up to ``length``."""
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        if len(ids) > length:
            raise ValueError(f"an answer of {len(ids)} tokens does not fit {length}: {text!r}")
        return [*ids, self.end, *[self.padding] * length][:length]

    def text(self, ids: Sequence[int]) -> str:
        """The answer up to its end of turn."""
        ids = list(ids)
        kept = ids[: ids.index(self.end)] if self.end in ids else ids
        return str(self.tokenizer.decode(kept, skip_special_tokens=True))


@dataclass
class Shelf:
    """Pictures of one sort with their cached features, bfloat16 (n, 5, 36, width)."""

    pictures: list[Picture]
    features: Tensor


@dataclass
class Batch:
    """``questions`` are ids, int64 (images, groups, tokens); ``wanted`` and ``weight`` (.., answer)."""

    features: Tensor
    questions: Tensor
    wanted: Tensor
    weight: Tensor

    def to(self, device: str) -> Batch:
        """The batch on a device, where the features of the shelves are already."""
        return Batch(self.features, *(x.to(device) for x in (self.questions, self.wanted, self.weight)))


class Maker:
    """Draws training batches from the shelves ``scene``, ``page`` and ``brief`` (pages of 1 or 2 lines)."""

    def __init__(self, prompts: Prompts, shelves: dict[str, Shelf], generator: torch.Generator) -> None:
        self.prompts, self.shelves, self.generator = prompts, shelves, generator

    def _integers(self, high: int, count: int) -> list[int]:
        return torch.randint(high, (count,), generator=self.generator).tolist()

    def _uniform(self) -> float:
        return torch.rand((), generator=self.generator).item()

    def draw(self, images: int, groups: int, long: bool, scenes: float, brief: float) -> Batch:
        """``scenes`` is the share of scenes, ``brief`` that of one- or two-line pages among the pages."""
        count_scenes = round(images * scenes)
        pictures, features = [], []
        for k in range(images):
            name = "scene" if k < count_scenes else ("brief" if self._uniform() < brief else "page")
            shelf = self.shelves[name]
            i = self._integers(len(shelf.pictures), 1)[0]
            pictures.append(shelf.pictures[i])
            features.append(shelf.features[i])
        asked = [self._long(p, groups) if long else self._short(p, groups) for p in pictures]
        wanted = torch.tensor([[a for _, a in rows] for rows in asked])
        ended = wanted.eq(self.prompts.end).cumsum(-1) > 0
        weight = torch.where(F.pad(ended[..., :-1], (1, 0)), PADDING_WEIGHT, 1.0)
        return Batch(torch.stack(features), torch.tensor([[q for q, _ in rows] for rows in asked]), wanted, weight)

    def _suffix(self) -> str:
        usual, *others = self.prompts.spelling.suffixes
        return others[0] if others and self._uniform() < 0.1 else usual

    def _long(self, picture: Picture, groups: int) -> list[tuple[list[int], list[int]]]:
        question = ask(picture, "describe" if picture.kind == "scene" else "read")
        answer = self.prompts.answer(question.answer, LONG_ANSWER)
        return [(self.prompts.question(question.text, self._suffix()), answer) for _ in range(groups)]

    def _short(self, picture: Picture, groups: int) -> list[tuple[list[int], list[int]]]:
        tasks = short_tasks(picture.kind)
        first = self._integers(len(tasks), 1)[0]  # else a picture with one question would always have the same
        about = [picture.items[i] for i in self._integers(len(picture.items), groups)]
        chosen: list[tuple[str, Item]] = [(tasks[(first + t) % len(tasks)], item) for t, item in enumerate(about)]
        questions = [ask(picture, task, item) for task, item in chosen]
        return [
            (self.prompts.question(q.text, self._suffix()), self.prompts.answer(q.answer, SHORT_ANSWER))
            for q in questions
        ]
