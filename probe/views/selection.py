"""A part of one variable of a trace: by index, range or name along every axis, averaged over some of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from probe.errors import ProbeError
from probe.registry import nearest
from probe.trace_reader import Trace
from probe.trace_schema import TEXTS, Variable

Pick = int | str | None
"""`4`, `-1` (the last), `"4..8"` (both ends included), `"1,3"`, or a name such as `"visual"`; None: everything."""


CODES_WITHOUT_NAMES: frozenset[str] = frozenset({"token"})
"""Variables whose numbers stand for things, although no names are in the file."""


@dataclass(frozen=True)
class Selection:
    """Values with named axes. `values` is masked where a sample has none; texts are an array of objects.

    `labels` names the places along each axis that is left; `notes` says what was picked or averaged on the way.
    """

    variable: Variable
    dims: tuple[str, ...]
    values: np.ma.MaskedArray
    labels: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...] = ()

    @property
    def is_text(self) -> bool:
        """Whether the values are texts."""
        return bool(self.values.dtype == object)

    @property
    def flags(self) -> Mapping[int, str]:
        """Names of the values, if they are codes."""
        return {int(code): name for name, code in (self.variable.flags or {}).items()}

    @property
    def is_code(self) -> bool:
        """Whether the values are names in disguise, whose mean says nothing."""
        return bool(self.flags) or (self.variable.name in CODES_WITHOUT_NAMES and self.values.dtype.kind in "iu")

    def drop(self, axis: str, place: int) -> Selection:
        """One place along an axis, which goes."""
        k = self.dims.index(axis)
        note = f"{axis} {self.labels[axis][place]}"
        shape = (*self.values.shape[:k], *self.values.shape[k + 1 :])
        one = self.values[(*(slice(None),) * k, slice(place, place + 1))]
        return self._without(k, one.reshape(shape), note)

    def mean(self, axis: str) -> Selection:
        """The mean along an axis, which goes. Of codes with names: the share of the first name."""
        k = self.dims.index(axis)
        values, variable, note = self.values, self.variable, f"mean over {axis}"
        if self.flags:
            code, name = next(iter(self.flags.items()))
            values = np.ma.MaskedArray((values.data == code).astype(float), mask=np.ma.getmaskarray(values))
            variable = replace_words(variable, flags=None, dtype="float64", units=f"share {name}")
        with np.errstate(invalid="ignore"):  # infinities of both signs have no mean
            averaged = np.ma.MaskedArray(values.astype(float).mean(axis=k))
        averaged = np.ma.masked_where(np.isnan(averaged.data), averaged)
        return replace(self._without(k, averaged, note), variable=variable)

    def _without(self, k: int, values: np.ma.MaskedArray, note: str) -> Selection:
        dims = tuple(d for j, d in enumerate(self.dims) if j != k)
        labels = {d: self.labels[d] for d in dims}
        return Selection(self.variable, dims, np.ma.MaskedArray(values), labels, (*self.notes, note))


def replace_words(variable: Variable, **changes: object) -> Variable:
    """A variable that differs in some respects, without the checks of a declaration."""
    copy = object.__new__(Variable)
    for name in Variable.__dataclass_fields__:
        object.__setattr__(copy, name, changes.get(name, getattr(variable, name)))
    return copy


def find(trace: Trace, name: str) -> Variable:
    """The variable of this name; texts and extents (`n_step`) are variables too."""
    if name in trace.variables:
        return trace.variables[name]
    if name in TEXTS:
        return replace_words(Variable("text", (), "", TEXTS[name]), name=name, dtype="object")
    if name.startswith("n_") and name[2:] in trace.axes:
        return replace_words(Variable("count", (), "1", f"places along the axis {name[2:]}"), name=name, dtype="int32")
    known = [*trace.variables, *TEXTS, *(f"n_{axis}" for axis in trace.axes if axis not in trace.coords)]
    raise ProbeError(f"{trace.path.name} has no variable `{name}`; {nearest(name, known)}")


def select(
    trace: Trace,
    name: str,
    *,
    sample: Pick = None,
    step: Pick = None,
    layer: Pick = None,
    head: Pick = None,
    mean: Sequence[str] = (),
    at: Mapping[str, Pick] | None = None,
) -> Selection:
    """Read a part of a variable. `sample` counts as the run does (`trace.samples`); `at` picks along any axis."""
    variable = find(trace, name)
    picks = {"step": step, "layer": layer, "head": head, **(at or {})}
    picks = {axis: pick for axis, pick in picks.items() if pick is not None}
    dims = ("sample", *variable.dims)
    for axis in (*picks, *mean):
        if axis not in dims:
            raise ProbeError(f"`{name}` has no axis `{axis}`; its axes are {', '.join(dims)}")
    samples = [str(s) for s in trace.samples.tolist()]
    rows, one_sample = places(samples, sample, "sample", trace, names_only=True)
    values = _stack(trace, variable, rows)
    labels = {"sample": tuple(samples[r] for r in rows)}
    for axis, length in zip(variable.dims, values.shape[1:], strict=True):
        labels[axis] = tuple(trace.coords.get(axis, [str(i) for i in range(length)]))
    chosen = Selection(variable, dims, values, labels)
    if one_sample:
        chosen = chosen.drop("sample", 0)
    for axis, pick in picks.items():
        k = chosen.dims.index(axis)
        kept, single = places(chosen.labels[axis], pick, axis, trace)
        if single:
            chosen = chosen.drop(axis, kept[0])
        else:
            words = {**chosen.labels, axis: tuple(chosen.labels[axis][i] for i in kept)}
            chosen = replace(chosen, values=np.ma.MaskedArray(chosen.values.take(kept, axis=k)), labels=words)
    for axis in mean:
        if axis in chosen.dims:
            if chosen.is_text:
                raise ProbeError(f"`{name}` is text, which has no mean; leave out mean")
            chosen = chosen.mean(axis)
    return chosen


def _stack(trace: Trace, variable: Variable, rows: Sequence[int]) -> np.ma.MaskedArray:
    """Rows of a variable, (rows, *axes), masked where a sample is shorter than the longest of them."""
    if variable.dtype == "object" or variable.name not in trace.variables:
        return np.ma.MaskedArray(trace.array(variable.name)[list(rows)])
    parts = [_plain(trace.row(variable.name, r)) for r in rows]
    if not parts:
        return np.ma.MaskedArray(np.zeros((0, *(trace.axes.get(a, 0) for a in variable.dims))))
    shape = tuple(max(p.shape[k] for p in parts) for k in range(parts[0].ndim))
    out = np.ma.MaskedArray(np.zeros((len(rows), *shape), parts[0].dtype), mask=True)
    for k, part in enumerate(parts):
        place: tuple[Any, ...] = (k, *(slice(n) for n in part.shape))
        out[place] = part if part.ndim else part.item()
        recorded = trace.checksums(rows[k]).get(variable.name, 0) >= 0
        if not recorded:
            out[k] = np.ma.masked
    if out.dtype.kind == "f":
        out = np.ma.masked_where(np.isnan(out.data), out)
    return np.ma.MaskedArray(out)


def _plain(values: np.ndarray) -> np.ndarray:
    """Values of a type that is no number (a record, say) as texts."""
    if values.dtype.kind in "biufO":
        return values
    return np.array([str(v) for v in values.ravel()], dtype=object).reshape(values.shape)


def places(
    labels: Sequence[str], pick: Pick, axis: str, trace: Trace, *, names_only: bool = False
) -> tuple[list[int], bool]:
    """Which places of an axis a pick means, and whether it means a single one.

    With `names_only` numbers are labels (numbers of samples), not positions.
    """
    if pick is None:
        return list(range(len(labels))), False
    words = [w.strip() for w in str(pick).split(",")]
    found: list[int] = []
    for word in words:
        match = re.fullmatch(r"(-?\d+)\.\.(-?\d+)", word)
        if names_only and match:
            low, high = int(match[1]), int(match[2])
            inside = [i for i, label in enumerate(labels) if low <= int(label) <= high]
            if not inside:
                raise _outside(labels, word, axis, trace)
            found += inside
        elif word in labels and (names_only or not labels[0].isdigit()):
            found.append(labels.index(word))
        elif match and not names_only:
            ends = [_index(labels, int(end), word, axis, trace) for end in match.groups()]
            if ends[1] < ends[0]:
                raise ProbeError(f"{axis} `{word}` ends before it begins; write {match[2]}..{match[1]}")
            found += range(ends[0], ends[1] + 1)
        elif re.fullmatch(r"-?\d+", word) and not (names_only and word != "-1"):
            found.append(_index(labels, int(word), word, axis, trace))
        else:
            raise _outside(labels, word, axis, trace)
    return found, len(words) == 1 and ".." not in words[0]


def _index(labels: Sequence[str], number: int, word: str, axis: str, trace: Trace) -> int:
    if not -len(labels) <= number < len(labels):
        raise _outside(labels, word, axis, trace)
    return number % len(labels)


def _outside(labels: Sequence[str], word: str, axis: str, trace: Trace) -> ProbeError:
    numbers = all(label.isdigit() for label in labels)
    if not labels:
        have = "none"
    elif numbers and [int(x) for x in labels] == list(range(int(labels[0]), int(labels[0]) + len(labels))):
        have = labels[0] if len(labels) == 1 else f"{labels[0]}..{labels[-1]}"
    else:
        have = ", ".join(labels) if len(labels) <= 12 else f"{', '.join(labels[:10])}, …, {labels[-1]}"
    if re.fullmatch(r"-?\d+(\.\.-?\d+)?", word):
        return ProbeError(f"{trace.path.name} has no {axis} {word}; it has {axis} {have}")
    hint = "" if numbers else f" ({nearest(word, list(labels))})"
    form = "write a number, a range such as 4..8, or a list such as 1,3"
    return ProbeError(f"{axis} `{word}` cannot be understood{hint}; it has {axis} {have}; {form}")
