"""What figures read from a trace: which samples, which variable, and samples of different length on one axis."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from probe.errors import ProbeError
from probe.trace_reader import Trace
from probe.trace_schema import Variable

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Wanted:
    """Which part of a trace is to be drawn: the number of a sample in the run's data, a layer, a step."""

    sample: int | None = None
    layer: int | None = None
    step: int | None = None


def variables_like(trace: Trace, base: str) -> list[Variable]:
    """The variable called `base`, then those recorded `as: base_...`."""
    names = [n for n in trace.variables if n == base or n.startswith(f"{base}_")]
    return [trace.variables[n] for n in sorted(names, key=lambda n: n != base)]


def rows_of(trace: Trace, name: str, sample: int | None) -> list[int]:
    """Rows that recorded the variable; samples that failed have none. Never empty."""
    failed = trace.array("failed")
    rows = [i for i in range(trace.n_samples) if not failed[i] and trace.checksums(i).get(name, 0) >= 0]
    if sample is not None:
        numbers = trace.samples.tolist()
        if sample not in numbers:
            held = ", ".join(map(str, numbers[:12])) + (", ..." if len(numbers) > 12 else "")
            raise ProbeError(f"{trace.path.name} has no sample {sample}; it holds {held or 'none'}")
        row = numbers.index(sample)
        if row not in rows:
            why = f"it failed ({failed[row]})" if failed[row] else f"`{name}` was not kept for it"
            raise ProbeError(f"{trace.path.name}: nothing to draw of sample {sample}: {why}")
        rows = [row]
    if not rows:
        n = trace.n_samples
        why = "it holds no samples yet" if not n else f"all {n} samples failed or recorded no `{name}`"
        raise ProbeError(f"{trace.path.name}: nothing to draw: {why}")
    return rows


def values_of(trace: Trace, name: str, rows: Sequence[int]) -> Iterator[np.ndarray]:
    """One array per row, cut to its real lengths. Small variables are read at once: one read is as slow as hundreds."""
    dims = trace.variables[name].dims
    if "visual" in dims:  # the only axis with thousands of places
        yield from (trace.row(name, i) for i in rows)
        return
    whole = trace.array(name)
    lengths = {axis: trace.array(f"n_{axis}") for axis in dims if axis not in trace.coords}
    for i in rows:
        yield whole[(i, *(slice(int(lengths[axis][i])) if axis in lengths else slice(None) for axis in dims))]


def place(pick: int | None, length: int, axis: str, where: str) -> int | None:
    """A pick as a place along an axis; negative numbers count from the end."""
    if pick is not None and not -length <= pick < length:
        raise ProbeError(f"{where}: there is no {axis} {pick}; {axis}s are 0 to {length - 1}")
    return None if pick is None else pick % length


@dataclass(frozen=True)
class StepAxis:
    """Samples of different numbers of steps, side by side.

    Where all have the same number, places are steps. Else there are as many places as the longest sample has steps,
    and a place stands for a share of each sample's way: sample with S steps is at step floor((place + 1/2) S / places).
    """

    steps: tuple[int, ...]

    @property
    def length(self) -> int:
        """Number of places."""
        return max(self.steps)

    @property
    def relative(self) -> bool:
        """Whether places are shares of the way."""
        return len(set(self.steps)) > 1

    def at(self, steps: int) -> np.ndarray:
        """The step at every place, of a sample with so many steps; none for a sample without steps."""
        return (2 * np.arange(self.length) + 1) * steps // (2 * self.length)

    def spread(self, values: np.ndarray) -> np.ndarray:
        """`(step, ...)` of one sample to `(place, ...)`."""
        if not len(values):
            return np.full((self.length, *values.shape[1:]), np.nan)
        return values[self.at(len(values))]

    @property
    def extent(self) -> tuple[float, float]:
        """Left and right end on the drawn axis."""
        return (0.0, 100.0) if self.relative else (-0.5, self.length - 0.5)

    @property
    def centres(self) -> np.ndarray:
        """Where places stand on the drawn axis."""
        places = np.arange(self.length, dtype=float)
        return (places + 0.5) / self.length * 100 if self.relative else places

    @property
    def label(self) -> str:
        """What the drawn axis is called."""
        return "progress (% of the sample's denoising steps)" if self.relative else "denoising step"

    @property
    def words(self) -> str:
        """`2 to 22 steps`."""
        low, high = min(self.steps), max(self.steps)
        return f"{low} to {high} steps" if low != high else f"{high} step{'s' * (high != 1)}"

    def dress(self, axes: Axes, *, label: bool = True) -> None:
        """Limits, ticks and name of the horizontal axis."""
        from matplotlib.ticker import PercentFormatter

        from probe.views.figure_style import whole_numbers

        axes.set_xlim(*self.extent)
        if self.relative:
            axes.xaxis.set_major_formatter(PercentFormatter())
        else:
            whole_numbers(axes.xaxis)
        if label:
            axes.set_xlabel(self.label)


def step_axis(trace: Trace, rows: Sequence[int]) -> StepAxis:
    """The step axis of some rows."""
    counts = trace.array("n_step")
    steps = tuple(int(counts[i]) for i in rows)
    if not max(steps, default=0):
        raise ProbeError(f"{trace.path.name}: nothing to draw: no sample has run a step")
    return StepAxis(steps)


def known_mean(values: np.ndarray, axis: int | tuple[int, ...] = 0) -> np.ndarray:
    """Mean of what is known; NaN where nothing is, without numpy's warning."""
    known = ~np.isnan(values)
    count = known.sum(axis)
    total = np.where(known, values, 0).sum(axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def known_quantiles(values: np.ndarray, shares: Sequence[float]) -> np.ndarray:
    """Quantiles along axis 0, NaN where nothing is known. `(share, ...)`."""
    out = np.full((len(shares), *values.shape[1:]), np.nan)
    some = ~np.isnan(values).all(0)
    if some.any():
        out[:, some] = np.nanquantile(values[:, some], shares, axis=0)
    return out


def counted(n: int, word: str = "sample") -> str:
    """`1 sample`, `12 samples`."""
    return f"{n} {word}{'s' * (n != 1)}"


def sample_words(trace: Trace, rows: Sequence[int], axis: StepAxis) -> str:
    """`n = 12 samples, 2 to 22 steps`, or which one it is, and how many failed."""
    failed = int((trace.array("failed") != "").sum())
    if len(rows) == 1:
        row = rows[0]
        task = str(trace.array("task")[row])
        which = f"n = 1 (sample {int(trace.samples[row])}{f', {task}' if task else ''})"
    else:
        which = f"n = {len(rows)} samples"
    tail = f", {failed} failed" if failed and len(rows) > 1 else ""
    return f"{which}, {axis.words}{tail}"
