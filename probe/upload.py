"""Small arrays from the host to where a tensor is, without waiting for what the device is doing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def upload(
    values: np.ndarray | Sequence[Any] | Tensor, device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """Values as a tensor on a device.

    A plain copy to a GPU waits until the device has done all that was asked of it before. This one is asked for and
    waited for by nobody: the driver takes small pageable memory over before the call returns, and the device's own
    order of work does the rest. So the values may be changed or freed afterwards.
    """
    return torch.as_tensor(values, dtype=dtype).to(device, non_blocking=True)
