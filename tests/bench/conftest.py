"""A bench of a toy size."""

from __future__ import annotations

import pytest

from probe.bench.shapes import Bench, Shape

TOY = Shape(
    layers=8, width=64, heads=2, mlp=96, vocabulary=160, visual=48, question=5, answer=8, steps=4,
)  # fmt: skip


@pytest.fixture
def toy() -> Bench:
    """Eight layers of width 64, one timed turn."""
    return Bench(shape=TOY, repeats=1)
