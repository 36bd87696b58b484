"""Tiles, trimming, shrinking, newlines and coordinates against the original's, from picture sizes alone."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from probe.backbones.anyres import Geometry, Tiling
from probe.backbones.layout import Clip, Layout, Plain, Tiled
from probe.backbones.splice import IMAGE, splice
from probe.backbones.tiled_config import count_visual

NEWLINE = -7.0
"""Stands for the newline embedding in made-up features."""
COUNT_WORDS = {"one": 1, "two": 2, "three": 3, "four": 4}


def read(root: Path) -> Iterator[tuple[dict[str, Any], Path]]:
    for path in sorted(root.glob("anyres*/layout.json")):
        yield json.loads(path.read_text(encoding="utf-8")), path.parent


def geometry_of(table: dict[str, Any]) -> Geometry:
    """The geometry that a layout file describes in words: all grids up to 6 x 6 unless it lists canvases."""
    given = table["geometry"]
    tile, points = given["tile"], given.get("grid_pinpoints")
    if not isinstance(points, list):
        points = [(i * tile, j * tile) for i in range(1, 7) for j in range(1, 7)]
    limit = given.get("image_aspect_ratio", "anyres_max_4").rpartition("_")[2]
    return Geometry(tile, given["patch"], tuple(map(tuple, points)), int(limit) if limit.isdigit() else None)


def pictures(root: Path) -> Iterator[tuple[str, Any]]:
    for table, _ in read(root):
        for row in table.get("images", []):
            yield "{}x{}".format(*row["size_wh"]), (geometry_of(table), row)


def coordinates(root: Path) -> Iterator[tuple[str, Any]]:
    for table, folder in read(root):
        if (folder / "coords.safetensors").is_file():
            stored = load_file(folder / "coords.safetensors")
            for name in sorted({k.split(".")[0] for k in stored}):
                axes = {k: stored[f"{name}.{k}"] for k in ("row_coord", "col_coord") if f"{name}.{k}" in stored}
                yield name, (geometry_of(table), tuple(map(int, name.split("x"))), axes)


def others(*kinds: str) -> Any:
    def find(root: Path) -> Iterator[tuple[str, Any]]:
        for table, _ in read(root):
            for i, row in enumerate(table.get("other", [])):
                if any(kind in row["kind"] for kind in kinds):
                    yield f"{i}-{row['kind']}", (geometry_of(table), row)

    return find


def ramp(geometry: Geometry, views: int) -> Tensor:
    """Features that say where they are: `(views, patches, 3)`: view, row and column within the view."""
    side = geometry.side
    view, row, column = torch.meshgrid(torch.arange(views), torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([view, row, column], -1).flatten(1, 2).double()


def lay(layout: Layout, features: Tensor) -> Tensor:
    return layout.tokens(features, torch.full((features.shape[-1],), NEWLINE, dtype=features.dtype))


def newline_positions(layout: Layout, tokens: Tensor) -> list[int]:
    """Where newlines are, by the tokens; the layout's own description must say the same."""
    positions: list[int] = (tokens == NEWLINE).all(-1).nonzero().flatten().tolist()
    assert layout.cells().newline.nonzero().flatten().tolist() == positions
    return positions


@pytest.mark.cases("llada_v", pictures)
def test_picture(case: Any) -> None:
    geometry, row = case
    tiling = Tiling(geometry, *row["size_wh"])
    found: dict[str, Any] = {
        "best_resolution_wh": list(tiling.canvas),
        "grid_wh": list(tiling.grid),
        "tiles_incl_base": tiling.views,
        "pasted_box_x0y0x1y1": list(tiling.pasted),
        "unpadded_rows_cols": list(tiling.trimmed),
        "interpolated": tiling.shrunk,
        "final_rows_cols": list(tiling.shape),
        "n_visual_tokens": tiling.count,
        "base_tokens": geometry.side**2,
    }
    assert {k: v for k, v in found.items() if k in row} == {k: row[k] for k in found if k in row}
    if "times" in row:
        assert tiling.excess == pytest.approx(row["times"], abs=1e-9)
    assert count_visual([row["size_wh"]], geometry) == row["n_visual_tokens"]
    layout = Tiled(tiling)
    tokens = lay(layout, ramp(geometry, layout.views))
    assert tokens.shape[0] == layout.count
    if "newline_positions" in row:
        assert newline_positions(layout, tokens) == row["newline_positions"]


