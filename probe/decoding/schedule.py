"""How many tokens a step commits."""

from __future__ import annotations


def linear(masked: int, steps: int) -> list[int]:
    """LLaDA's schedule: `masked // steps` a step, the remainder one each to the first steps.

    Counted once per block, from the masked positions of that block. Steps beyond the masks commit nothing.
    """
    each, extra = divmod(masked, steps)
    return [each + (i < extra) for i in range(steps)]
