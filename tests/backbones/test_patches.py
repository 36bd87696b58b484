"""What patches see and where they would stand, for every kind of layout, against the layout's own cells."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
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
    """Every patch that is seen lies in the token that it is said to belong to, or next to it where patches end."""
    cells = layout.cells()
    assert found.box.shape[:2] == found.token.shape
    assert found.token.shape[0] == layout.views == len(found.base) == found.picture.shape[0]
    assert 0 <= int(found.token.min()) <= int(found.token.max()) < layout.count
    assert not cells.newline[found.token].any()
    assert torch.equal(cells.picture[found.token], found.picture[:, None].expand_as(found.token))
    middle = (found.box[..., :2] + found.box[..., 2:]) / 2
    token = cells.box[found.token]
    size = found.box[..., 2:] - found.box[..., :2]
    off = torch.maximum(token[..., :2] - middle, middle - token[..., 2:]).clamp(min=0)
    seen = (size > 1e-6).all(-1) & ((token[..., 2:] - token[..., :2]) > 1e-6).all(-1)
    assert (off[seen] <= 1.01 * size[seen].amax(0)).all()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(20, 900), st.integers(20, 900), st.sampled_from([(48, 8), (50, 7), (56, 14)]),
    st.sampled_from(POOLS), st.sampled_from([None, 1, 2]),
)  # fmt: skip
@pytest.mark.slow
def test_tiles(width: int, height: int, sizes: tuple[int, int], pool: str | None, limit: int | None) -> None:
    layout = Tiled(Tiling(geometry(*sizes, pool, limit), width, height))
    found = patches_of(layout)
    if all(layout.tiling.shape):
        check(layout, found)
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
