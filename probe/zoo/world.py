"""The synthetic world that the embedded miniature sees: rendered pictures, and questions with known answers.

Two kinds of picture, both 96 x 96 RGB:

* a *scene*: a 4 x 4 grid of 24-pixel cells, 5 to 12 of them holding a coloured shape, at least one per row;
* a *page*: 3 to 6 lines of two four-letter words, word 1 in the left half and word 2 in the right half.
  Pages of ``words`` use a small dictionary (128 words in 8 topics, most words of a page from one topic), so
  text predicts text; pages of ``codes`` use random letters, so only the picture tells.

Nothing straddles the middle lines x = 48 and y = 48: the vision tower reads the picture in 48-pixel tiles
and cannot see across their borders. Inside a half, offsets are random and not aligned with the tower's
8-pixel patches.

Every picture is a pure function of (kind, seed). Training draws its seeds from ``TRAIN_SEEDS``, evaluation
from ``EVAL_SEEDS``; the ranges are disjoint. This module knows nothing about models: it imports numpy and
Pillow only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from probe.zoo.drawing import CELL, glyph_mask, shade, shape_mask, soft_shadow

SIZE = 96
HALF = SIZE // 2
TRAIN_SEEDS = range(10_000_000)
EVAL_SEEDS = range(10_000_000, 11_000_000)

Kind = Literal["scene", "words", "codes"]
KINDS: tuple[Kind, ...] = ("scene", "words", "codes")

COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (216, 44, 48), "orange": (242, 138, 28), "yellow": (246, 212, 48), "green": (58, 166, 74),
    "cyan": (64, 196, 208), "blue": (44, 92, 204), "purple": (138, 66, 184), "pink": (244, 132, 186),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "diamond", "star", "ring", "cross", "heart")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
GRID = 4  # scene cells per side
LINES, WORDS_PER_LINE, WORD_LENGTH = 6, 2, 4  # the most that a page holds
COLUMNS = WORDS_PER_LINE * WORD_LENGTH

_CONSONANTS, _VOWELS = "BDFGKLMNPRSTVZ", "AEIOU"
_TOPICS, _WORDS_PER_TOPIC = 8, 16
# Pale and dark surfaces: top and bottom colour of a vertical gradient.
_SKIES = (
    ((250, 247, 240), (232, 226, 214)), ((240, 246, 252), (212, 226, 240)),
    ((246, 242, 252), (226, 220, 238)), ((242, 250, 242), (216, 232, 218)),
    ((46, 52, 70), (28, 32, 46)), ((40, 56, 58), (22, 34, 38)),
)  # fmt: skip
# desk, paper, ink
_STATIONERY = (
    ((186, 164, 138), (252, 249, 240), (52, 46, 60)), ((150, 168, 184), (250, 251, 253), (30, 52, 96)),
    ((168, 180, 156), (248, 250, 240), (40, 70, 52)), ((196, 172, 172), (253, 247, 244), (112, 36, 44)),
    ((92, 72, 56), (38, 62, 56), (236, 240, 228)), ((64, 68, 78), (30, 34, 46), (240, 226, 180)),
)  # fmt: skip
_LIGHT_STATIONERY = 4  # the first four; the others are a blackboard and a dark screen (a quarter of the pages)


def _dictionary() -> tuple[tuple[str, ...], ...]:
    """Eight topics of sixteen consonant-vowel-consonant-vowel words; the same on every machine."""
    rng = np.random.default_rng(20_511)
    words: list[str] = []
    while len(words) < _TOPICS * _WORDS_PER_TOPIC:
        c, v = rng.integers(0, len(_CONSONANTS), 2), rng.integers(0, len(_VOWELS), 2)
        word = _CONSONANTS[c[0]] + _VOWELS[v[0]] + _CONSONANTS[c[1]] + _VOWELS[v[1]]
        if word not in words:
            words.append(word)
    return tuple(tuple(words[i::_TOPICS]) for i in range(_TOPICS))


DICTIONARY = _dictionary()


@dataclass(frozen=True)
class Item:
    """One thing in a picture: what it is called, where it stands (zero-based), and its box in pixels."""

    names: tuple[str, ...]  # ("red", "circle") for a shape, ("B",) for a letter
    row: int
    column: int
    box: tuple[int, int, int, int]  # left, top, right, bottom; right and bottom exclusive


@dataclass(frozen=True)
class Picture:
    """A rendered picture with what is known about it. ``pixels`` is uint8 of shape (96, 96, 3)."""

    kind: Kind
    pixels: np.ndarray
    items: tuple[Item, ...]

    @property
    def image(self) -> Image.Image:
        """The pixels as a Pillow picture."""
        return Image.fromarray(self.pixels)

    def at(self, row: int, column: int) -> Item | None:
        """The item at a zero-based place, if there is one."""
        return next((i for i in self.items if (i.row, i.column) == (row, column)), None)

    @property
    def transcript(self) -> str:
        """The long answer: a page's words in reading order, or a scene's objects row by row."""
        rows: dict[int, list[Item]] = {}
        for item in self.items:
            rows.setdefault(item.row, []).append(item)
        if self.kind == "scene":
            return "; ".join(", ".join(" ".join(i.names) for i in row) for row in rows.values())
        lines = ("".join(i.names[0] for i in row) for row in rows.values())
        return " ".join(line[k : k + WORD_LENGTH] for line in lines for k in range(0, len(line), WORD_LENGTH))


@dataclass(frozen=True)
class Question:
    """A question about one picture and its only right answer."""

    task: str
    text: str
    answer: str


def ask(picture: Picture, task: str, item: Item | None = None) -> Question:
    """A task's question: ``colour``, ``shape``, ``letter`` are about one item, the long ones about all."""
    if task in ("read", "describe"):
        return Question(task, "Read the page." if task == "read" else "Describe the scene.", picture.transcript)
    if item is None:
        raise ValueError(f"task {task!r} asks about one item; none was given")
    name = {"colour": 0, "shape": 1, "letter": 0}[task]
    row = "line" if task == "letter" else "row"
    text = f"What {task} is at {row} {item.row + 1}, column {item.column + 1}?"
    return Question(task, text, item.names[name])


