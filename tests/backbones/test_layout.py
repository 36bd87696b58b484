"""What visual tokens are said to see, against pictures whose pixels say where they are."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from probe.backbones.anyres import POOLS, Geometry, Tiling, pinpoints_of
from probe.backbones.layout import NEWLINE_MODES, Clip, Plain, Tiled, pool
from probe.backbones.pixels import frame_views, padded_views, tiled_views
from probe.errors import ProbeError

TILE, PATCH = 60, 14
GEOMETRY = Geometry(TILE, PATCH, pinpoints_of("(1x1),...,(4x4)", TILE), 2)
NEWLINE = torch.full((3,), 99.0)


def where_am_i(width, height):
    """A picture whose red is x and whose green is y, as fractions."""
    x = np.broadcast_to((np.arange(width) + 0.5) / width * 255, (height, width))
    y = np.broadcast_to(((np.arange(height) + 0.5) / height * 255)[:, None], (height, width))
    blue = np.full((height, width), 255)
    return Image.fromarray(np.stack([x, y, blue], -1).round().astype(np.uint8), "RGB")


def patch_means(views):
    """What each patch sees on average, undoing the normalisation: `(views, patches, 3)`."""
    side = views.shape[-1] // PATCH * PATCH
    pooled = torch.nn.functional.avg_pool2d(views[..., :side, :side], PATCH)
    return (pooled * 0.5 + 0.5).flatten(2).transpose(1, 2)


def check_boxes(layout, views, slack):
    """The middle of every box is what its token sees, wherever the token sees nothing but the picture."""
    tokens, cells = layout.tokens(patch_means(views), NEWLINE), layout.cells()
    assert tokens.shape[0] == layout.count == cells.box.shape[0]
    assert (tokens == NEWLINE).all(-1).equal(cells.newline)
    assert cells.box.isnan().all(-1).equal(cells.newline)
    box = cells.box
    inside = (tokens[:, 2] > 0.995) & ~cells.newline
    middle = torch.stack([(box[:, 0] + box[:, 2]) / 2, (box[:, 1] + box[:, 3]) / 2], -1)
    size = torch.stack([box[:, 2] - box[:, 0], box[:, 3] - box[:, 1]], -1)
    off = (tokens[:, :2] - middle).abs()[inside]
    assert (off <= slack * size[inside] + 0.02).all()
    real = box[~cells.newline]
    assert ((real >= 0) & (real <= 1)).all()
    assert (real[:, 2:] >= real[:, :2]).all()
    return cells, inside


@settings(max_examples=40)
@given(st.integers(20, 260), st.integers(20, 260))
def test_boxes_of_tiles(width, height):
    tiling = Tiling(GEOMETRY, width, height)
    layout = Tiled(tiling)
    # A shrunk token blends at most the four patches around its centre, of which a seam may separate two.
    cells, inside = check_boxes(layout, tiled_views(where_am_i(width, height), tiling), 0.6)
    assert inside.sum() >= GEOMETRY.side**2
    rows, columns = tiling.shape
    base, grid = cells.box[: GEOMETRY.side**2], cells.box[GEOMETRY.side**2 :].reshape(rows, columns + 1, 4)
    assert base[0, 0] == 0
    assert base[-1, 3] == pytest.approx(GEOMETRY.seen / TILE)
    if rows and columns:
        # rows and columns of boxes do not overlap, and leave out only what no patch sees
        assert (grid[1:, 0, 1] >= grid[:-1, 0, 3] - 1e-6).all()
        assert (grid[0, 1:-1, 0] >= grid[0, :-2, 2] - 1e-6).all()


@settings(max_examples=40)
@given(st.integers(20, 260), st.integers(20, 260))
def test_views_of_tiles(width, height):
    """A token's view is the tile that its centre lies in."""
    tiling = Tiling(GEOMETRY, width, height)
    cells, side = Tiled(tiling).cells(), GEOMETRY.side
    assert (cells.view[: side**2] == 0).all()
    rows, columns = tiling.shape
    view = cells.view[side**2 :].reshape(rows, columns + 1).tolist()
    for r in range(rows):
        for c in range(columns):
            y = tiling.trim[0] + (r + 0.5) * tiling.trimmed[0] / rows
            x = tiling.trim[1] + (c + 0.5) * tiling.trimmed[1] / columns
            assert view[r][c] == 1 + int(y // side) * tiling.grid[0] + int(x // side)
        assert view[r][columns] == view[r][columns - 1]
    assert cells.view.max() < tiling.views


@settings(max_examples=30)
@given(st.integers(20, 260), st.integers(20, 260), st.sampled_from(POOLS))
def test_boxes_of_pooled_tiles(width, height, mode):
    """Five patches become three tokens (bilinear, blended from the two nearest), or two (the last patch unseen)."""
    geometry = Geometry(80, PATCH, pinpoints_of("(1x1),...,(3x3)", 80), pool=mode)
    assert (geometry.patches, geometry.side) == (5, {"bilinear": 3, "average": 2}[mode])
    tiling = Tiling(geometry, width, height)
    layout = Tiled(tiling)
    cells, inside = check_boxes(layout, tiled_views(where_am_i(width, height), tiling), 0.25)
    base = cells.box[: geometry.side**2]
    assert inside.sum() >= len(base)
    assert base[-1, 3] == pytest.approx(geometry.seen / 80)
    assert geometry.seen == {"bilinear": 70, "average": 56}[mode]


@pytest.mark.parametrize(("mode", "patch_rows"), [("bilinear", None), ("average", [[0, 1], [2, 3]])])
def test_pooling_is_bilinear_without_smoothing_or_of_whole_squares(mode, patch_rows):
    """Against weights written down from the rule, on random features."""
    geometry = Geometry(80, PATCH, (), pool=mode)
    features = torch.randn(2, 25, 3, dtype=torch.float64)
    weights = torch.zeros(geometry.side, 5, dtype=torch.float64)
    for i, row in enumerate(weights):
        if patch_rows:
            row[patch_rows[i]] = 0.5
        else:  # centres of both grids lie on one another; the two nearest patches count by their nearness
            centre = (i + 0.5) * 5 / 3 - 0.5
            row[int(centre)] = 1 - centre % 1
            row[min(int(centre) + 1, 4)] += centre % 1
    want = torch.einsum("ir,jc,vrcw->vijw", weights, weights, features.unflatten(1, (5, 5))).flatten(1, 2)
    torch.testing.assert_close(pool(features, geometry), want)


@pytest.mark.parametrize("size", [(60, 60), (200, 90), (90, 170), (33, 34)])
@pytest.mark.parametrize("closed", [False, True])
def test_boxes_of_padded_pictures(size, closed):
    layout = Plain(GEOMETRY, *size, closed)
    cells, inside = check_boxes(layout, padded_views([where_am_i(*size)], TILE), 0.1)
    assert bool(inside.any())
    assert cells.newline.sum() == closed
    area = (cells.box[:, 2] - cells.box[:, 0]) * (cells.box[:, 3] - cells.box[:, 1])
    assert (area[~inside & ~cells.newline] < area[inside].max()).all()


@pytest.mark.parametrize("mode", NEWLINE_MODES)
@pytest.mark.parametrize("frames", [1, 3])
def test_clips(mode, frames):
    clip = Clip(GEOMETRY, frames, mode)
    cells, _ = check_boxes(clip, frame_views([where_am_i(80, 50)] * frames, TILE), 0.5)
    n = math.ceil(GEOMETRY.side / 2)
    assert clip.side == n
    per_frame = {"grid": n * (n + 1), "frame": n * n + 1, "one_token": n * n, "no_token": n * n}[mode]
    expected = [i for i in range(frames) for _ in range(per_frame)] + [frames - 1] * (mode == "one_token")
    assert cells.picture.tolist() == expected == cells.view.tolist()


def test_unknown_newline_mode():
    with pytest.raises(ProbeError, match="one_token"):
        Clip(GEOMETRY, 1, "rows")


def test_extreme_strips_have_a_layout():
    for size in ((1, 4000), (4000, 1), (1, 1), (3, 2000)):
        layout = Tiled(Tiling(GEOMETRY, *size))
        tokens = layout.tokens(torch.zeros(layout.views, GEOMETRY.side**2, 3), NEWLINE)
        assert tokens.shape[0] == layout.count == layout.cells().box.shape[0]
