"""What the tests of the `dimple` fixtures share; `dimple_examples` holds the rest."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="session")
def near() -> Callable[..., None]:
    """`near(got, want, atol)`: equal shapes, and equal values to within `atol` and 1e-5 of the value."""

    def check(got: Tensor, want: Tensor, atol: float, rtol: float = 1e-5) -> None:
        torch.testing.assert_close(got, want, atol=atol, rtol=rtol, check_dtype=False)

    return check
