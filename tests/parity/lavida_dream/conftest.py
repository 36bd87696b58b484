"""The fixture `near` of the LaViDa sets."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="session")
def near() -> Callable[..., None]:
    """`near(got, want, atol)`: equal shapes, and equal values to within `atol` and 1e-5 of the value."""

    def check(got: Tensor, want: Tensor, atol: float) -> None:
        torch.testing.assert_close(got, want, atol=atol, rtol=1e-5 if atol else 0, check_dtype=False)

    return check
