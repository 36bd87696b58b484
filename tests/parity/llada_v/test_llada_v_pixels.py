"""Preprocessed pictures against the original's, to the byte."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from probe.backbones.anyres import Tiling, geometry_of
from probe.backbones.pixels import padded_views, tiled_views


def pictures(root: Path) -> Iterator[tuple[str, Any]]:
    for path in sorted(root.glob("preprocess*/expected.json")):
        table = json.loads(path.read_text(encoding="utf-8"))
        side = table.get("processor", {}).get("size") or table["images"][0]["returned_shape"][-1]
        for row in table["images"]:
            yield f"{row['image']}-{row['image_aspect_ratio']}", (path.parent, side, row)


@pytest.mark.cases("llada_v", pictures)
def test_views(case: Any, check_views: Any) -> None:
    folder, side, row = case
    image = Image.open(folder / row["image"])
    assert list(image.size) == row["size_wh"]
    aspect = row["image_aspect_ratio"]
    if aspect == "pad":
        views = padded_views([image], side)
        assert list(views.shape) == row["returned_shape"]
    else:
        settings = {
            "image_aspect_ratio": aspect,
            "image_grid_pinpoints": row.get("grid_pinpoints", "(1x1),...,(6x6)"),
        }
        tiling = Tiling(geometry_of(settings, tile=side, patch=14), *image.size)
        views = tiled_views(image, tiling)
        assert [1, *views.shape] == row["returned_shape"]
        if "best_resolution_wh" in row:
            assert list(tiling.canvas) == row["best_resolution_wh"]
        if "pasted_box_x0y0x1y1" in row:
            assert list(tiling.pasted) == row["pasted_box_x0y0x1y1"]
    assert str(views.dtype) == row.get("dtype", "torch.float32")
    check_views(views, row["tiles"])
