"""The decorators with which a user adds to the vocabulary: `@probe.score`, `@probe.selection`, and so on.

Each is the `register` of its registry: it takes a function (or, for policies, a class), bare or with options, and its
name is what a recipe then writes. `probe.nnsight` makes a probe of arbitrary code.
"""

from __future__ import annotations

from probe.probe_code import code_probe
from probe.registry import (
    cachings,
    calibrations,
    lengths,
    operations,
    scores,
    selections,
    signals,
    unmaskings,
)

__all__ = [
    "caching",
    "calibration",
    "length",
    "nnsight",
    "operation",
    "score",
    "selection",
    "signal",
    "unmasking",
]

score = scores.register
selection = selections.register
operation = operations.register
signal = signals.register
calibration = calibrations.register
unmasking = unmaskings.register
caching = cachings.register
length = lengths.register
nnsight = code_probe
