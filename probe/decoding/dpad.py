"""DPad (Chen et al., arXiv 2508.14148): which answer slots behind the block stay in the canvas."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from probe.decoding.policy import Ask, Caching, State, Work
from probe.decoding.rule import Rule
from probe.errors import ProbeError
from probe.registry import cachings


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


@cachings.register(name="dpad")
@dataclass(frozen=True, kw_only=True)
class Dpad(Caching):
    """DPad: nothing is stored, but of the slots behind the block only a sample is in the sequence, near ones first.

    A slot stays with the chance `scale exp(-d^2 / 2) / sqrt(2 pi)`, d from 0 to `sigma` over `window` slots, drawn anew
    for every block; a batch shares the draw of its first sample. Approximate. Dropped slots keep their positions.
    """

    exact = False
    sigma: float = 4.0
    scale: float = 2.0
    window: int = 256

    def check(self, rule: Rule, shift: int) -> None:
        """A window of at least one slot."""
        density(self.sigma, self.scale, self.window, 1)

    def plan(self, state: State, ask: Ask) -> Work:
        """What stands before and in the block, and a sample of what stands behind."""
        high = ask.window[1]
        known = state.memory.get("dpad")
        if known is None or known[0] != ask.window:
            chance = density(self.sigma, self.scale, self.window, state.slots)
            stay = np.arange(state.slots) < high
            stay[kept(chance, state.draw[0].uniform(state.slots - high), high)] = True
            state.memory["dpad"] = known = (ask.window, stay)
        return Work(slots=known[1])
