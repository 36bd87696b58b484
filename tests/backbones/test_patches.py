"""What patches see and where they would stand, for every kind of layout, against the layout's own cells."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from probe.backbones.anyres import Geometry, Tiling
from probe.backbones.layout import NEWLINE_MODES, Clip, Plain, Tiled
from probe.backbones.patches import Patches, patches_of
from probe.errors import ProbeError

POOLS = (None, "bilinear", "average")


def geometry(tile: int, patch: int, pool: str | None, limit: int | None = None) -> Geometry:
    canvases = tuple((a * tile, b * tile) for a in range(1, 4) for b in range(1, 4))
    return Geometry(tile, patch, canvases, limit, pool)


def check(layout: Any, found: Patches) -> None:
    """Every patch belongs to the token that it is in, or to the nearest one where no token shows it.

    Which tokens there are to choose from is known: the base view's, or the others. The nearest of them is found by
    looking at all. A token's box is compared with those of the patches that its embedding is made of.
    """
    cells = layout.cells()
    assert found.box.shape[:2] == found.token.shape
    assert found.token.shape[0] == layout.views == len(found.base) == found.picture.shape[0]
    assert 0 <= int(found.token.min()) <= int(found.token.max()) < layout.count
    assert not cells.newline[found.token].any()
    assert torch.equal(cells.picture[found.token], found.picture[:, None].expand_as(found.token))
    middle = (found.box[..., :2] + found.box[..., 2:]) / 2
    for view, token in enumerate(found.token):
        choice = ~cells.newline & (cells.picture == found.picture[view]) & ((cells.view == cells.view[token[0]])
            if found.base[view] else cells.view > 0)  # fmt: skip
        assert choice[token].all()
        off = away(middle[view][:, None], cells.box[choice])
        torch.testing.assert_close(away(middle[view], cells.box[token]), off.amin(1), atol=1e-5, rtol=0)


def away(point: torch.Tensor, box: torch.Tensor) -> torch.Tensor:
    """How far a point is from a box along each axis, 0 inside: `(..., 2)`."""
    return torch.maximum(box[..., :2] - point, point - box[..., 2:]).clamp(min=0)


def check_embeddings(layout: Tiled, found: Patches) -> None:
    """What embeddings are made of: every patch given a channel of its own, the layout says it itself."""
    views, patches = found.token.shape
    channels = torch.eye(views * patches, dtype=torch.float64).unflatten(0, (views, patches))
    weight = layout.tokens(channels, channels.new_zeros(views * patches))  # token, patch
    most, named = weight.amax(0), weight[found.token.flatten(), torch.arange(views * patches)]
    assert (named >= most - 1e-9).all(), "the token that a patch has most weight in, if it has any in one"
    if layout.tiling.geometry.pool == "bilinear":
        return
    cells, box = layout.cells(), found.box.flatten(0, 1)
    for token in (~cells.newline).nonzero()[:, 0]:
        of = box[weight[token] > 0]
        hull = torch.cat([of[:, :2].amin(0), of[:, 2:].amax(0)])
        torch.testing.assert_close(cells.box[token], hull, atol=1e-5, rtol=0)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(20, 900), st.integers(20, 900), st.sampled_from([(48, 8), (50, 7), (56, 14)]),
    st.sampled_from(POOLS), st.sampled_from([None, 1, 2]),
)  # fmt: skip
@example(20, 31, (50, 7), "average", None)  # trimming takes away more than is padding
def test_tiles(width: int, height: int, sizes: tuple[int, int], pool: str | None, limit: int | None) -> None:
    layout = Tiled(Tiling(geometry(*sizes, pool, limit), width, height))
    found = patches_of(layout)
    if all(layout.tiling.shape):
        check(layout, found)
        if not layout.tiling.shrunk:
            check_embeddings(layout, found)
    assert found.base == (True, *[False] * (layout.views - 1))
    if pool is None:
        side = layout.tiling.geometry.side
        assert torch.equal(found.token[0], torch.arange(side * side))
        torch.testing.assert_close(found.box[0], layout.cells().box[: side * side])
    if pool is None and layout.tiling.trim == (0, 0) and not layout.tiling.shrunk:
        assert found.token.unique().shape[0] == found.token.numel(), "one to one"
        torch.testing.assert_close(layout.cells().box[found.token], found.box)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("size", [(30, 90), (64, 64), (100, 20)])
def test_squares(size: tuple[int, int], closed: bool, pool: str | None) -> None:
    layout = Plain(geometry(50, 7, pool), *size, closed)
    check(layout, patches_of(layout))
    assert patches_of(layout).base == (True,)


@pytest.mark.parametrize("newlines", NEWLINE_MODES)
@pytest.mark.parametrize("frames", [1, 3])
def test_clips(newlines: str, frames: int) -> None:
    layout = Clip(geometry(50, 7, None), frames, newlines)
    found = patches_of(layout)
    check(layout, found)
    assert found.base == (True,) * frames
    assert found.picture.tolist() == list(range(frames))


def test_other_layouts_are_not_known() -> None:
    with pytest.raises(ProbeError, match="nothing is known of the patches of a int"):
        patches_of(3)  # type: ignore[arg-type]
