"""Sizes, grids and numbers of visual tokens against the original's image processor, for every pixel budget."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from probe.backbones.dimple_pixels import patches_of
from probe.backbones.dimple_resize import Preprocessing
from probe.errors import ProbeError


def pictures(root: Path) -> Iterator[tuple[str, Any]]:
    for row in json.loads((root / "layout.json").read_text(encoding="utf-8")):
        yield "{}x{}-{}-{}".format(*row["size_wh"], row["min_pixels"], row["max_pixels"]), row


@pytest.mark.cases("dimple", pictures)
def test_dimple_layout(case: Any) -> None:
    size, rule = case["size_wh"], Preprocessing(case["min_pixels"], case["max_pixels"])
    if "raises" in case or not case["visual_tokens"]:  # of a picture without a visual token nothing can be said
        with pytest.raises(ProbeError, match="{} x {}".format(*size)):
            rule.count(*size)
        return
    assert list(rule.size(*size)) == case["resized_wh"]
    assert rule.count(*size) == case["visual_tokens"]
    rows, columns = rule.grid(*size)
    assert [1, rows * rule.merge, columns * rule.merge] == case["grid_thw"]


@pytest.mark.cases("dimple", pictures)
def test_dimple_patches_of_the_layout(case: Any) -> None:
    if "raises" in case or not 0 < case["visual_tokens"] <= 1300:
        pytest.skip("no patches, or more than are worth the time")
    rule = Preprocessing(case["min_pixels"], case["max_pixels"])
    pixels, grid = patches_of([Image.new("RGB", tuple(case["size_wh"]))], rule)
    assert grid.tolist() == [case["grid_thw"]]
    assert pixels.shape == (case["visual_tokens"] * rule.merge**2, 3 * rule.temporal * rule.patch**2)
