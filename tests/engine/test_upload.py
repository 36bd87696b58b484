"""Small arrays to a device: the same values, in the type that is asked for."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from probe.upload import upload

CPU = torch.device("cpu")


def test_values_and_types_are_kept() -> None:
    for values in (np.arange(6).reshape(2, 3), np.array([True, False]), np.linspace(0, 1, 3, dtype=np.float32)):
        assert np.array_equal(upload(values, CPU).numpy(), values)
        assert upload(values, CPU).numpy().dtype == values.dtype
    assert torch.equal(upload([1, 2], CPU), torch.tensor([1, 2]))
    assert upload([], CPU, torch.int64).dtype == torch.int64


def test_the_copy_is_one_that_nobody_waits_for() -> None:
    class Asked(torch.Tensor):
        asked: ClassVar[list[dict[str, object]]] = []

        def to(self, *args: object, **kwargs: object) -> torch.Tensor:
            Asked.asked.append(kwargs)
            return super().to(*args, **kwargs)

    upload(torch.ones(2).as_subclass(Asked), CPU)  # type: ignore[arg-type]
    assert Asked.asked == [{"non_blocking": True}]
