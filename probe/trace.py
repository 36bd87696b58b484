"""The trace: one HDF5 file per run. Write, read, merge, verify. The only file that imports h5py.

Samples are stacked on an unlimited `sample` axis, every axis is an HDF5 dimension scale, and the file follows netCDF4,
so that `xarray.open_dataset(path, engine="h5netcdf")` reads it with no code of ours. `docs/trace.md` has the format.
What the values mean is not known here: a variable is a name, axes and units that the caller declared.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import h5py
import numpy as np

from probe.errors import ProbeError
from probe.registry import nearest
from probe.trace_journal import PAGE, Busy, JournaledFile, Lock, snapshot, with_journal
from probe.trace_schema import (
    CONVENTIONS,
    TEXTS,
    SampleRecord,
    TraceHeader,
    Variable,
    check_array,
    describe,
    extents_of,
    header_crc,
    record_crc,
)
from probe.trace_summary import problems, summarize

__all__ = ["SampleRecord", "Trace", "TraceHeader", "TraceWriter", "Variable", "merge", "open_trace", "verify"]

_BARE_AXIS = "This is a netCDF dimension but not a netCDF variable."
_SMALL = 16 << 10  # bytes per sample up to which a variable is stored uncompressed, many samples to a chunk
_LARGEST_CHUNK = 1 << 20
_CHUNK = {"step": 4, "layer": 8, "head": 8}  # places per chunk along these axes; the whole axis along others
_TEXT = h5py.string_dtype("utf-8")


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _journal(partial: Path) -> Path:
    return partial.with_name(partial.name + ".journal")


def _why(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error).split("\n", 1)[0] or type(error).__name__


class TraceWriter:
    """Writes `path` as `path.partial`, one sample at a time, and renames it when it is complete.

    After each `write` the file holds that sample whatever happens to the process: see `probe.trace_journal`. Leaving
    the `with` block by an exception keeps the partial file, which opens and which `resume=True` continues.

    `resume` continues a partial file (or a complete one: a run that is given more samples); without it, a file that
    is already there is refused unless `overwrite`. `done` are the samples in the file, failed ones included.
    """

    def __init__(
        self,
        path: Path,
        header: TraceHeader,
        variables: Sequence[Variable],
        *,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        self.header = header
        self.variables: dict[str, Variable] = {v.name: v for v in variables}
        self._partial = _partial(self.path)
        self._broken = ""
        self._closed = False
        self._every = 1  # samples per commit; merging, which can be repeated, takes more
        self._pending = 0
        self._h5: h5py.File | None = None
        self._rows: set[int] = set()
        self._sizes: dict[str, int] = {}
        self._pictures: dict[tuple[int, int], int] = {}  # (crc, length) -> offset: questions often share a picture
        self._check_declarations(variables)
        with contextlib.ExitStack() as undo:
            self._open(undo, resume, overwrite)
            undo.pop_all()

    def _check_declarations(self, variables: Sequence[Variable]) -> None:
        names = [v.name for v in variables]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ProbeError(f"trace {self.path.name}: variable `{twice[0]}` is declared twice")
        axes = {axis for v in variables for axis in v.dims} | set(self.header.coords)
        extents = {f"n_{axis}" for axis in axes - set(self.header.coords)}
        clash = sorted((axes | extents) & set(names)) + sorted(axes & set(TEXTS)) + sorted(axes & {"sample", "score"})
        if clash:
            raise ProbeError(
                f"trace {self.path.name}: `{clash[0]}` names a variable and an axis (or its extent); rename one"
            )

    # ---------------------------------------------------------------- opening

    def _open(self, undo: contextlib.ExitStack, resume: bool, overwrite: bool) -> None:
        source = self._partial
        if self.path.is_dir():
            raise ProbeError(f"cannot write the trace {self.path}: it is a folder; name a file, such as run.trace.h5")
        if self.path.exists() and not overwrite:
            if not resume:
                raise ProbeError(f"{self.path} is already there; choose another name, resume it, or remove it first")
            if not self._partial.exists():
                source = self.path  # a complete trace gets more samples; it is renamed once it is known to fit
        created = not source.exists()
        try:
            self._main: BinaryIO = os.fdopen(os.open(source, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        except OSError as error:
            right = "create the folder" if not self.path.parent.is_dir() else "choose a folder that you may write to"
            raise ProbeError(f"cannot write the trace {self.path}: {_why(error)}; {right}") from error
        undo.callback(self._main.close)
        in_use = (
            f"cannot write {self.path}: another process is writing it or has it open; "
            "wait for that run, close that reader, or choose another name"
        )
        try:
            self._lock = Lock(self._main, source)
        except Busy as busy:
            raise ProbeError(f"{in_use}{f' ({busy})' if str(busy) else ''}") from busy
        undo.callback(self._lock.release)
        if not source.exists() or not os.path.samestat(os.fstat(self._main.fileno()), source.stat()):
            raise ProbeError(in_use)  # the other run finished, and renamed the file, between our two calls
        journal = _journal(self._partial)
        if overwrite and not resume:
            journal.unlink(missing_ok=True)
            self._main.truncate(0)
        self._file = JournaledFile(self._main, journal, self._token())
        undo.callback(self._file.close)
        try:
            self._file.recover()
            self._file.seek(0)
            if self._file.read(PAGE).strip(b"\0"):
                if not resume and not overwrite:
                    raise ProbeError(
                        f"{self._partial} holds samples of a run that was stopped; resume it, or remove it first"
                    )
                self._resume(source)
            else:
                if created:
                    undo.callback(self._partial.unlink, missing_ok=True)
                self._create()
        except (OSError, RuntimeError, KeyError) as error:
            right = "free some space" if isinstance(error, OSError) and error.errno else "remove it to start again"
            raise ProbeError(f"cannot write the trace {self._partial}: {_why(error)}; {right}") from error
        if source != self._partial:
            os.replace(source, self._partial)

    def _token(self) -> bytes:
        """Marks the file and its journal as belonging together; 16 characters, the same for the same header."""
        return sha256(json.dumps(self.header.attributes(), sort_keys=True).encode()).hexdigest()[:16].encode()

    def _create(self) -> None:
        """The file without samples and without the declared variables (their chunks need the first sample's size)."""
        self._h5 = h5 = h5py.File(self._file, "w")
        h5.attrs["trace_id"] = np.bytes_(self._token())  # first, to stand in page 0
        attributes = self.header.attributes()
        if "default_plot" not in attributes:
            plots = [v.name for v in self.variables.values() if len(v.dims) >= 2] + list(self.variables)
            attributes["default_plot"] = (plots or ["score"])[0]
        for name, value in attributes.items():
            h5.attrs[name] = value
        h5.attrs["header_crc32"] = header_crc(attributes, self.header.coords, self.variables.values())
        index = h5.create_dataset("sample", (0,), "<i8", maxshape=(None,), chunks=(1024,))
        index.make_scale("sample")
        _describe(index, units="1", long_name="number of the sample in the data of the run, before sharding")
        for axis, names in self.header.coords.items():
            scale = h5.create_dataset(axis, (len(names),), _TEXT, data=np.array(list(names), dtype=object))
            scale.make_scale(axis)
        for name, meaning in TEXTS.items():
            _stacked(h5, name, (), _TEXT, None)
            _describe(h5[name], long_name=meaning)
        _stacked(h5, "score", (), "<f8", float("nan"))
        _describe(h5["score"], units="1", long_name="score of the answer; NaN without a reference or after a failure")
        pictures = h5.create_group("pictures")
        _bare_scale(pictures, "sample", 0)
        data = pictures.create_dataset("data", (0,), "u1", maxshape=(None,), chunks=(64 << 10,))
        data.dims[0].attach_scale(_bare_scale(pictures, "byte", 0))
        _describe(data, units="1", long_name="PNG files, one after the other")
        for name, meaning in (("offset", "first byte of the picture in data; -1: none"), ("length", "its bytes")):
            _stacked(pictures, name, (), "<i8", -1)
            _describe(pictures[name], units="byte", long_name=meaning)
        checksums = h5.create_group("checksums")
        _bare_scale(checksums, "sample", 0)
        columns = ["record", "picture", *self.variables]
        checksums.create_dataset("variable", data=np.array(columns, dtype=object), dtype=_TEXT).make_scale("variable")
        _stacked(checksums, "crc32", ("variable",), "<i8", -1, chunk=(64, len(columns)))
        _describe(checksums["crc32"], units="1", long_name="CRC-32 of the stored bytes of one sample; -1: not recorded")
        self._commit()
        self._index()

    def _resume(self, source: Path) -> None:
        self._h5 = h5 = h5py.File(self._file, "r+")
        there = Trace(source, h5)
        if h5.attrs.get("Conventions") != CONVENTIONS:
            raise ProbeError(f"cannot resume {source}: it is not a trace; remove it or choose another name")
        differences = []
        for name in ("recipe_hash", "backbone", "weights_revision", "dtype"):
            old, new = getattr(there.header, name), getattr(self.header, name)
            if old != new:
                differences.append(f"{name} was `{old}` and is now `{new}`")
        differences += [
            f"axis `{axis}` was {list(there.coords.get(axis, ()))} and is now {list(self.header.coords.get(axis, ()))}"
            for axis in sorted({*there.coords, *self.header.coords})
            if list(there.coords.get(axis, ())) != list(self.header.coords.get(axis, ()))
        ]
        old_variables = {n: v for n, v in there.variables.items() if n != "score"}
        if old_variables:
            for name in sorted({*old_variables, *self.variables}):
                if name not in self.variables or name not in old_variables:
                    differences.append(f"variable `{name}` is {'gone' if name in old_variables else 'new'}")
                elif describe(old_variables[name]) != describe(self.variables[name]):
                    differences.append(f"variable `{name}` was declared otherwise")
        if differences:
            raise ProbeError(
                f"cannot resume {source}, which another run wrote: {'; '.join(differences)}. "
                "Repeat that run as it was, or choose another name"
            )
        self._rows = {int(s) for s in there.samples}
        self._index()

    def _index(self) -> None:
        """Collect what a sample is written to."""
        assert self._h5 is not None
        h5 = self._h5
        self._stack: list[h5py.Dataset] = [
            d for group in (h5, h5["pictures"], h5["checksums"]) for d in group.values()
            if isinstance(d, h5py.Dataset) and (d.name.endswith("/sample") or _axes(d)[:1] == ["sample"])
        ]  # fmt: skip
        self._data: dict[str, h5py.Dataset] = {d.name.lstrip("/"): d for d in self._stack}
        self._sizes = {
            axis: len(h5[axis]) for v in self.variables.values() if v.name in h5 for axis in v.dims
        }  # fmt: skip
        self._columns: list[str] = list(h5["checksums/variable"].asstr()[...])

    def _create_variables(self, extents: Mapping[str, int]) -> None:
        """Declared variables, with chunks that suit a sample of these extents (16 along an axis that it lacks)."""
        assert self._h5 is not None
        h5 = self._h5
        for axis in sorted({a for v in self.variables.values() for a in v.dims} - set(self.header.coords)):
            _bare_scale(h5, axis, 0)
            _stacked(h5, f"n_{axis}", (), "<i4", 0)
            _describe(h5[f"n_{axis}"], units="1", long_name=f"places of the sample along the axis {axis}")
        for v in self.variables.values():
            lengths = [extents.get(axis, 16) for axis in v.dims]
            chunk, compressed = _chunk_shape(v, lengths)
            data = _stacked(h5, v.name, v.dims, f"<{np.dtype(v.dtype).str[1:]}", v.fill_value, chunk, compressed)
            _describe(data, units=v.units, long_name=v.long_name, formula=v.formula, probe=v.probe)
            if v.flags:
                data.attrs["flag_values"] = np.array(list(v.flags.values()), dtype=v.dtype)
                data.attrs["flag_meanings"] = " ".join(name.lower() for name in v.flags)
        self._index()

    # ---------------------------------------------------------------- writing

    @property
    def done(self) -> frozenset[int]:
        """Numbers of the samples that the file holds, failed ones included."""
        return frozenset(self._rows)

    def write(self, record: SampleRecord) -> None:
        """Append one sample; when this returns, the file holds it even if the process is killed."""
        where = f"trace {self.path.name}, sample {record.sample}"
        if self._closed or self._broken:
            raise ProbeError(f"{where}: cannot write, {self._broken or 'the file is closed'}")
        if record.sample in self._rows:
            raise ProbeError(f"{where}: the file already holds this sample; skip those in `done`")
        if record.failed and record.arrays:
            raise ProbeError(f"{where}: a failed sample cannot have arrays ({', '.join(record.arrays)})")
        for name in record.arrays:
            if name not in self.variables:
                raise ProbeError(f"{where}: variable `{name}` was not declared; {nearest(name, list(self.variables))}")
        arrays = {n: check_array(self.variables[n], a, where) for n, a in record.arrays.items()}
        extents = extents_of(arrays, self.variables, self.header.coords, where)
        try:
            self._append(record, arrays, extents)
            self._rows.add(int(record.sample))
            self._pending += 1
            if self._pending >= self._every:
                self._commit()
        except BaseException as error:  # a disk that is full, or an interrupt: what HDF5 has in memory is half a sample
            self._broken = f"writing failed before ({_why(error)})"
            self._rows.discard(int(record.sample))
            if isinstance(error, OSError | RuntimeError):
                right = "free some space and resume" if isinstance(error, OSError) else "resume the run"
                raise ProbeError(f"{where}: {_why(error)}; {right}. {self._partial} keeps what it had") from error
            raise

    def _append(self, record: SampleRecord, arrays: Mapping[str, np.ndarray], extents: Mapping[str, int]) -> None:
        assert self._h5 is not None
        ragged = {axis: n for axis, n in extents.items() if axis not in self.header.coords}
        if arrays and not self._has_variables():
            self._create_variables(extents)
        for axis, length in ragged.items():
            if length > self._sizes.get(axis, 0):
                self._lengthen(axis, length)
        row = len(self._h5["sample"])
        for data in self._stack:
            data.id.set_extent((row + 1, *data.shape[1:]))
        stored = self._data
        _put(stored["sample"], row, np.array(record.sample, "<i8"))
        _put(stored["score"], row, np.array(record.score, "<f8"))
        for name, text in record.texts().items():
            stored[name][row] = text
        for axis, length in ragged.items():
            _put(stored[f"n_{axis}"], row, np.array(length, "<i4"))
        crcs = {"record": record_crc(record, ragged)}
        for name, array in arrays.items():
            _put(stored[name], row, array)
            crcs[name] = zlib.crc32(array.tobytes())
        if record.picture is not None:
            crcs["picture"] = zlib.crc32(record.picture)
            _put(stored["pictures/offset"], row, np.array(self._picture(record.picture), "<i8"))
            _put(stored["pictures/length"], row, np.array(len(record.picture), "<i8"))
        _put(stored["checksums/crc32"], row, np.array([crcs.get(c, -1) for c in self._columns], "<i8"))

    def _picture(self, png: bytes) -> int:
        """Where the picture stands in `pictures/data`; one that the run wrote before is not written again."""
        assert self._h5 is not None
        key = (zlib.crc32(png), len(png))
        data: h5py.Dataset = self._h5["pictures/data"]
        offset = self._pictures.get(key)
        if offset is None or data[offset : offset + len(png)].tobytes() != png:
            offset = self._pictures[key] = len(data)
            self._h5["pictures/byte"].resize((offset + len(png),))
            data.resize((offset + len(png),))
            data[offset:] = np.frombuffer(png, "u1")
        return offset

    def _has_variables(self) -> bool:
        return all(name in self._data for name in self.variables)

    def _lengthen(self, axis: str, length: int) -> None:
        assert self._h5 is not None
        self._sizes[axis] = length
        self._h5[axis].resize((length,))
        for v in self.variables.values():
            if axis in v.dims:
                self._data[v.name].resize(length, 1 + v.dims.index(axis))

    def _commit(self) -> None:
        assert self._h5 is not None
        self._h5.flush()
        self._file.commit()
        self._pending = 0

    # ---------------------------------------------------------------- closing

    def close(self) -> Path:
        """Finish: the partial file takes its name. Repeating it does nothing."""
        if self._closed:
            return self.path
        if self._broken:
            self._abandon()
            raise ProbeError(f"trace {self.path.name} is not complete: {self._broken}; {self._partial} can be resumed")
        assert self._h5 is not None
        try:
            if not self._has_variables():
                self._create_variables({})
                for data in self._stack:
                    data.id.set_extent((len(self._rows), *data.shape[1:]))
            self._commit()
            self._h5.close()
            self._file.commit()
            self._file.finish()
            if os.name == "nt":  # an open file cannot be renamed there
                self._main.close()
            os.replace(self._partial, self.path)
        except (OSError, RuntimeError) as error:
            self._broken = _why(error)
            self._abandon()
            raise ProbeError(
                f"cannot finish the trace {self.path}: {_why(error)}; {self._partial} can be resumed"
            ) from error
        self._release()
        return self.path

    def _abandon(self) -> None:
        """Let go of the partial file as it was after the last complete sample."""
        if not self._closed and self._h5 is not None:
            with contextlib.suppress(Exception):
                self._h5.close()  # into memory: nothing reaches the disk without a commit
            self._release()

    def _release(self) -> None:
        self._closed = True
        self._file.close()
        self._lock.release()
        self._main.close()

    def __enter__(self) -> Self:
        """The writer."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Finish, or keep the partial file if the block failed."""
        if kind is None:
            self.close()
        else:
            self._abandon()


class Trace:
    """A trace that is read as it is asked for. `open_trace` makes one; close it, or use it in a `with` block.

    `sample(i)`, `record(i)` and `picture(i)` count rows of this file, `0 <= i < n_samples`; `samples[i]` is the number
    of that sample in the data of the run (the same, unless the file is a shard or was resumed out of order).
    """

    def __init__(self, path: Path, h5: h5py.File, closing: contextlib.ExitStack | None = None) -> None:
        self.path = path
        self.partial = path.name.endswith(".partial")
        self._h5 = h5
        self._closing = closing or contextlib.ExitStack()
        self.attrs: dict[str, Any] = {k: _plain(v) for k, v in h5.attrs.items()}
        self.coords: dict[str, tuple[str, ...]] = {}
        self.axes: dict[str, int] = {}
        self.variables: dict[str, Variable] = {}
        for name, data in h5.items():
            if not isinstance(data, h5py.Dataset):
                continue
            if h5py.h5ds.is_scale(data.id):
                self.axes[name] = len(data)
                if data.dtype == object:
                    self.coords[name] = tuple(data.asstr()[...])
            elif name not in TEXTS and not name.startswith("n_"):
                self.variables[name] = _variable(name, data)
        self.n_samples = self.axes.get("sample", 0)
        self.header = TraceHeader.from_attributes(self.attrs, self.coords)
        columns = h5["checksums/variable"].asstr()[...] if "checksums/variable" in h5 else ()
        self._column: dict[str, int] = {str(n): i for i, n in enumerate(columns)}

    @property
    def samples(self) -> np.ndarray:
        """Numbers of the samples in the data of the run, (n_samples,) int64."""
        return np.asarray(self._h5["sample"][...])

    def array(self, name: str) -> np.ndarray:
        """All samples of a variable, (n_samples, *axes), filled where a sample is shorter; texts as str objects."""
        data = self._dataset(name)
        return np.asarray(data.asstr(errors="replace")[...] if data.dtype == object else data[...])

    def _dataset(self, name: str) -> h5py.Dataset:
        if name not in self._h5 or not isinstance(self._h5[name], h5py.Dataset):
            known = [*self.variables, *TEXTS, *(n for n in self._h5 if n.startswith("n_"))]
            raise ProbeError(f"{self.path.name} has no variable `{name}`; {nearest(name, known)}")
        return self._h5[name]

    def extents(self, i: int) -> dict[str, int]:
        """The real lengths of every axis for row `i`; 0 for a failed sample."""
        self._check_row(i)
        known = dict(self.axes)
        known.pop("sample", None)
        return {a: int(self._h5[f"n_{a}"][i]) if f"n_{a}" in self._h5 else n for a, n in known.items()}

    def row(self, name: str, i: int) -> np.ndarray:
        """One sample of a variable, cut to its real extents."""
        extents = self.extents(i)
        data = self._dataset(name)
        if data.ndim == 0 or name not in self.variables:
            return np.asarray(data[i])
        return np.asarray(data[(i, *(slice(extents.get(axis)) for axis in self.variables[name].dims))])

    def padded_row(self, name: str, i: int) -> np.ndarray:
        """One sample of a variable as it is stored, with the fill of axes on which others are longer."""
        self._check_row(i)
        return np.asarray(self._dataset(name)[i])

    def record(self, i: int) -> SampleRecord:
        """Row `i` as it was written; only variables that the sample recorded."""
        self._check_row(i)
        text = {name: str(self._h5[name].asstr(errors="replace")[i]) for name in TEXTS}
        crcs = self.checksums(i)
        names = [n for n in self.variables if crcs.get(n, 0) >= 0 and n != "score"]
        return SampleRecord(
            sample=int(self._h5["sample"][i]),
            references=tuple(json.loads(text.pop("reference"))),
            score=float(self._h5["score"][i]),
            arrays={} if text["failed"] else {n: self.row(n, i) for n in names},
            picture=self.picture(i),
            **text,
        )

    def sample(self, i: int) -> dict[str, Any]:
        """Row `i`: `sample`, `score`, the texts (`references` as a tuple), and every recorded variable, cut to size."""
        record = self.record(i)
        texts = {n: t for n, t in record.texts().items() if n != "reference"}
        own = {"sample": record.sample, **texts, "references": record.references, "score": record.score}
        return {**own, **record.arrays}

    def picture(self, i: int) -> bytes | None:
        """The PNG of row `i`, if one was stored."""
        self._check_row(i)
        if "pictures/offset" not in self._h5 or (offset := int(self._h5["pictures/offset"][i])) < 0:
            return None
        length = int(self._h5["pictures/length"][i])
        return bytes(self._h5["pictures/data"][offset : offset + length].tobytes())

    def checksums(self, i: int) -> dict[str, int]:
        """Stored CRC-32 of row `i` by variable (`record`: what is not an array); -1 where nothing was recorded."""
        if not self._column:
            return {}
        row = self._h5["checksums/crc32"][i]
        return {name: int(row[k]) for name, k in self._column.items()}

    def _check_row(self, i: int) -> None:
        if not 0 <= i < self.n_samples:
            raise ProbeError(f"{self.path.name} has no row {i}; it holds {self.n_samples} samples, counted from 0")

    def summary(self) -> dict[str, Any]:
        """Scores, seconds, FLOPs, retention: see `probe.trace_summary.summarize`."""
        return summarize(self)

    def to_xarray(self) -> Any:
        """An `xarray.Dataset`; lazy for a finished file, in memory for a partial one."""
        try:
            import h5netcdf  # noqa: F401
            import xarray
        except ImportError as error:
            raise ProbeError(f"to_xarray needs {error.name}: pip install 'dmllm-probe[xarray]'") from error
        if not self.partial:
            return xarray.open_dataset(self.path, engine="h5netcdf")
        variables: dict[str, Any] = {}
        for name, data in self._h5.items():
            if isinstance(data, h5py.Dataset) and not _is_bare(data):
                dims = [name] if h5py.h5ds.is_scale(data.id) else _axes(data)
                kept = {
                    k: _plain(v) for k, v in data.attrs.items()
                    if k not in ("CLASS", "NAME", "DIMENSION_LIST", "REFERENCE_LIST", "_FillValue", "_Netcdf4Dimid")
                }  # fmt: skip
                variables[name] = (dims, self.array(name), kept)
        hidden = ("_NCProperties",)
        return xarray.Dataset(variables, attrs={k: v for k, v in self.attrs.items() if k not in hidden})

    def close(self) -> None:
        """Close the file."""
        self._closing.close()

    def __enter__(self) -> Self:
        """The trace."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()

    def __repr__(self) -> str:
        """Some lines that say what is in it."""
        if not self._h5:
            return f"Trace({str(self.path)!r}, closed)"
        lines = [
            f"Trace({str(self.path)!r}){' — partial: the run has not finished' if self.partial else ''}",
            f"  recipe   {self.header.recipe_name}   backbone {self.header.backbone}   samples {self.n_samples}",
        ]
        width = max((len(n) for n in self.variables), default=0)
        for name, v in self.variables.items():
            lines.append(f"  {name:{width}}  ({', '.join(('sample', *v.dims))})  {v.dtype}  [{v.units}]")
        return "\n".join(lines)


def open_trace(path: Path | str) -> Trace:
    """Open a finished or a partial trace for reading. A partial one may still be being written: it is then read as
    it was after its last complete sample.
    """
    path = Path(path)
    if not path.exists():
        if _partial(path).exists():
            raise ProbeError(f"{path} is not finished; what there is so far is in {_partial(path)}")
        near = nearest(path.name, [p.name for p in path.parent.glob("*.h5*")] or ["no trace in this folder"])
        raise ProbeError(f"no such trace: {path}; {near}")
    if path.is_dir():
        raise ProbeError(f"{path} is a folder, not a trace; name one file in it")
    with contextlib.ExitStack() as closing:
        try:
            h5 = _open_for_reading(path, closing)
        except OSError as error:
            raise ProbeError(_unreadable(path, error)) from error
        conventions = _plain(h5.attrs.get("Conventions", ""))
        if conventions != CONVENTIONS:
            said = f"its Conventions are `{conventions}`" if conventions else "it has no Conventions attribute"
            raise ProbeError(f"{path} is an HDF5 file but not a trace: {said}, not `{CONVENTIONS}`")
        try:
            return Trace(path, h5, closing.pop_all())
        except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
            raise ProbeError(f"{path} is damaged: {_why(error)}; restore it from a copy, or run it again") from error


def _open_for_reading(path: Path, closing: contextlib.ExitStack) -> h5py.File:
    journal = _journal(path)
    if not path.name.endswith(".partial"):
        return closing.enter_context(h5py.File(path, "r", locking="best-effort"))
    main = closing.enter_context(open(path, "rb", buffering=0))
    try:
        closing.callback(Lock(main, path, shared=True).release)
        with open(journal, "rb") if journal.exists() else contextlib.nullcontext() as log:
            view = with_journal(main, log)  # type: ignore[arg-type]
    except Busy:  # it is being written now
        copy, view = snapshot(path, journal)
        closing.callback(copy.close)
    if not view.read(PAGE).strip(b"\0"):
        raise ProbeError(f"{path} holds nothing yet: the run was stopped before it began; start it again")
    return closing.enter_context(h5py.File(view, "r"))


def _unreadable(path: Path, error: OSError) -> str:
    with contextlib.suppress(OSError), open(path, "rb") as file:
        head = file.read(8)
        if not head:
            return f"{path} is empty; it is no trace"
        if head != b"\x89HDF\r\n\x1a\n":
            return f"{path} is not an HDF5 file (it begins with {head!r}); traces end in .trace.h5"
        if "truncated" in str(error):
            return f"{path} is cut off ({path.stat().st_size:,} bytes are left); copy it again, or run it again"
        if "lock" in str(error):
            return f"{path} is being written by another process; wait for that run"
    return f"cannot read {path}: {_why(error)}"


def verify(path: Path | str) -> list[str]:
    """What is wrong with a trace, one sentence per problem; empty if every stored value is what was written."""
    try:
        with open_trace(path) as trace:
            return problems(trace)
    except ProbeError as error:
        return [str(error)]


def merge(paths: Sequence[Path], out: Path, *, overwrite: bool = False) -> Path:
    """Join the shards of one run into one file, in the order of their samples. Values are copied, and checked.

    Copied rather than mapped (HDF5 virtual datasets): a map whose shard was moved reads as fill values, silently.
    """
    with contextlib.ExitStack() as stack:
        traces = [stack.enter_context(open_trace(p)) for p in paths]
        if not traces:
            raise ProbeError("nothing to merge: name at least one trace")
        first = traces[0]
        owner: dict[int, tuple[Trace, int]] = {}
        for trace in traces:
            if trace.partial:
                raise ProbeError(f"cannot merge {trace.path}: it is not finished; resume that run first")
            _check_same_run(first, trace)
            for i, sample in enumerate(trace.samples.tolist()):
                if sample in owner:
                    raise ProbeError(
                        f"cannot merge: {owner[sample][0].path} and {trace.path} both hold sample {sample}"
                    )
                owner[sample] = (trace, i)
        names = ", ".join(t.path.name for t in traces)
        header = replace(first.header, extra={**first.header.extra, "merged_from": names})
        variables = [v for n, v in first.variables.items() if n != "score"]
        writer = stack.enter_context(TraceWriter(out, header, variables, overwrite=overwrite))
        writer._every = 64
        for sample in sorted(owner):
            trace, i = owner[sample]
            record = trace.record(i)
            wrong = [p for p in problems(trace, rows=[i]) if p]
            if wrong:
                raise ProbeError(f"cannot merge {trace.path}: {wrong[0]}")
            writer.write(record)
    return Path(out)


def _check_same_run(first: Trace, other: Trace) -> None:
    for name in ("recipe_hash", "backbone", "weights_revision", "dtype", "coords"):
        a, b = getattr(first.header, name), getattr(other.header, name)
        if a != b:
            raise ProbeError(
                f"cannot merge {first.path} and {other.path}: {name} is `{a}` in the first and `{b}` in the second; "
                "only shards of one run can be joined"
            )
    for name in sorted({*first.variables, *other.variables}):
        a, b = first.variables.get(name), other.variables.get(name)
        if a is None or b is None or describe(a) != describe(b):
            raise ProbeError(f"cannot merge {first.path} and {other.path}: they differ in the variable `{name}`")


# -------------------------------------------------------------------- HDF5 details


def _bare_scale(group: h5py.Group, axis: str, length: int) -> h5py.Dataset:
    """An axis without coordinate values, as netCDF4 writes it."""
    scale = group.create_dataset(axis, (length,), ">f4", maxshape=(None,), chunks=(1024,))
    scale.make_scale(f"{_BARE_AXIS} {length:10d}")
    return scale


def _is_bare(data: h5py.Dataset) -> bool:
    name = data.attrs.get("NAME", b"")
    return (name.decode() if isinstance(name, bytes) else str(name)).startswith(_BARE_AXIS)


def _stacked(
    group: h5py.Group,
    name: str,
    dims: Sequence[str],
    dtype: Any,
    fill: float | int | None,
    chunk: tuple[int, ...] | None = None,
    compressed: bool = False,
) -> h5py.Dataset:
    """A variable (sample, *dims) of the present sizes of these axes; axes without names can grow."""
    scales = [group[axis] for axis in ("sample", *dims)]
    data = group.create_dataset(
        name,
        tuple(len(s) for s in scales),
        dtype,
        maxshape=tuple(s.maxshape[0] for s in scales),
        chunks=chunk or (512, *(max(1, len(s)) for s in scales[1:])),
        fillvalue=fill,
        compression="gzip" if compressed else None,
        compression_opts=4 if compressed else None,
        shuffle=compressed,
    )
    for k, scale in enumerate(scales):
        data.dims[k].attach_scale(scale)
    if fill is not None and data.dtype.kind == "f":
        data.attrs["_FillValue"] = np.array([fill], data.dtype)
    return data


def _chunk_shape(variable: Variable, lengths: Sequence[int]) -> tuple[tuple[int, ...], bool]:
    """Chunk shape, and whether to compress: one sample, some steps and layers, all tokens of what is large."""
    size = int(np.prod(lengths, dtype=np.int64)) * np.dtype(variable.dtype).itemsize
    lengths = [max(1, n) for n in lengths]
    if size < _SMALL:
        return (min(512, _SMALL // max(1, size)), *lengths), False
    chunk = [min(n, _CHUNK.get(axis, n)) for axis, n in zip(variable.dims, lengths, strict=True)]
    while np.prod(chunk) * np.dtype(variable.dtype).itemsize > _LARGEST_CHUNK:
        longest = int(np.argmax(chunk))
        chunk[longest] = (chunk[longest] + 1) // 2
    return (1, *chunk), True


def _put(data: h5py.Dataset, row: int, array: np.ndarray) -> None:
    """`data[row, :n0, :n1, …] = array` without h5py's selection machinery, which costs more than the writing."""
    if array.size:
        space = data.id.get_space()
        space.select_hyperslab((row, *(0,) * array.ndim), (1, *array.shape))
        data.id.write(h5py.h5s.create_simple((1, *array.shape)), space, array)


def _describe(data: h5py.Dataset, **attributes: str) -> None:
    for name, value in attributes.items():
        if value:
            data.attrs[name] = value


def _axes(data: h5py.Dataset) -> list[str]:
    """Names of the axes; `axis_k` where a file of others attaches no scale."""
    names = []
    for k in range(data.ndim):
        scales = data.dims[k].values()
        names.append(scales[0].name.rsplit("/", 1)[-1] if scales else f"axis_{k}")
    return names


def _plain(value: Any) -> Any:
    """An attribute as Python data."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, np.ndarray):
        return value.item() if value.size == 1 else value.tolist()
    return value.item() if isinstance(value, np.generic) else value


def _variable(name: str, data: h5py.Dataset) -> Variable:
    """What the file says of a dataset, as the variable that was declared (also if no writer of ours could have)."""
    attrs = {k: _plain(data.attrs[k]) for k in ("units", "long_name", "formula", "probe", "flag_values") if k in data.attrs}
    values, meanings = attrs.pop("flag_values", None), str(_plain(data.attrs.get("flag_meanings", ""))).split()
    flags = None
    if values is not None:
        flags = dict(zip(meanings, values if isinstance(values, list) else [values], strict=False))
    variable = object.__new__(Variable)  # without the checks of a declaration: odd files must be showable
    given = {
        "name": name, "dims": tuple(_axes(data)[1:]), "units": "", "long_name": "", "formula": "", "probe": "",
        "dtype": data.dtype.name, "flags": flags, "fill": None, **attrs,
    }  # fmt: skip
    default = replace_fill(given, data)
    for key, value in default.items():
        object.__setattr__(variable, key, value)
    return variable


def replace_fill(given: dict[str, Any], data: h5py.Dataset) -> dict[str, Any]:
    """Say the fill only where it is not the default of the dtype."""
    with contextlib.suppress(RuntimeError, TypeError, AttributeError):
        fill = data.fillvalue.item()
        usual = float("nan") if data.dtype.kind == "f" else 0 if data.dtype.kind == "u" else -1
        if repr(fill) != repr(type(fill)(usual)):
            given["fill"] = fill
    return given

