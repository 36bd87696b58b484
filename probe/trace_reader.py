"""A trace that is read as it is asked for. `probe.trace.open_trace` makes one; HDF5 itself is not known here."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from probe.errors import ProbeError
from probe.registry import nearest
from probe.trace_schema import TEXTS, SampleRecord, TraceHeader, Variable
from probe.trace_summary import summarize


@dataclass
class Contents:
    """What an open file holds: its description, already read, and its arrays by name, which are read when sliced.

    `data` are the arrays (texts of dtype object), those of groups as `pictures/data`; `notes` the attributes of each
    array that are meant for people; `axes` the length of every axis; `close` closes the file.
    """

    attrs: dict[str, Any]
    axes: dict[str, int]
    coords: dict[str, tuple[str, ...]]
    variables: dict[str, Variable]
    data: Mapping[str, Any]
    notes: Mapping[str, Mapping[str, Any]]
    dims: Mapping[str, tuple[str, ...]]
    close: Callable[[], None] = field(default=lambda: None)


class Trace:
    """A trace, open for reading. Close it, or use it in a `with` block.

    `sample(i)`, `record(i)`, `row(name, i)` and `picture(i)` count rows of this file, `0 <= i < n_samples`.
    `samples[i]` is the number of that sample in the data of the run: the same, unless the file is a shard.
    """

    def __init__(self, path: Path, contents: Contents) -> None:
        self.path = path
        self.partial = path.name.endswith(".partial")
        self.attrs = contents.attrs
        self.axes = contents.axes
        self.coords = contents.coords
        self.variables = contents.variables
        self.n_samples = contents.axes.get("sample", 0)
        self.header = TraceHeader.from_attributes(contents.attrs, contents.coords)
        self._closed = False
        self._contents = contents
        self._data = contents.data
        self._columns: list[str] = []
        if "checksums/variable" in self._data:
            self._columns = [str(n) for n in self.array("checksums/variable")]

    def declared(self) -> list[Variable]:
        """The variables that the run declared: all but `score`."""
        return [v for n, v in self.variables.items() if n != "score"]

    @property
    def samples(self) -> np.ndarray:
        """Numbers of the samples in the data of the run, (n_samples,) int64."""
        return np.asarray(self._data["sample"][...])

    # ---------------------------------------------------------------- whole variables

    def array(self, name: str) -> np.ndarray:
        """All samples of a variable, (n_samples, *axes), filled where one is shorter; texts as str objects."""
        return self._read(name, ...)

    def _read(self, name: str, index: Any) -> np.ndarray:
        if self._closed:
            raise ProbeError(f"{self.path.name} was closed; open it again to read `{name}`")
        if name not in self._data:
            known = [*self.variables, *(n for n in self._data if "/" not in n and n not in self.variables)]
            raise ProbeError(f"{self.path.name} has no variable `{name}`; {nearest(name, known)}")
        data = self._data[name]
        try:
            values = data.asstr(errors="replace")[index] if data.dtype == object else data[index]
        except (OSError, RuntimeError, IndexError, ValueError, TypeError) as error:
            why = str(error).split("\n", 1)[0]
            raise ProbeError(f"{self.path.name}: `{name}` cannot be read ({why}); `probe verify` says more") from error
        return np.asarray(values, dtype=object) if data.dtype == object else np.asarray(values)

    # ---------------------------------------------------------------- one sample

    def extents(self, i: int) -> dict[str, int]:
        """The real length of every axis for row `i`; 0 along ragged axes for a failed sample."""
        self._check_row(i)
        return {
            axis: int(self._read(f"n_{axis}", i)) if f"n_{axis}" in self._data else length
            for axis, length in self.axes.items()
            if axis != "sample"
        }

    def row(self, name: str, i: int) -> np.ndarray:
        """One sample of a variable, cut to its real extents."""
        extents = self.extents(i)
        dims = self.variables[name].dims if name in self.variables else ()
        return self._read(name, (i, *(slice(extents.get(axis)) for axis in dims)))

    def padded_row(self, name: str, i: int) -> np.ndarray:
        """One sample of a variable as it is stored, with the fill along axes on which others are longer."""
        self._check_row(i)
        return self._read(name, i)

    def record(self, i: int) -> SampleRecord:
        """Row `i` as it was written, with the variables that the sample recorded."""
        self._check_row(i)
        text = {name: str(self._read(name, i)) for name in TEXTS}
        sums = self.checksums(i)
        names = [] if text["failed"] else [v.name for v in self.declared() if sums.get(v.name, 0) >= 0]
        return SampleRecord(
            sample=int(self._read("sample", i)),
            references=tuple(json.loads(text.pop("reference"))),
            score=float(self._read("score", i)),
            arrays={n: self.row(n, i) for n in names},
            picture=self.picture(i),
            **text,
        )

    def sample(self, i: int) -> dict[str, Any]:
        """Row `i`: `sample`, `score`, the texts (`references` as a tuple), and every variable that it recorded."""
        record = self.record(i)
        texts = {n: t for n, t in record.texts().items() if n != "reference"}
        own = {"sample": record.sample, **texts, "references": record.references, "score": record.score}
        return {**own, **record.arrays}

    def picture(self, i: int) -> bytes | None:
        """The PNG of row `i`, if one was stored."""
        self._check_row(i)
        offset = int(self._read("pictures/offset", i)) if "pictures/offset" in self._data else -1
        if offset < 0:
            return None
        length = int(self._read("pictures/length", i))
        return bytes(self._read("pictures/data", slice(offset, offset + length)).tobytes())

    def checksums(self, i: int) -> dict[str, int]:
        """CRC-32 of row `i` by variable (`record`: what is not an array); -1 where nothing was recorded."""
        row = self._read("checksums/crc32", i).tolist() if self._columns else []
        return dict(zip(self._columns, row, strict=True))

    def _check_row(self, i: int) -> None:
        if not 0 <= i < self.n_samples:
            held = f"{self.n_samples} samples, counted from 0" if self.n_samples else "no samples"
            raise ProbeError(f"{self.path.name} has no row {i}: it holds {held}")

    # ---------------------------------------------------------------- the whole

    def summary(self) -> dict[str, Any]:
        """Scores, seconds, FLOPs, retention: see `probe.trace_summary.summarize`."""
        return summarize(self)

    def to_xarray(self) -> Any:
        """An `xarray.Dataset`: lazy if the file is finished, in memory if it is partial."""
        try:
            import h5netcdf  # noqa: F401
            import xarray
        except ImportError as error:
            raise ProbeError(f"to_xarray needs {error.name}: pip install 'dmllm-probe[xarray]'") from error
        if not self.partial:
            return xarray.open_dataset(self.path, engine="h5netcdf")
        # only our reader knows the journal of a partial file, so xarray cannot open that by itself
        held = {
            name: (dims, self.array(name), dict(self._contents.notes[name]))
            for name, dims in self._contents.dims.items()
            if "/" not in name
        }
        return xarray.Dataset(held, attrs=self.attrs)

    def plot(
        self, figure: str | None = None, *, sample: int | None = None, layer: int | None = None, step: int | None = None
    ) -> Any:
        """A figure as matplotlib's own object, which a notebook shows; `probe plot --list` names the figures."""
        from probe.views.figures import draw  # views stand above the trace: only who asks for a picture pays for them

        return draw([self.path], figure, sample=sample, layer=layer, step=step)

    def close(self) -> None:
        """Close the file."""
        self._closed = True
        self._contents.close()

    def __enter__(self) -> Self:
        """The trace itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()

    def __del__(self) -> None:
        """A notebook rarely closes what it opened."""
        with contextlib.suppress(Exception):
            self.close()

    def __repr__(self) -> str:
        """Some lines that say what is in it."""
        state = " — partial: the run has not finished" if self.partial else ""
        head = self.header
        lines = [
            f"Trace({str(self.path)!r}){state}",
            f"  recipe {head.recipe_name} · backbone {head.backbone} · {self.n_samples} samples",
        ]
        width = max((len(n) for n in self.variables), default=0)
        for name, v in self.variables.items():
            lines.append(f"  {name:{width}}  ({', '.join(('sample', *v.dims))})  {v.dtype}  [{v.units}]")
        return "\n".join(lines)
