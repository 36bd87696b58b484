"""Order by score."""

from __future__ import annotations

import torch
from torch import Tensor


def ranked(score: Tensor) -> Tensor:
    """Indices by descending score; ties stand in raster order, NaN last (it must never become a kept token)."""
    return torch.where(score.isnan(), -torch.inf, score).sort(descending=True, stable=True).indices
