"""Language model and vision path against the original's tensors, under the published key names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lavida_reference import (
    KERNELS,
    TOLERANCE,
    check_forward,
    check_roles,
    check_vision,
    check_weights,
    forward_cases,
    image_cases,
    vision_cases,
)


@pytest.mark.cases("lavida_llada", forward_cases)
def test_forward(case: Any, near: Any) -> None:
    got, want, kind = check_forward(case)
    near(got, want, TOLERANCE[kind])


@pytest.mark.cases("lavida_llada", vision_cases)
@pytest.mark.parametrize("kernel", KERNELS)
def test_vision(case: Any, kernel: str, near: Any) -> None:
    near(*check_vision(case, kernel))


@pytest.mark.cases("lavida_llada", image_cases)
def test_roles(case: Any) -> None:
    check_roles(case)


def weights(root: Path) -> Iterator[tuple[str, Path]]:
    if (root / "model.safetensors").is_file():
        yield "model", root


@pytest.mark.cases("lavida_llada", weights)
def test_weights(case: Path) -> None:
    check_weights(case)