@pytest.mark.cases("llada_v", coordinates)
def test_coordinates(case: Any, near: Any) -> None:
    """Every token of the tiled part stands where the original's did, by its features and its description."""
    geometry, size, axes = case
    tiling = Tiling(geometry, *size)
    layout, side = Tiled(tiling), geometry.side
    features = ramp(geometry, layout.views)
    tile = (torch.arange(layout.views) - 1).double()[:, None]
    features[..., 1] += torch.div(tile, tiling.grid[0], rounding_mode="floor") * side
    features[..., 2] += tile % tiling.grid[0] * side
    rows, columns = tiling.shape
    tokens = lay(layout, features)[side**2 :].reshape(rows, columns + 1, 3)[:, :-1]
    described = dict(zip(("row_coord", "col_coord"), layout.coordinates(), strict=True))
    for channel, (name, lines) in enumerate((("row_coord", tokens), ("col_coord", tokens.transpose(0, 1)))):
        if name in axes:
            near(lines[..., channel + 1], axes[name].double()[:, None].expand(*lines.shape[:2]), 1e-3)
            near(described[name], axes[name].double(), 1e-3)


@pytest.mark.cases("llada_v", others("video"), optional=True)
def test_clip(case: Any, near: Any) -> None:
    geometry, row = case
    clip = Clip(geometry, row["frames"], row["mm_newline_position"])
    tokens = lay(clip, ramp(geometry, clip.views))
    assert clip.count == tokens.shape[0] == row["n_visual_tokens"]
    positions = newline_positions(clip, tokens)
    if "newline_count" in row:
        assert len(positions) == row["newline_count"]
    if "newline_positions" in row:
        assert positions[: len(row["newline_positions"])] == row["newline_positions"]
    if "frame_index_of_tokens_209_210" in row:
        frames = clip.cells().picture[209:211].tolist()
        assert frames == row["frame_index_of_tokens_209_210"]
    if "pooled_row_coords" in row:
        grid = tokens[(tokens != NEWLINE).all(-1)][: clip.side**2].reshape(clip.side, clip.side, 3)
        near(grid[:, 0, 1], torch.tensor(row["pooled_row_coords"]).double(), 1e-4)
        near(grid[0, :, 2], torch.tensor(row["pooled_col_coords"]).double(), 1e-4)


def embed(ids: Tensor) -> Tensor:
    return torch.zeros(*ids.shape, 3, dtype=torch.float64)


def plain_sequence(geometry: Geometry, row: dict[str, Any], closed: bool, given: int) -> tuple[Tensor, list[int]]:
    """A prompt of several single-view pictures, `given` of them; its tokens and its newlines' positions."""
    places = COUNT_WORDS[row["kind"].split("_")[0]]
    layout = Plain(geometry, geometry.tile, geometry.tile, closed)
    features = [lay(layout, view[None]) for view in ramp(geometry, given)]
    marked = row.get("newline_positions_in_sequence") or [0] * places
    before = marked[0] - layout.count + 1 if closed else 1
    between = [b - a - layout.count for a, b in itertools.pairwise(marked)] if closed else [1] * (places - 1)
    after = row["total_length"] - before - sum(between) - places * layout.count
    ids = [1] * before + [IMAGE]
    for gap in between:
        ids += [1] * gap + [IMAGE]
    done = splice(torch.tensor([ids + [1] * after]), None, features, embed)
    return done.embeds[0], (done.embeds[0] == NEWLINE).all(-1).nonzero().flatten().tolist()


@pytest.mark.cases("llada_v", others("images_pad"), optional=True)
def test_several_pictures(case: Any) -> None:
    """Padded pictures end in one newline when they come as a list of tensors, and have none as one tensor."""
    geometry, row = case
    closed = "as_list" in row["kind"]
    tokens, newlines = plain_sequence(geometry, row, closed, COUNT_WORDS[row["kind"].split("_")[0]])
    assert row["per_image"] == geometry.side**2 + closed
    assert tokens.shape[0] == row["total_length"]
    assert newlines == row["newline_positions_in_sequence"]
    if not closed:
        assert count_visual([(9, 9)] * 2, geometry) == 2 * row["per_image"]


@pytest.mark.cases("llada_v", others("placeholders"), optional=True)
def test_last_picture_is_used_again(case: Any) -> None:
    geometry, row = case
    tokens, _ = plain_sequence(geometry, row, False, 1)
    assert tokens.shape[0] == row["total_length"]
    assert (tokens[1 : 1 + geometry.side**2] == tokens[2 + geometry.side**2 : 2 + 2 * geometry.side**2]).all()


@pytest.mark.cases("llada_v", others("truncation"), optional=True)
def test_prompts_are_cut(case: Any) -> None:
    _, row = case
    ids = torch.tensor([[1, IMAGE, 1, 1]])
    picture = torch.ones(row["untruncated_length"] - 3, 3).double()
    assert splice(ids, None, [picture], embed).embeds.shape[1] == row["untruncated_length"]
    cut = splice(ids, None, [picture], embed, limit=row["tokenizer_model_max_length"])
    assert cut.embeds.shape[1] == row["total_length"]
    assert cut.mask.all()
