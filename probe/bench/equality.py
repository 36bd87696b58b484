"""Outputs are compared before times are: a way to do the work that gives something else is no faster way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from probe.errors import ProbeError

TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""By type: how far recorded values of two ways may differ, as a share of the largest of them."""


def same_tokens(row: str, first: str, ours: Any, second: str, theirs: Any) -> str:
    """What was compared; raises `ProbeError` where two sides' tokens differ, with the first place."""
    a, b = np.asarray(ours), np.asarray(theirs)
    if a.shape != b.shape:
        raise ProbeError(f"bench row `{row}`: {first} gave tokens of shape {a.shape}, {second} {b.shape}; not timed")
    if not np.array_equal(a, b):
        at = tuple(int(i) for i in np.argwhere(a != b)[0])
        raise ProbeError(
            f"bench row `{row}`: outputs differ, so nothing was timed: {first} has token {a[at]} at {at} "
            f"(step, slot), {second} has {b[at]}; {int((a != b).sum())} of {a.size} differ"
        )
    return "tokens of every step"


def same_answer(row: str, first: str, ours: Mapping[str, Any], second: str, theirs: Any, tolerance: float) -> str:
    """What was compared: tokens, and the confidence of every open slot at every step.

    `ours` are a run's arrays, `theirs` likewise or a plain loop's `Looked`. Raises `ProbeError` where they differ.
    """
    if isinstance(theirs, Mapping):
        tokens, confidence = theirs["token"], theirs["confidence"]
    else:
        tokens, confidence = theirs.tokens, np.stack([c.cpu().numpy() for c in theirs.confidence])
    same_tokens(row, first, ours["token"], second, tokens)
    same_values(row, f"confidence of {first} and {second}", ours["confidence"], confidence, tolerance)
    return f"tokens; confidence within {tolerance:g}" if tolerance else "tokens and confidence, bit for bit"


def same_values(row: str, name: str, ours: Any, theirs: Any, tolerance: float) -> str:
    """What was compared; raises `ProbeError` where recorded values differ by more than `tolerance` of the largest."""
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if a.shape != b.shape:
        raise ProbeError(f"bench row `{row}`: `{name}` has shape {a.shape} here and {b.shape} there; not timed")
    if not np.array_equal(np.isnan(a), np.isnan(b)):
        raise ProbeError(f"bench row `{row}`: `{name}` is not there for the same places in both runs; not timed")
    largest = float(np.nanmax(np.abs(b), initial=0.0))
    apart = float(np.nanmax(np.abs(a - b), initial=0.0))
    if apart > tolerance * largest:
        raise ProbeError(
            f"bench row `{row}`: outputs differ, so nothing was timed: `{name}` is {apart:.3g} apart, "
            f"more than {tolerance:g} of its largest value {largest:.3g}"
        )
    return f"{name} within {tolerance:g}"
