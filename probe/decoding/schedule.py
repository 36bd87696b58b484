"""How many tokens a step commits."""

from __future__ import annotations

import math
from itertools import cycle

import torch


def linear(masked: int, steps: int) -> list[int]:
    """LLaDA's schedule: `masked // steps` a step, the remainder one each to the first steps.

    Counted once per block, from the masked positions of that block. Steps beyond the masks commit nothing.
    """
    each, extra = divmod(masked, steps)
    return [each + (i < extra) for i in range(steps)]


def lavida(masked: int, steps: int, name: str | None = None, shift: float = 3.0) -> list[int]:
    """LaViDa's schedules: tokens of each of `min(steps, masked)` steps, at least one each.

    `name` None spreads them evenly, the remainder to the first steps. Otherwise sigma(t) is the share done by the
    time t = 0..1 and a step commits the difference of two floors of sigma * masked: `shift` is s t / (1 + (s - 1) t)
    with s = `shift`, `cosine` is (1 - cos(pi t)) / 2, `logit_normal` is the normal distribution function of
    logit(t), and any other name is t itself. The table is *reversed*: a `shift` below 1 commits many tokens early.
    Computed in float32, whose rounding decides some of the floors.
    """
    steps = min(steps, masked)
    if name is None:
        return linear(masked, steps) if steps else []
    t = torch.linspace(0, 1, steps + 1, dtype=torch.float32)
    if name == "shift":
        sigma = shift * t / (1 + (shift - 1) * t)
    elif name == "cosine":
        sigma = 1 - (1 + torch.cos(math.pi * t)) / 2
    elif name == "logit_normal":
        sigma = 0.5 * (1 + torch.erf(torch.logit(t) / math.sqrt(2)))
    else:
        sigma = t
    done = (sigma * masked).floor().long()
    counts: list[int] = (done[1:] - done[:-1]).clamp(min=1).tolist()
    surplus = sum(counts) - masked
    for i in cycle(range(steps)):
        if surplus <= 0:
            break
        if counts[i] > 1:
            counts[i] -= 1
            surplus -= 1
    return counts[::-1]