def short_tasks(kind: Kind) -> tuple[str, ...]:
    """The look-up tasks that a kind of picture allows."""
    return ("colour", "shape") if kind == "scene" else ("letter",)


def draw(kind: Kind, seed: int, lines: tuple[int, int] = (3, LINES)) -> Picture:
    """Picture number ``seed`` of a kind. ``lines`` bounds the lines of a page (the curriculum lowers it)."""
    rng = np.random.default_rng([KINDS.index(kind), seed])
    return _scene(rng) if kind == "scene" else _page(rng, kind, lines)


def _gradient(top: tuple[int, int, int], bottom: tuple[int, int, int], height: int) -> np.ndarray:
    t = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    return np.asarray(top, np.float32) * (1 - t) + np.asarray(bottom, np.float32) * t


def _finish(rng: np.random.Generator, canvas: np.ndarray, grain: float) -> np.ndarray:
    noise = rng.standard_normal((SIZE, SIZE, 1), dtype=np.float32) * grain
    return np.clip(np.rint(canvas + noise), 0, 255).astype(np.uint8)


def _moved(mask: np.ndarray, dx: int, dy: int) -> np.ndarray:
    """The mask moved right and down; what leaves the cell is lost, so nothing reaches a neighbouring cell."""
    padded = np.pad(mask, 2)
    return padded[2 - dy : 2 - dy + CELL, 2 - dx : 2 - dx + CELL]


