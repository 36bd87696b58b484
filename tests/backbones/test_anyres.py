"""Tile layouts against a brute force that was written from the rules, and the published table of counts."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probe.backbones.anyres import (
    Geometry,
    Tiling,
    best_canvas,
    fitted,
    geometry_of,
    padding_of,
    pinpoints_of,
)
from probe.backbones.llada_v_config import published_geometry, visual_token_count
from probe.backbones.tiled_config import count_visual
from probe.errors import ProbeError

SIDES = st.integers(1, 4000)
SIZES = st.tuples(SIDES, SIDES)


@pytest.mark.parametrize(
    ("size", "grid", "shape", "tokens"),
    [
        ((224, 224), (1, 1), (27, 27), 1485),
        ((384, 384), (1, 1), (27, 27), 1485),
        ((500, 375), (2, 1), (27, 36), 1728),
        ((512, 512), (2, 2), (54, 54), 3699),
        ((640, 480), (2, 2), (40, 54), 2929),
        ((480, 640), (2, 2), (54, 40), 2943),
        ((800, 600), (3, 2), (46, 62), 3627),
        ((4000, 3000), (6, 5), (46, 62), 3627),
        ((1024, 1024), (3, 3), (54, 54), 3699),
        ((1920, 1080), (5, 3), (40, 72), 3649),
        ((850, 1100), (3, 3), (61, 47), 3657),
        ((1700, 2200), (5, 6), (61, 47), 3657),
        ((1000, 300), (3, 1), (25, 81), 2779),
        ((328, 1576), None, None, 4341),
    ],
)
def test_published_sizes(size, grid, shape, tokens):
    tiling = Tiling(published_geometry(), *size)
    assert tiling.count == tokens
    assert grid is None or tiling.grid == grid
    assert shape is None or tiling.shape == shape


def brute_best(width, height, canvases):
    """All candidates sorted by what they show, then by what they waste, then by their place in the list."""

    def key(indexed):
        index, (across, down) = indexed
        scale = min(across / width, down / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return (-shown, across * down - shown, index)

    return min(enumerate(canvases), key=key)[1]


@given(
    SIZES,
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=36),
    st.integers(14, 400),
)
def test_best_canvas(size, grids, tile):
    canvases = [(a * tile, b * tile) for a, b in grids]
    assert best_canvas(*size, canvases) == brute_best(*size, canvases)


@given(SIZES, SIZES)
def test_fitted_picture_touches_the_canvas_and_keeps_its_shape(size, canvas):
    width, height = fitted(*size, *canvas)
    assert width == canvas[0] or height == canvas[1]
    assert 1 <= width <= canvas[0]
    assert 1 <= height <= canvas[1]
    scale = min(Fraction(canvas[0], size[0]), Fraction(canvas[1], size[1]))
    for got, side in ((width, size[0]), (height, size[1])):
        assert abs(got - side * scale) <= 1 + Fraction(1, 10**6)


@given(st.integers(1, 200), st.integers(1, 200), SIZES)
def test_padding_leaves_the_picture(rows, columns, size):
    top, left = padding_of(rows, columns, *size)
    assert top == 0 or left == 0
    kept_rows, kept_columns = rows - 2 * top, columns - 2 * left
    assert 0 <= kept_rows <= rows
    assert 0 <= kept_columns <= columns
    wide = Fraction(*size) > Fraction(columns, rows)
    exact = Fraction(size[1], size[0]) * columns if wide else Fraction(size[0], size[1]) * rows
    kept = kept_rows if wide else kept_columns
    assert exact - 1 - Fraction(1, 10**6) <= kept <= exact + 1


@given(SIZES, st.sampled_from([None, 1, 2, 4, 9]), st.integers(1, 30))
def test_counts(size, limit, side):
    """The count by building the map row by row, and the bound that the limit gives."""
    geometry = Geometry(14 * side, 14, pinpoints_of("(1x1),...,(6x6)", 14 * side), limit)
    tiling = Tiling(geometry, *size)
    rows, columns = tiling.shape
    assert tiling.count == side * side + sum(columns + 1 for _ in range(rows))
    trimmed = tiling.trimmed[0] * tiling.trimmed[1]
    if limit is None:
        assert not tiling.shrunk
    else:
        assert rows * columns <= max(1.21 * limit * side * side, 1)
        assert tiling.shrunk == (math.sqrt(trimmed / (limit * side * side)) > 1.1)
    if not tiling.shrunk:
        assert (rows, columns) == tiling.trimmed


def test_range_of_published_counts():
    geometry = published_geometry()
    counts = [Tiling(geometry, w, h).count for w in range(16, 3201, 96) for h in range(16, 3201, 96)]
    assert min(counts) >= 729 + 28
    assert max(counts) <= 4341


def test_several_pictures_are_squares():
    geometry = published_geometry()
    assert count_visual([(640, 480)], geometry) == 2929
    assert count_visual([(640, 480), (10, 20), (30, 30)], geometry) == 3 * 729
    assert count_visual([], geometry) == 0


def test_pinpoints():
    listed = pinpoints_of([[30, 60], [60, 30]], 30)
    assert listed == ((30, 60), (60, 30))
    assert pinpoints_of("[(30, 60), (60, 30)]", 30) == pinpoints_of("[[30, 60],[60, 30]]", 30) == listed
    assert pinpoints_of("(1x1),...,(2x2)", 10) == ((10, 10), (10, 20), (20, 10), (20, 20))
    for wrong in (None, 7, "all", [[1, 2, 3]]):
        with pytest.raises(ProbeError, match="image_grid_pinpoints"):
            pinpoints_of(wrong, 10)


def test_aspect_ratios():
    points = {"image_grid_pinpoints": "(1x1),...,(2x2)"}
    assert geometry_of({"image_aspect_ratio": "anyres_max_9", **points}, tile=28, patch=14).limit == 9
    assert geometry_of({"image_aspect_ratio": "anyres", **points}, tile=28, patch=14).limit is None
    assert geometry_of({"image_aspect_ratio": "pad"}, tile=28, patch=14).pinpoints == ()
    assert geometry_of({"image_aspect_ratio": "pad"}, tile=28, patch=14, pool="average").side == 1
    with pytest.raises(ProbeError, match="is 'max'; supported: bilinear, average"):
        geometry_of({"image_aspect_ratio": "pad"}, tile=28, patch=14, pool="max")
    with pytest.raises(ProbeError, match="anyres_max_N"):
        geometry_of({"image_aspect_ratio": "square"}, tile=28, patch=14)
    with pytest.raises(ProbeError, match="multiple of the tile"):
        geometry_of({"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[28, 30]]}, tile=28, patch=14)


def test_count_from_a_config():
    config = {
        "mm_vision_tower": "google/siglip2-so400m-patch14-384",
        "image_aspect_ratio": "anyres_max_4",
        "image_grid_pinpoints": "(1x1),...,(6x6)",
    }
    assert visual_token_count(640, 480, config) == 2929
    with pytest.raises(ProbeError, match=r"vision_config.json"):
        visual_token_count(640, 480, {**config, "mm_vision_tower": "clip"})
    with pytest.raises(ProbeError, match="mm_patch_merge_type"):
        visual_token_count(640, 480, {**config, "mm_patch_merge_type": "flat"})
