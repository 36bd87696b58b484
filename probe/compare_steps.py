"""How far one sample's denoising is from the same sample's in another run, step by step. Pure functions on arrays.

Two runs are laid beside each other by *nominal* step, the place in the schedule: a run that skips the rest of a block
stays what it was until its next step. Steps are counted from the first one in which a visual token was missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from probe.site import Fate

NAN = float("nan")


@dataclass(frozen=True)
class Side:
    """What is read of one sample of one trace. What the trace does not hold is None."""

    token: np.ndarray  # (step, position)
    commit_step: np.ndarray  # (position,)
    nominal_step: np.ndarray  # (step,)
    confidence: np.ndarray | None = None  # (step, position), NaN where the slot was not open
    logit_kl: np.ndarray | None = None  # (step, position), NaN where the slot was not open in both runs


@dataclass(frozen=True, eq=False)
class StepsApart:
    """Two runs of one sample. `at` is by step counted from the intervention: (tokens, confidence, kl), each NaN where
    nothing can be compared. Counts are of answer slots; `kl_first` and `kl_last` are means over slots."""

    at: Mapping[int, tuple[float, float, float]]
    both: int  # slots filled in both runs at the end
    changed: int  # of these, with different tokens
    stake: np.ndarray  # (position,) still open when the intervention came
    differs: np.ndarray  # (position,) filled in both at the end, and different
    compared: np.ndarray  # (position,) filled in both at the end
    ever: int  # slots that differed at some step while they were filled in both
    back: int  # of these, equal at the end
    kl_first: float = NAN
    kl_last: float = NAN
    kl_slots: int = field(default=0)


def filled_slots(token: np.ndarray, commit_step: np.ndarray) -> np.ndarray:
    """`(step, position)` whether a slot holds a token after the step.

    A trace does not say which id stands for an open slot: it is the one that stands most often where nothing has
    been committed yet. So slots that a decoder opens again are seen as open, too.
    """
    before = (commit_step < 0) | (np.arange(len(token))[:, None] < commit_step)
    if not before.any():
        return np.ones(token.shape, bool)
    ids, counts = np.unique(token[before], return_counts=True)
    return np.asarray(token != ids[counts.argmax()])


def first_intervened(kept: np.ndarray | None, visual_tokens: np.ndarray | None, n_visual: int) -> int | None:
    """The first step (its place among the sample's) in which some layer missed a visual token; None: there is none.

    `kept (step, layer, visual)` are fates, `visual_tokens (step, layer)` counts; either may be None.
    """
    touched = []
    if kept is not None and kept.size:
        touched.append(((kept != 0) & (kept != int(Fate.KEPT))).any((1, 2)))
    if visual_tokens is not None and visual_tokens.size and n_visual:
        touched.append(((visual_tokens >= 0) & (visual_tokens < n_visual)).any(1))
    steps = np.flatnonzero(np.any(touched, axis=0)) if touched else np.zeros(0, int)
    return int(steps[0]) if len(steps) else None


def steps_apart(reference: Side, other: Side, start: int) -> StepsApart:
    """Compare two runs of a sample; `start` is the nominal step from which the other run is intervened in.

    At a step that both took part in: `tokens` is the share of slots filled in both that hold different tokens;
    `confidence` the mean over slots open in both of the reference's confidence minus the other's; `kl` the mean of
    `logit_kl` over the slots that have it. `kl_first` is the mean of `logit_kl` at the step `start`; `kl_last` the mean
    over the same slots of the last value that each of them has, that is at the last step at which it was open.
    """
    n = min(reference.token.shape[1], other.token.shape[1])
    a, b = reference.token[:, :n], other.token[:, :n]
    full_a = filled_slots(reference.token, reference.commit_step)[:, :n]
    full_b = filled_slots(other.token, other.commit_step)[:, :n]
    at: dict[int, tuple[float, float, float]] = {}
    ever = np.zeros(n, bool)
    for step in np.union1d(reference.nominal_step, other.nominal_step).tolist():
        i, j = _place(reference.nominal_step, step), _place(other.nominal_step, step)
        shared = full_a[i] & full_b[j] if i >= 0 and j >= 0 else np.zeros(n, bool)
        unlike = shared & (a[i] != b[j])
        ever |= unlike
        here_a, here_b = step in reference.nominal_step, step in other.nominal_step
        gap = kl = NAN
        if here_a and here_b and reference.confidence is not None and other.confidence is not None:
            gap = _mean(reference.confidence[i, :n].astype(np.float64) - other.confidence[j, :n])
        if here_b and other.logit_kl is not None:
            kl = _mean(other.logit_kl[j])
        at[int(step) - start] = (float(unlike.sum() / shared.sum()) if shared.any() else NAN, gap, kl)
    compared = full_a[-1] & full_b[-1]
    differs = compared & (a[-1] != b[-1])
    before = _place(reference.nominal_step, start - 1)
    stake = ~full_a[before] if before >= 0 else np.ones(n, bool)
    first, last, slots = _kl_ends(other, start)
    return StepsApart(
        at, int(compared.sum()), int(differs.sum()), stake, differs, compared,
        int(ever.sum()), int((ever & compared & ~differs).sum()), first, last, slots,
    )  # fmt: skip


def _kl_ends(other: Side, start: int) -> tuple[float, float, int]:
    """Means of the first and of the last divergence over the slots that are open at `start`, and how many there are."""
    if other.logit_kl is None or start not in other.nominal_step:
        return NAN, NAN, 0
    rows = np.asarray(other.logit_kl[_place(other.nominal_step, start) :], np.float64)
    slots = np.flatnonzero(~np.isnan(rows[0]))
    if not len(slots):
        return NAN, NAN, 0
    known = ~np.isnan(rows[:, slots])
    final = len(rows) - 1 - known[::-1].argmax(0)
    return float(rows[0, slots].mean()), float(rows[final, slots].mean()), len(slots)


def _place(nominal: np.ndarray, step: int) -> int:
    """The place of the last step of a run at or before a nominal step; -1: it had not begun."""
    return int(np.searchsorted(nominal, step, side="right")) - 1


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else NAN