def _scene(rng: np.random.Generator) -> Picture:
    top, bottom = _SKIES[rng.integers(len(_SKIES))]
    canvas = np.broadcast_to(_gradient(top, bottom, SIZE), (SIZE, SIZE, 3)).copy()
    count = int(rng.integers(5, 13))
    cells = {(r, int(rng.integers(GRID))) for r in range(GRID)}  # at least one object in every row
    rest = [(r, c) for r in range(GRID) for c in range(GRID) if (r, c) not in cells]
    cells |= {rest[i] for i in rng.permutation(len(rest))[: count - GRID]}
    names = tuple(COLOURS)
    items = []
    for row, column in sorted(cells):
        colour, shape = names[rng.integers(len(names))], SHAPES[rng.integers(len(SHAPES))]
        size = int(rng.integers(14, 21))
        dx, dy = (int(v) for v in rng.integers(-2, 3, 2))
        tint = np.clip(np.asarray(COLOURS[colour], np.float32) + rng.uniform(-9, 9, 3), 0, 255).astype(np.float32)
        mask, shadow = (_moved(m(shape, size), dx, dy) for m in (shape_mask, soft_shadow))
        x, y = column * CELL, row * CELL
        cell = canvas[y : y + CELL, x : x + CELL]
        cell *= 1 - 0.28 * shadow[..., None]
        cell += mask[..., None] * (shade(tint) - cell)
        left, up = x + (CELL - size) // 2 + dx, y + (CELL - size) // 2 + dy
        items.append(Item((colour, shape), row, column, (left, up, left + size, up + size)))
    return Picture("scene", _finish(rng, canvas, 1.5), tuple(items))


def _text(rng: np.random.Generator, kind: Kind, lines: int) -> list[str]:
    if kind == "codes":
        return ["".join(LETTERS[i] for i in rng.integers(0, 26, COLUMNS)) for _ in range(lines)]
    topic = int(rng.integers(_TOPICS))
    drawn = []
    for _ in range(lines * WORDS_PER_LINE):
        from_topic = topic if rng.random() < 0.8 else int(rng.integers(_TOPICS))
        drawn.append(DICTIONARY[from_topic][rng.integers(_WORDS_PER_TOPIC)])
    return ["".join(drawn[i : i + WORDS_PER_LINE]) for i in range(0, len(drawn), WORDS_PER_LINE)]


def _page(rng: np.random.Generator, kind: Kind, lines: tuple[int, int]) -> Picture:
    text = _text(rng, kind, int(rng.integers(lines[0], lines[1] + 1)))
    dark = rng.random() < 0.25
    choice = rng.integers(_LIGHT_STATIONERY, len(_STATIONERY)) if dark else rng.integers(_LIGHT_STATIONERY)
    desk, paper, ink = (np.asarray(c, np.float32) for c in _STATIONERY[choice])
    canvas = np.broadcast_to(desk, (SIZE, SIZE, 3)).copy()
    canvas[4:95, 4:95] *= 0.82  # the sheet's shadow on the desk
    sheet = canvas[2:93, 2:93]
    sheet[:] = paper + np.linspace(2, -5, 91, dtype=np.float32)[:, None, None]
    # Two pitches, and offsets that keep lines 1-3 above the middle, 4-6 below it, and all on the sheet.
    pitch = int(rng.integers(14, 16))
    top = int(rng.integers(6, 12)) if pitch == 14 else int(rng.integers(5, 10))
    advance = int(rng.integers(9, 11))
    width = advance * (WORD_LENGTH - 1) + 6
    lefts = [int(rng.integers(5, HALF - width - 1)), HALF + int(rng.integers(2, HALF - width - 4))]
    faint = paper + 0.14 * (ink - paper)
    for line in range(LINES):  # ruled paper: a faint rule under every line, written or not
        y = top + line * pitch + 10
        if y < 92:
            canvas[y, 5:90] = faint
    items = []
    for line, letters in enumerate(text):
        for column, letter in enumerate(letters):
            word, place = divmod(column, WORD_LENGTH)
            x, y = lefts[word] + place * advance, top + line * pitch
            mask = glyph_mask(letter)
            h, w = mask.shape
            area = canvas[y : y + h, x : x + w]
            area += mask[..., None] * (ink - area)
            items.append(Item((letter,), line, column, (x, y, x + w, y + h)))
    return Picture(kind, _finish(rng, canvas, 1.2), tuple(items))
