"""Small random LLaDA-V checkpoints on disk, with or without an encoder and a tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

from probe.backbones.base import SpecialIds
from probe.backbones.tiny.tiled import write_llada_v

settings.register_profile("no-deadline", deadline=None)  # a busy machine is no failure
settings.load_profile("no-deadline")

STAND_IN = SpecialIds(mask=2, eos=1, stop=5, suppressed=(1, 0, 3, 4))
"""Ids of the special tokens in the tokenizer that `write_llada_v` makes."""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """`checkpoint(**changes)` writes a checkpoint into a fresh folder and returns it."""
    made = []

    def make(**changes: Any) -> Path:
        made.append(None)
        return write_llada_v(tmp_path / f"checkpoint{len(made)}", **changes)

    return make


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One checkpoint with everything, for tests that only read."""
    return write_llada_v(tmp_path_factory.mktemp("small"))


@pytest.fixture
def stand_in() -> SpecialIds:
    """The special ids of checkpoints that have no tokenizer."""
    return STAND_IN


@pytest.fixture(scope="session")
def picture() -> Callable[[int, int], Image.Image]:
    """`picture(width, height)` is smooth noise in colour, the same every time."""

    def make(width: int, height: int) -> Image.Image:
        noise = np.random.default_rng(width * 10007 + height).integers(0, 255, (height, width, 3), dtype=np.uint8)
        return Image.fromarray(noise)

    return make
