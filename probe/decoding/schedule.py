"""How many tokens a step commits.

Two kinds. A *table* is made once from the masks of a block (`linear`, `lavida`, `dllm`); a *time grid* is asked at
every step with the masks that are left (`dream_share`, `dimple_share`), because the answer depends on them.
`dream`, `dimple` and `lavida_dream` unroll the grids for the case that every step commits what it is asked to.

Rounding is part of the published rules, so the grids are float32 tensors, as they are where they were published.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from probe.errors import ProbeError

Curve = Literal["linear", "cosine", "logit_normal", "shift"]
Alpha = Literal["linear", "cosine"]


def linear(masked: int, steps: int) -> list[int]:
    """LLaDA's schedule: `masked // steps` a step, the remainder one each to the first steps.

    Counted once per block, from the masked positions of that block. Steps beyond the masks commit nothing.
    """
    each, extra = divmod(masked, steps)
    return [each + (i < extra) for i in range(steps)]


def cumulative(curve: Curve, time: Tensor, shift: float = 3.0) -> Tensor:
    """LaViDa's fraction of tokens that are committed by `time` (0..1, any shape), before the list is reversed.

    `shift: a t / (1 + (a - 1) t)`; `cosine: (1 - cos pi t) / 2`; `logit_normal: Phi(logit t)`; `linear: t`.
    """
    if curve == "linear":
        return time
    if curve == "cosine":
        return 1 - (1 + torch.cos(math.pi * time)) / 2
    if curve == "logit_normal":
        return 0.5 * (1 + torch.erf(torch.logit(time) / math.sqrt(2)))
    if curve == "shift":
        return shift * time / (1 + (shift - 1) * time)
    raise ProbeError(f"no such schedule: {curve!r}; there are linear, cosine, logit_normal and shift (or none at all)")


def lavida(masked: int, steps: int, schedule: Curve | None = None, shift: float = 3.0) -> list[int]:
    """LaViDa's table (Li et al., arXiv 2505.16839): at least one token a step, `min(steps, masked)` steps.

    The increments of `floor(f(t) masked)`, raised to 1, then lowered again one at a time, walking over those above 1
    from the left and round, until they sum to `masked`; then reversed, so that `shift` below 1 commits many tokens
    early and the code's default of 3 commits few. No schedule means `linear` (the function above), which is not the
    same as the schedule named "linear".
    """
    if schedule is None:
        return linear(masked, steps)
    steps = min(steps, masked)
    if steps == 0:
        return []
    done = (cumulative(schedule, torch.linspace(0, 1, steps + 1), shift) * masked).floor().long()
    counts: list[int] = done.diff().clamp(min=1).tolist()
    surplus, at = sum(counts) - masked, 0
    while surplus > 0:
        if counts[at % steps] > 1:
            counts[at % steps] -= 1
            surplus -= 1
        at += 1
    return counts[::-1]


def dllm(masked: int, steps: int, alpha: Alpha = "linear") -> list[int]:
    """The dllm library's table: `round(left * (1 - (1 - alpha(s)) / (1 - alpha(t))))`, half to even, zeros dropped.

    `alpha(t)`, the fraction still clear at time t, is `1 - t` or `1 - cos(pi / 2 (1 - t))`. The table may be shorter
    than `steps`.
    """
    time = torch.tensor([(steps - i) / steps for i in range(steps + 1)], dtype=torch.float32)
    if alpha == "linear":
        clear = 1 - time
    elif alpha == "cosine":
        clear = 1 - torch.cos(math.pi / 2 * (1 - time))
    else:
        raise ProbeError(f"no such alpha: {alpha!r}; there are linear and cosine")
    share = (1 - (1 - clear[1:]) / (1 - clear[:-1])).double()
    counts = []
    for part in share:
        count = min(int((masked * part).round()), masked)
        masked -= count
        counts.append(count)
    return [count for count in counts if count]


def grid(steps: int, eps: float = 1e-3) -> Tensor:
    """Dream's times: `steps + 1` points from 1 down to `eps`, float32."""
    return torch.linspace(1, eps, steps + 1)


def dream_share(masked: float, step: int, time: Tensor) -> int:
    """Tokens that step `step` of the grid commits: `int(masked (1 - t_next / t))`, everything at the last.

    `masked` is the number of masks now, averaged over the batch where there is one.
    """
    if step >= len(time) - 2:
        return int(masked)
    return int(masked * (1 - time[step + 1] / time[step]))


def dimple_share(masked: int, at_start: int, step: int, time: Tensor) -> int:
    """Dimple's "dim" pipeline: as Dream's, but from the progress that was really made, and never nothing.

    With `r = masked / at_start`: the first later time `t_j < r` for which `int(masked (1 - t_j / r))` is at least 1;
    everything once the grid ends, and at the last step. ProbeError when `r` is not above the grid's end.
    """
    return int(masked * dimple_chance(masked, at_start, step, time))


def dimple_chance(masked: int, at_start: int, step: int, time: Tensor) -> Tensor:
    """The share `1 - t_j / r` of `dimple_share` itself, `()` float32; 1 where everything is committed."""
    if step >= len(time) - 2:
        return torch.ones(())
    rest = masked / at_start
    below = (time < rest).nonzero()
    if not len(below):
        raise ProbeError(
            f"{masked} of {at_start} answer slots are masked, which is no more than the time grid's end "
            f"({float(time[-1]):g}); use a smaller eps or a shorter answer"
        )
    for j in range(max(int(below[0]), step + 1), len(time) - 1):
        chance = 1 - time[j] / rest
        if int(masked * chance) >= 1:
            return chance
    return torch.ones(())


def dream(masked: int, steps: int, eps: float = 1e-3) -> list[int]:
    """Tokens per step of Dream's grid when nothing interferes."""
    return _unrolled(masked, steps, grid(steps, eps))


def dimple(masked: int, steps: int, eps: float = 1e-3) -> list[int]:
    """Tokens per step of Dimple's "dim" pipeline without a threshold; ends when nothing is masked."""
    time, left, counts = grid(steps, eps), masked, []
    for step in range(steps):
        if left == 0:
            break
        counts.append(dimple_share(left, masked, step, time))
        left -= counts[-1]
    return counts


def lavida_dream(
    gen_length: int,
    steps: int,
    *,
    step_ratio: float | None = None,
    schedule: Curve | None = None,
    shift: float = 3.0,
    prefix_lm: bool = False,
    eps: float = 1e-3,
) -> list[int]:
    """Tokens per step of LaViDa-Dream's sampler, whose three ways of asking for fewer steps differ.

    `steps` alone is Dream's grid. `step_ratio` runs `int(gen_length step_ratio)` iterations on the grid of `steps`
    points, so that the last one commits all that is left. With a `schedule` the table of `lavida` holds.
    `prefix_lm`: one token came from the prefill. ProbeError where the published code runs out of its table.
    """
    masked = gen_length - prefix_lm
    steps = min(steps, gen_length)
    iterations = steps if step_ratio is None else int(gen_length * step_ratio)
    if schedule is None:
        return _unrolled(masked, iterations, grid(steps, eps))
    table = lavida(masked, iterations, schedule, shift)
    if len(table) < iterations:
        raise ProbeError(
            f"{iterations} steps for {masked} masked slots: the schedule has one column per slot; "
            f"use step_ratio at most {masked / gen_length:g}"
        )
    return table


def _unrolled(left: int, iterations: int, time: Tensor) -> list[int]:
    counts = []
    for step in range(iterations):
        counts.append(left if step == iterations - 1 else dream_share(left, step, time))
        left -= counts[-1]
    return counts
