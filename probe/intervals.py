"""95 % intervals of what is measured sample by sample: of a mean (Student's t) and of a ratio (bootstrap)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NAN = float("nan")
RESAMPLES = 10_000
SEED = 0


@dataclass(frozen=True)
class Estimate:
    """A number measured on `n` samples, and its 95 % interval; NaN where nothing is known."""

    value: float = NAN
    low: float = NAN
    high: float = NAN
    n: int = 0


def quantile(freedom: int) -> float:
    """The t for which P(|T| <= t) = 0.95 with so many degrees of freedom (4.303 for 2, 1.960 for infinity).

    With theta = atan(t / sqrt(freedom)) the probability is a finite sum: for an even number
    sin(theta) (1 + 1/2 cos^2 + 1*3/(2*4) cos^4 + ...), and for an odd one
    2/pi (theta + sin(theta) (cos + 2/3 cos^3 + 2*4/(3*5) cos^5 + ...)). It is solved for t by bisection.
    """
    if freedom < 1:
        return NAN
    if freedom > 2000:  # the sums grow long, and the next term of the expansion is below 1e-6
        z = 1.959963984540054
        return z + (z**3 + z) / (4 * freedom)
    odd = freedom % 2
    k = np.arange(1, freedom // 2)
    factors = 2 * k / (2 * k + 1) if odd else (2 * k - 1) / (2 * k)
    terms = np.concatenate([[1.0], np.cumprod(factors)])

    def inside(t: float) -> float:
        theta = math.atan(t / math.sqrt(freedom))
        powers = math.cos(theta) ** (2.0 * np.arange(len(terms)) + odd)
        series = math.sin(theta) * float((terms * powers).sum()) if freedom > 1 else 0.0
        return 2 / math.pi * (theta + series) if odd else series

    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < 0.95 else (low, middle)
    return (low + high) / 2


def mean(values: Sequence[float] | np.ndarray, *, within: tuple[float, float] = (-math.inf, math.inf)) -> Estimate:
    """Mean of the known values with its t interval, mean +- t s / sqrt(n), cut to what is possible at all.

    Of differences between two runs on the same samples this is the paired t interval. One sample has none.
    """
    known = np.asarray(values, np.float64)
    known = known[~np.isnan(known)]
    n = len(known)
    if n < 2:
        return Estimate(float(known[0]) if n else NAN, n=n)
    value = float(known.mean())
    half = quantile(n - 1) * float(known.std(ddof=1)) / math.sqrt(n)
    return Estimate(value, max(value - half, within[0]), min(value + half, within[1]), n)


def ratios(parts: Sequence[np.ndarray], whole: np.ndarray) -> list[Estimate]:
    """`sum(part) / sum(whole)` of each part, over the samples whose whole is not empty, with bootstrap intervals.

    The ends are the 2.5 % and 97.5 % points over 10,000 draws of n samples with replacement, seed 0, the same draws for
    all parts: so parts that add up to the whole do so in every draw.
    """
    columns = np.stack([np.asarray(column, np.float64) for column in (*parts, whole)], 1)
    columns = columns[columns[:, -1] > 0]
    n = len(columns)
    if not n:
        return [Estimate() for _ in parts]
    values = columns[:, :-1].sum(0) / columns[:, -1].sum()
    if n < 2:
        return [Estimate(float(value), n=n) for value in values]
    rng = np.random.default_rng(SEED)
    drawn = rng.multinomial(n, np.full(n, 1 / n), RESAMPLES) @ columns
    low, high = np.quantile(drawn[:, :-1] / drawn[:, -1:], [0.025, 0.975], axis=0)
    return [Estimate(float(v), float(a), float(b), n) for v, a, b in zip(values, low, high, strict=True)]


def one_minus_ratio(left: Sequence[float] | np.ndarray, first: Sequence[float] | np.ndarray) -> Estimate:
    """`1 - mean(left) / mean(first)` over samples that have both, with a bootstrap interval.

    The ends are the 2.5 % and 97.5 % points over 10,000 draws of n samples with replacement, seed 0: a ratio of means
    is not spread evenly to both sides, as a t interval would have it.
    """
    pairs = np.stack([np.asarray(left, np.float64), np.asarray(first, np.float64)], 1)
    pairs = pairs[~np.isnan(pairs).any(1)]
    n = len(pairs)
    if not n or pairs[:, 1].sum() <= 0:
        return Estimate(n=n)
    value = 1 - float(pairs[:, 0].sum() / pairs[:, 1].sum())
    if n < 2:
        return Estimate(value, n=n)
    rng = np.random.default_rng(SEED)
    drawn = rng.multinomial(n, np.full(n, 1 / n), RESAMPLES) @ pairs
    drawn = drawn[drawn[:, 1] > 0]
    low, high = np.quantile(1 - drawn[:, 0] / drawn[:, 1], [0.025, 0.975])
    return Estimate(value, float(low), float(high), n)
