"""The world is deterministic, its seeds are apart, and its layout keeps what the vision tower relies on."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from probe.zoo.drawing import glyph_mask, shape_mask
from probe.zoo.world import DICTIONARY, EVAL_SEEDS, HALF, KINDS, LETTERS, SHAPES, SIZE, TRAIN_SEEDS, ask, draw


def test_training_and_evaluation_seeds_are_disjoint() -> None:
    assert max(TRAIN_SEEDS) < min(EVAL_SEEDS)
    assert len(EVAL_SEEDS) >= 100_000


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_a_function_of_kind_and_seed(kind: str) -> None:
    first, again, other = draw(kind, 5), draw(kind, 5), draw(kind, 6)
    assert np.array_equal(first.pixels, again.pixels)
    assert first.items == again.items
    assert not np.array_equal(first.pixels, other.pixels)


def test_the_pixels_are_the_same_on_every_machine() -> None:
    """A fingerprint taken once; it may change only together with the shipped weights."""
    digest = hashlib.sha256()
    for kind in KINDS:
        for seed in range(20):
            digest.update(draw(kind, EVAL_SEEDS[seed]).pixels.tobytes())
    assert digest.hexdigest()[:16] == "d940ae79b660b942"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(40))
def test_nothing_straddles_the_middle_lines_or_leaves_the_picture(kind: str, seed: int) -> None:
    for item in draw(kind, seed).items:
        left, top, right, bottom = item.box
        assert 0 <= left < right <= SIZE
        assert 0 <= top < bottom <= SIZE
        assert right <= HALF or left >= HALF
        assert bottom <= HALF or top >= HALF


@pytest.mark.parametrize("seed", range(40))
def test_a_page_has_two_four_letter_words_per_line(seed: int) -> None:
    page = draw("words", seed)
    words = page.transcript.split()
    lines = len(words) // 2
    assert 3 <= lines <= 6
    assert len(words) == 2 * lines
    assert all(w in {d for topic in DICTIONARY for d in topic} for w in words)
    assert page.at(1, 4).names[0] == words[3][0]  # line 2, column 5 opens the second word of the second line
    halves = {(i.column < 4) == (i.box[2] <= HALF) for i in page.items}
    assert halves == {True}


@pytest.mark.parametrize("seed", range(40))
def test_every_row_of_a_scene_holds_something(seed: int) -> None:
    scene = draw("scene", seed)
    assert {i.row for i in scene.items} == {0, 1, 2, 3}
    assert 5 <= len(scene.items) <= 12
    assert scene.transcript.count(";") == 3
    for item in scene.items:
        assert (item.box[0] // 24, item.box[1] // 24) == (item.column, item.row)


def test_objects_have_the_colour_they_are_named_after() -> None:
    for seed in range(10):
        scene = draw("scene", seed)
        for item in scene.items:
            if item.names == ("red", "square"):
                middle = scene.pixels[(item.box[1] + item.box[3]) // 2, (item.box[0] + item.box[2]) // 2].astype(int)
                assert middle[0] > middle[1] + 80
                assert middle[0] > middle[2] + 80


def test_questions_name_rows_and_columns_from_one() -> None:
    scene = draw("scene", 3)
    item = scene.items[-1]
    question = ask(scene, "shape", item)
    assert question.text == f"What shape is at row {item.row + 1}, column {item.column + 1}?"
    assert question.answer == item.names[1]
    with pytest.raises(ValueError, match="one item"):
        ask(scene, "colour")


def test_letters_and_shapes_can_be_told_apart() -> None:
    """Nearest other form by mean absolute difference; alike forms would make the tasks unanswerable."""
    for forms, least in (
        ([glyph_mask(c) for c in LETTERS], 0.02),
        ([shape_mask(s, 14) for s in SHAPES], 0.02),
    ):
        for i, a in enumerate(forms):
            assert min(np.abs(a - b).mean() for j, b in enumerate(forms) if j != i) > least
