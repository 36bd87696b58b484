"""NaN and infinity where a number was due: counted per step, and said once. Pure functions on arrays.

A trace also holds NaN where there is nothing to say: a token that is gone, a segment without rows, a slot that was not
open. Those are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from probe.compile import ProbeTable
from probe.site import Role, Site

NONFINITE = "nonfinite"
"""The variable with the counts; an edit notes NaN scores under names that begin like it (`nonfinite.PROBE`)."""


class NotFinite(RuntimeWarning):
    """A signal or logits of a run held NaN or infinity."""


def nonfinite(values: np.ndarray, dims: Sequence[str]) -> np.ndarray:
    """How many values of each item are no numbers where one was due: `(item, ...)` to `(item,)` int32.

    `dims` end with the axes of one item. NaN is due for tokens that are gone (axis `visual`) and for segments without
    rows (axis `segment_key`), but the answer is a segment that always has rows.
    """
    infinite, missing = np.isinf(values), np.isnan(values)
    last = dims[-1] if dims else ""
    if last == "visual":
        missing = np.zeros_like(missing)
    elif last == "segment_key":
        of_answer = missing[..., int(Role.ANSWER)]
        missing = np.zeros_like(missing)
        missing[..., int(Role.ANSWER)] = of_answer
    wrong: np.ndarray = (infinite | missing).reshape(len(values), -1).sum(1).astype(np.int32)
    return wrong


def where_first(
    arrays: Mapping[str, np.ndarray],
    table: ProbeTable,
    dims: Mapping[str, Sequence[str]],
    nominal_steps: int,
    nan_scores: Mapping[str, int],
) -> str | None:
    """The first step of a sample with values that are no numbers, how many, and the site; None if there is none.

    `dims` are the axes of the recorded variables, `nominal_steps` what the rule asked for;
    `nan_scores` the first step at which an intervention's score held NaN, by probe.
    """
    counts = arrays.get(NONFINITE)
    if counts is None or not counts.any():
        return None
    step = int(np.flatnonzero(counts)[0])
    what = f"step {step}: {int(counts[step])} values are NaN or infinite"
    for probe in table.probes:
        at = probe.site.value + ("" if probe.layer is None else f", layer {probe.layer}")
        if nan_scores.get(probe.name) == step:
            return f"{what}, first in the score of probe `{probe.name}` at {at}"
        if probe.site is Site.LOGITS or probe.site.in_encoder:
            continue
        if not probe.steps.includes(int(arrays["nominal_step"][step]), nominal_steps):
            continue
        for record in probe.records:
            if record.name in arrays:
                here = arrays[record.name][step]
                value = here if probe.layer is None else here[probe.layer]
                if nonfinite(value[None], dims[record.name])[0]:
                    return f"{what}, first in `{record.name}` at {at}"
    return f"{what}, first at {Site.LOGITS.value}"
