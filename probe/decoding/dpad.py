"""DPad (Chen et al., arXiv 2508.14148): which answer slots behind the block stay in the canvas."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from probe.errors import ProbeError


def density(sigma: float, scale: float, window: int, length: int) -> Tensor:
    """Chance that the slot at distance 0, 1, .. behind the block stays: `(length,)` float32.

    `scale exp(-d^2 / 2) / sqrt(2 pi)` with d from 0 to `sigma` in `window` even steps; 0 behind the window.
    """
    if window < 1:
        raise ProbeError(f"a DPad window of {window} slots: it takes at least 1")
    distance = torch.linspace(0, sigma, window)
    inside = scale * torch.exp(-(distance**2) / 2) / math.sqrt(2 * math.pi)
    return torch.nn.functional.pad(inside, (0, max(0, length - window)))[:length]


def kept(chance: Tensor, uniform: Tensor, first: int) -> list[int]:
    """The slots from `first` on that stay, given one uniform number `(suffix,)` each."""
    return [first + int(i) for i in (uniform < chance[: len(uniform)]).nonzero()[:, 0]]
