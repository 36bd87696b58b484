"""Ways to do the same thing that take turns, and what their times come to.

The clock is that of `torch.utils.benchmark`, which waits for the device before it is read. Its `Timer` measures one
statement after the other, and a machine that slows down in between would be taken for a difference; here the sides
alternate. The processor's time of this process is taken beside it, for machines that are not idle.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch.utils.benchmark import timer


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles over `n` turns."""

    median: float
    low: float
    high: float
    n: int


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of numbers."""
    low, median, high = np.quantile(np.array(values, np.float64), [0.25, 0.5, 0.75])
    return Spread(float(median), float(low), float(high), len(values))


@dataclass
class Turns:
    """Seconds of every side, turn by turn: by the clock on the wall, and of this process's processor time."""

    wall: dict[str, list[float]] = field(default_factory=dict)
    cpu: dict[str, list[float]] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    """What each side gave in the turn that was not timed."""
    equal: str = ""
    """What the check of those results compared."""

    def ratio(self, over: str, under: str, *, cpu: bool = False, scale: float = 1.0) -> Spread:
        """`scale` times the ratio of two sides' seconds within each turn."""
        times = self.cpu if cpu else self.wall
        return spread([scale * a / b for a, b in zip(times[over], times[under], strict=True)])

    def seconds(self, side: str) -> Spread:
        """A side's seconds by the clock on the wall."""
        return spread(self.wall[side])


def take_turns(
    sides: Mapping[str, Callable[[], Any]],
    repeats: int,
    check: Callable[[Mapping[str, Any]], str],
    *,
    clock: Callable[[], float] = timer,
    processor: Callable[[], float] = time.process_time,
) -> Turns:
    """Run every side once untimed, `check` what they gave, then `repeats` times each, in turns.

    `check` raises where results that must be equal are not, and says what it compared; nothing is timed before.

    The order is reversed from turn to turn, so that whoever comes first does so half of the time. Garbage is collected
    between two runs and not within one.
    """
    turns = Turns({name: [] for name in sides}, {name: [] for name in sides})
    for name, run in sides.items():
        turns.results[name] = run()
    turns.equal = check(turns.results)
    order = list(sides)
    enabled = gc.isenabled()
    try:
        for turn in range(repeats):
            for name in order if turn % 2 == 0 else order[::-1]:
                gc.collect()
                gc.disable()
                started, used = clock(), processor()
                sides[name]()
                ended, spent = clock(), processor()
                gc.enable()
                turns.wall[name].append(ended - started)
                turns.cpu[name].append(spent - used)
    finally:
        (gc.enable if enabled else gc.disable)()
    return turns
