"""Sizes and patches against transformers' Qwen2-VL image processor, and the evaluation's pixels step by step."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from probe.backbones.dimple_pixels import patches_of, resize
from probe.backbones.dimple_resize import Preprocessing, presized, smart_size
from probe.errors import ProbeError

sides = st.integers(28, 5000)
budgets = st.sampled_from([(3136, 12845056), (3136, 1003520), (3136, 112896), (784, 784 * 4)])


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    generator = np.random.default_rng(width * 7 + height)
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    return Image.fromarray(generator.integers(0, 256, (height, width, *channels), dtype=np.uint8), mode)


@given(width=sides, height=sides, budget=budgets)
def test_sizes_are_those_of_transformers(width: int, height: int, budget: tuple[int, int]) -> None:
    """Except where it rounds a side up to one cell that Dimple's own processor would round to nothing."""
    assume(max(width, height) <= 200 * min(width, height))
    high, wide = smart_resize(height, width, 28, *budget)
    if min(wide, high) == 28 and min(width, height) * math.sqrt(budget[1] / (width * height)) < 28:
        with pytest.raises(ProbeError, match="too thin"):
            smart_size(width, height, 28, *budget)
    else:
        assert smart_size(width, height, 28, *budget) == (wide, high)


@pytest.mark.parametrize(("width", "height"), [(27, 300), (300, 27), (6000, 29), (28, 5601)])
def test_shapes_that_are_refused(width: int, height: int) -> None:
    with pytest.raises(ProbeError, match=f"{width} x {height}"):
        Preprocessing().size(width, height)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
@pytest.mark.parametrize("low_high", [(3136, 1003520), (3136, 14 * 14 * 24 * 24), (3136 * 16, 12845056)])
def test_patches_are_those_of_transformers(mode: str, low_high: tuple[int, int]) -> None:
    images = [noise(150, 90, mode), noise(61, 300, mode), noise(500, 400, mode)]
    theirs = Qwen2VLImageProcessorPil(min_pixels=low_high[0], max_pixels=low_high[1])(
        [i.convert("RGB") for i in images], return_tensors="pt"
    )
    pixels, grid = patches_of(images, Preprocessing(*low_high))
    assert grid.equal(theirs["image_grid_thw"])
    torch.testing.assert_close(pixels, theirs["pixel_values"], atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("size", "budget", "want"),
    [
        ((640, 480), (3136, 112896), [(387, 290)]),  # sqrt(112896 / 307200) = 0.60622
        ((20, 60), (3136, 112896), [(32, 96)]),  # sqrt(3136 / 1200) = 1.61658
        ((10, 300), (784, 112896), [(28, 300)]),
        ((9000, 28), (784, 12845056), [(5040, 28)]),
        ((28, 9000), (784, 12845056), [(28, 5040)]),
        ((20, 1000000), (784, 1000000), [(4, 223606), (28, 223606), (28, 5040)]),  # sqrt(1 / 20) = 0.223607
        ((300, 300), (784, 112896), []),
    ],
)  # fmt: skip
def test_sizes_of_the_evaluation(size: tuple[int, int], budget: tuple[int, int], want: list[tuple[int, int]]) -> None:
    assert presized(*size, *budget) == [size, *want]
    rule = Preprocessing(*budget, pixels="evaluation")
    last = (want or [size])[-1]
    assert rule.size(*size) == Preprocessing(*budget).size(*last)


def test_pixels_of_the_evaluation() -> None:
    image = noise(640, 480)
    file = io.BytesIO()
    image.save(file, "JPEG")
    shown = Image.open(io.BytesIO(file.getvalue())).resize((387, 290)).resize((392, 280), Image.Resampling.BICUBIC)
    rule = Preprocessing(3136, 112896, pixels="evaluation")
    assert rule.size(640, 480) == (392, 280)
    assert np.array_equal(np.asarray(resize(image, rule)), np.asarray(shown))
    plain = resize(image, Preprocessing(3136, 112896))
    assert not np.array_equal(np.asarray(plain), np.asarray(shown))
