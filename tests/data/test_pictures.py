"""Several pictures on one sheet, and boxes that follow them there."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from probe.data.pictures import on_sheet, sheet_of, sheet_places

Sizes = st.lists(st.tuples(st.integers(1, 900), st.integers(1, 900)), min_size=1, max_size=12)


@given(Sizes)
def test_pictures_keep_their_shape_and_do_not_overlap(sizes: list[tuple[int, int]]) -> None:
    (wide, high), places = sheet_places(sizes)
    assert places.min() >= 0
    assert places.max() <= 1 + 1e-12
    for (width, height), (x0, y0, x1, y1) in zip(sizes, places, strict=True):
        assert (x1 - x0) * wide / ((y1 - y0) * high) == pytest.approx(width / height)
    for i, a in enumerate(places):
        for b in places[i + 1 :]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


@given(st.tuples(st.integers(1, 900), st.integers(1, 900)))
def test_one_picture_is_its_own_sheet(size: tuple[int, int]) -> None:
    box = np.array([[0.1, 0.2, 0.3, 0.4], [np.nan] * 4], np.float32)
    np.testing.assert_array_equal(on_sheet(box, np.zeros(2, int), [size]), box)


def test_a_box_frames_on_the_sheet_what_it_framed_in_its_picture() -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    images = []
    for i, colour in enumerate(colours):
        image = Image.new("RGB", (100 + 40 * i, 120 - 30 * i), (0, 0, 0))
        image.paste(colour, (image.width // 2, image.height // 4, image.width, image.height // 2))
        images.append(image)
    box = np.array([[0.5, 0.25, 1.0, 0.5]] * 3)
    moved = on_sheet(box, np.arange(3), [image.size for image in images])
    sheet = sheet_of(images, 600)
    assert max(sheet.size) == 600
    for colour, (x0, y0, x1, y1) in zip(colours, moved, strict=True):
        inside = np.asarray(sheet.crop((round(x0 * sheet.width) + 6, round(y0 * sheet.height) + 6,
                                        round(x1 * sheet.width) - 6, round(y1 * sheet.height) - 6)))  # fmt: skip
        assert np.abs(inside.astype(int) - colour).max() < 8


def test_a_small_picture_is_not_made_larger() -> None:
    assert sheet_of([Image.new("RGB", (40, 20))], 600).size == (40, 20)
    assert sheet_of([Image.new("RGB", (800, 400))], 600).size == (600, 300)
