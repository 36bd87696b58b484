"""The trace: one HDF5 file per run. Write, open, merge, verify. The only file that imports h5py.

Samples are stacked on an unlimited `sample` axis, every axis is an HDF5 dimension scale, and the file keeps to
netCDF4, so that `xarray.open_dataset(path, engine="h5netcdf")` reads it with no code of ours. `docs/trace.md` has
the format. What values mean is not known here: a variable is a name, axes and units that the caller declared.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
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
from probe.trace_reader import Contents, Trace
from probe.trace_schema import (
    CONVENTIONS,
    TEXTS,
    SampleRecord,
    TraceHeader,
    Variable,
    check_array,
    check_declarations,
    differences,
    extents_of,
    header_crc,
    record_crc,
)
from probe.trace_summary import problems

__all__ = ["SampleRecord", "Trace", "TraceHeader", "TraceWriter", "Variable", "merge", "open_trace", "verify"]

_BARE_AXIS = "This is a netCDF dimension but not a netCDF variable."
_SMALL = 16 << 10  # bytes per sample up to which a variable is stored uncompressed
_SMALL_CHUNK = 4 << 10  # bytes of it in a chunk: several samples, but not many, since each rewrites its chunk
_LARGEST_CHUNK = 1 << 20
CHUNK_CACHE = 64 << 10  # bytes that HDF5 keeps of each variable; its 8 MB would fill up over a long run
_CHUNK = {"step": 4, "layer": 8, "head": 8}  # places per chunk along these axes; the whole axis along others
_TYPICAL = {"step": 16, "position": 32}  # a first sample that is shorter must not make small chunks for all others
_TEXT = h5py.string_dtype("utf-8")
_TEXT_TYPE = h5py.h5t.py_create(_TEXT)  # in memory: a Python object


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _journal(partial: Path) -> Path:
    return partial.with_name(partial.name + ".journal")


def _why(error: BaseException) -> str:
    """The reason in an exception, in one line."""
    return getattr(error, "strerror", None) or str(error).split("\n", 1)[0] or type(error).__name__


class TraceWriter:
    """Writes `path` as `path.partial`, one sample at a time, and renames it when it is complete.

    After each `write` the file holds that sample whatever happens to the process: see `probe.trace_journal`.
    Leaving the `with` block by an exception keeps the partial file, which opens and which `resume=True` continues.

    `resume` continues a partial file, or a complete one (a run that is given more samples), or begins a new one.
    Without it a file that is already there is refused, unless `overwrite`.
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
        check_declarations(variables, header.coords, f"trace {self.path.name}")
        self._partial = _partial(self.path)
        self._h5: h5py.File | None = None
        self._closed = False
        self._began = False  # whether a sample was written since the file was opened
        self._broken = ""  # why nothing can be written any more
        self._every = 1  # samples per commit; merging, which can be repeated, takes more
        self._pending = 0
        self._rows: set[int] = set()
        self._sizes: dict[str, int] = {}
        self._pictures: dict[tuple[int, int], int] = {}  # (crc, length) -> offset: questions share pictures
        with contextlib.ExitStack() as undo:
            self._open(undo, resume=resume, overwrite=overwrite)
            undo.pop_all()

    # ---------------------------------------------------------------- opening

    def _open(self, undo: contextlib.ExitStack, *, resume: bool, overwrite: bool) -> None:
        source = self._partial
        if self.path.is_dir():
            raise ProbeError(f"cannot write {self.path}: it is a folder; name a file, such as run.trace.h5")
        if self.path.exists() and not overwrite:
            if not resume:
                raise ProbeError(f"{self.path} is already there; resume it, remove it, or choose another name")
            if not self._partial.exists():
                source = self.path  # a complete trace gets more samples; renamed once it is known to fit
        created = self._created = not source.exists()
        self._was_complete = source == self.path
        self._main = self._claim(source, undo)
        journal = _journal(self._partial)
        anew = overwrite and not resume
        if created or anew or source == self.path:  # then a journal is of a file that somebody has removed
            journal.unlink(missing_ok=True)
        if anew:
            self._main.truncate(0)
        self._file = JournaledFile(self._main, journal, self._token())
        undo.callback(self._file.close)
        undo.callback(self._drop)
        try:
            self._file.recover()
            if not self._file.read(PAGE).strip(b"\0"):
                if created:
                    undo.callback(self._partial.unlink, missing_ok=True)
                self._file.truncate(0)  # space may have been claimed for what never came
                self._create()
            elif resume or overwrite:
                self._resume(source)
            else:
                raise ProbeError(
                    f"{self._partial} has samples of a run that was stopped; resume it, or remove it first"
                )
        except (OSError, RuntimeError, KeyError) as error:
            right = "free some space" if getattr(error, "errno", None) else "remove it to start again"
            raise ProbeError(f"cannot write {self._partial}: {_why(error)}; {right}") from error
        if source != self._partial:
            os.replace(source, self._partial)

    def _claim(self, source: Path, undo: contextlib.ExitStack) -> BinaryIO:
        """The file, open and locked for us alone."""
        try:
            descriptor = os.open(source, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        except OSError as error:
            there = self.path.parent.is_dir()
            right = "choose a folder that you may write to" if there else f"create {self.path.parent} first"
            raise ProbeError(f"cannot write {self.path}: {_why(error)}; {right}") from error
        main: BinaryIO = os.fdopen(descriptor, "r+b", buffering=0)
        undo.callback(main.close)
        in_use = (
            f"cannot write {self.path}: another process is writing it or has it open; "
            "wait for that run, close that reader, or choose another name"
        )
        try:
            self._lock = Lock(main, source)
        except Busy as busy:
            raise ProbeError(in_use + (f" ({busy})" if str(busy) else "")) from busy
        undo.callback(self._lock.release)
        if not source.exists() or not os.path.samestat(os.fstat(main.fileno()), source.stat()):
            raise ProbeError(in_use)  # that run finished, and renamed the file, between our two calls
        return main

    def _token(self) -> bytes:
        """Marks a file and its journal as belonging together: 16 characters, the same for the same header."""
        return sha256(json.dumps(self.header.attributes(), sort_keys=True).encode()).hexdigest()[:16].encode()

    def _create(self) -> None:
        """The file without samples, and without the declared variables, whose chunks wait for a first sample."""
        self._h5 = h5 = h5py.File(self._file, "w", rdcc_nbytes=CHUNK_CACHE)
        h5.attrs["trace_id"] = np.bytes_(self._token())  # first, to stand in page 0
        attributes = self.header.attributes()
        plots = [v.name for v in self.variables.values() if len(v.dims) >= 2]
        attributes.setdefault("default_plot", [*plots, *self.variables, "score"][0])
        for name, value in attributes.items():
            h5.attrs[name] = value
        h5.attrs["header_crc32"] = header_crc(attributes, self.header.coords, self.variables.values())
        index = h5.create_dataset("sample", (0,), "<i8", maxshape=(None,), chunks=(512,))
        index.make_scale("sample")
        _note(index, units="1", long_name="number of the sample in the data of the run, before sharding")
        for axis, names in self.header.coords.items():
            h5.create_dataset(axis, dtype=_TEXT, data=np.array(list(names), dtype=object)).make_scale(axis)
        for name, meaning in TEXTS.items():
            _note(_stacked(h5, name, (), _TEXT, None), long_name=meaning)
        score = _stacked(h5, "score", (), "<f8", float("nan"))
        meaning = "score of the answer; NaN without a reference and after a failure"
        _note(score, units="1", long_name=meaning, formula="metric(prediction, reference)")
        pictures = h5.create_group("pictures")
        _bare_scale(pictures, "sample")
        data = pictures.create_dataset("data", (0,), "u1", maxshape=(None,), chunks=(16 << 10,))
        data.dims[0].attach_scale(_bare_scale(pictures, "byte"))
        _note(data, units="1", long_name="PNG files, one after the other")
        for name, meaning in (("offset", "first byte of the picture in data; -1: none"), ("length", "its bytes")):
            _note(_stacked(pictures, name, (), "<i8", -1), units="byte", long_name=meaning)
        checksums = h5.create_group("checksums")
        _bare_scale(checksums, "sample")
        columns = np.array(["record", "picture", *self.variables], dtype=object)
        checksums.create_dataset("variable", dtype=_TEXT, data=columns).make_scale("variable")
        sums = _stacked(checksums, "crc32", ("variable",), "<i8", -1, (16, len(columns)))
        _note(sums, units="1", long_name="CRC-32 of the bytes of one sample; -1: not recorded")
        self._index()
        self._commit()

    def _resume(self, source: Path) -> None:
        self._h5 = h5 = h5py.File(self._file, "r+", rdcc_nbytes=CHUNK_CACHE)
        if _plain(h5.attrs.get("Conventions")) != CONVENTIONS:
            raise ProbeError(f"cannot resume {source}: it is not a trace; remove it or choose another name")
        self._file.token = bytes(h5.attrs["trace_id"])  # the journal belongs to the file, not to this run
        there = Trace(source, _contents(h5))
        found = differences(there.header, there.declared(), self.header, self.variables.values())
        if found:
            raise ProbeError(
                f"cannot resume {source}, which another run wrote: {'; '.join(found)}. "
                "Repeat that run as it was, or choose another name"
            )
        self._rows = set(there.samples.tolist())
        self._index()

    def _index(self) -> None:
        """Collect the arrays that a sample is written to, and the present lengths of the axes."""
        assert self._h5 is not None
        self._data: dict[str, h5py.Dataset] = {n: d for n, d in _arrays(self._h5).items() if _dims(d)[0] == "sample"}
        there = [v for v in self.variables.values() if v.name in self._data]
        self._sizes = {axis: len(self._h5[axis]) for v in there for axis in v.dims}
        self._columns: list[str] = self._h5["checksums/variable"].asstr()[...].tolist()

    def _create_variables(self, extents: Mapping[str, int]) -> None:
        """Declared variables, with chunks for samples of these extents (16 along an axis that is not known)."""
        assert self._h5 is not None
        h5 = self._h5
        extents = {axis: len(names) for axis, names in self.header.coords.items()} | dict(extents)
        for axis in sorted({a for v in self.variables.values() for a in v.dims} - set(self.header.coords)):
            _bare_scale(h5, axis)
            count = _stacked(h5, f"n_{axis}", (), "<i4", 0)
            _note(count, units="1", long_name=f"places of the sample along the axis {axis}")
        for v in self.variables.values():
            chunk, compressed = _chunk_shape(v, [extents.get(axis, 16) for axis in v.dims])
            kind = np.dtype(v.dtype).newbyteorder("<")
            data = _stacked(h5, v.name, v.dims, kind, v.fill_value, chunk, compressed)
            _note(data, units=v.units, long_name=v.long_name, formula=v.formula, probe=v.probe)
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
            raise ProbeError(f"{where}: cannot be written: {self._broken or 'the file is closed'}")
        if record.sample in self._rows:
            raise ProbeError(f"{where}: the file already holds this sample; skip those in `done`")
        if record.failed and record.arrays:
            raise ProbeError(f"{where}: a failed sample cannot have arrays ({', '.join(record.arrays)})")
        for name in record.arrays:
            if name not in self.variables:
                near = nearest(name, list(self.variables))
                raise ProbeError(f"{where}: variable `{name}` was not declared; {near}")
        arrays = {n: check_array(self.variables[n], a, where) for n, a in record.arrays.items()}
        extents = extents_of(arrays, self.variables, self.header.coords, where)
        self._began = True
        try:
            self._append(record, arrays, extents)
            self._pending += 1
            if self._pending >= self._every:
                self._commit()
        except BaseException as error:  # also an interrupt: HDF5 has half a sample in memory, the disk has none
            self._broken = f"writing sample {record.sample} failed ({_why(error)})"
            if isinstance(error, OSError | RuntimeError):
                right = "free some space and resume" if isinstance(error, OSError) else "resume the run"
                kept = f"{self._partial.name} keeps the samples before it"
                raise ProbeError(f"{where}: {_why(error)}; {right} ({kept})") from error
            raise
        self._rows.add(int(record.sample))

    def _append(self, record: SampleRecord, arrays: Mapping[str, np.ndarray], extents: Mapping[str, int]) -> None:
        if arrays and not self._has_variables():
            self._create_variables(extents)
        stored = self._data
        ragged = {axis: n for axis, n in extents.items() if axis not in self.header.coords}
        for axis, length in ragged.items():
            if length > self._sizes[axis]:
                self._lengthen(axis, length)
        row = len(stored["sample"])
        self._set_samples(row + 1)
        _put(stored["sample"], row, np.array(record.sample, "<i8"))
        _put(stored["score"], row, np.array(record.score, "<f8"))
        for name, text in record.texts().items():
            _put(stored[name], row, np.array(text, dtype=object))
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

    def _set_samples(self, count: int) -> None:
        for data in self._data.values():
            data.id.set_extent((count, *data.shape[1:]))

    def _lengthen(self, axis: str, length: int) -> None:
        assert self._h5 is not None
        self._sizes[axis] = length
        self._h5[axis].resize((length,))
        for v in self.variables.values():
            if axis in v.dims:
                self._data[v.name].resize(length, 1 + v.dims.index(axis))

    def _picture(self, png: bytes) -> int:
        """Where the picture stands in `pictures/data`; one that this process wrote is not written again."""
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
        assert self._h5 is not None
        try:
            if self._broken:
                raise RuntimeError(self._broken)
            if not self._has_variables():  # every sample failed: readers still find the variables
                self._create_variables({})
                self._set_samples(len(self._rows))
            self._commit()
            self._h5.close()
            self._file.commit()
            self._file.finish()
            if os.name == "nt":  # an open file cannot be renamed there
                self._main.close()
            os.replace(self._partial, self.path)
        except (OSError, RuntimeError) as error:
            self._abandon()
            kept = f"{self._partial} keeps the samples so far and can be resumed"
            raise ProbeError(f"cannot finish {self.path}: {_why(error)}; {kept}") from error
        self._release()
        return self.path

    def _abandon(self) -> None:
        """Let go of the partial file as it was after the last complete sample."""
        if not self._closed:
            self._drop()
            with contextlib.suppress(OSError):
                self._file.settle()
            self._file.close()
            with contextlib.suppress(OSError):
                if self._created and not self._rows:  # nothing was written: leave nothing in the way of another run
                    for path in (_journal(self._partial), self._partial):
                        path.unlink(missing_ok=True)
                elif self._was_complete and not self._began:  # nothing was added: as complete as before
                    os.replace(self._partial, self.path)
            self._release()

    def _drop(self) -> None:
        """Close what HDF5 has open, into memory: nothing reaches the disk without a commit."""
        if self._h5 is not None:
            with contextlib.suppress(Exception):
                self._h5.close()

    def _release(self) -> None:
        self._closed = True
        self._file.close()
        self._lock.release()
        self._main.close()

    def __enter__(self) -> Self:
        """The writer itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Finish, or keep the partial file if the block failed."""
        if kind is None:
            self.close()
        else:
            self._abandon()


# -------------------------------------------------------------------- reading


def open_trace(path: Path | str, *, damaged: bool = False) -> Trace:
    """Open a finished or a partial trace for reading. A partial one may still be being written: it is then read
    as it was after its last complete sample.

    `damaged` also opens a file that was cut off: what is missing reads as zeros, and only checksums tell which values
    are whole (`probe.trace_examine`).
    """
    path = Path(path)
    if not path.exists():
        if _partial(path).exists():
            raise ProbeError(f"{path} is not finished; what there is so far is in {_partial(path)}")
        beside = sorted(p.name for p in path.parent.glob("*.h5*") if not p.name.endswith(".journal"))
        raise ProbeError(f"no such trace: {path}; " + (nearest(path.name, beside) if beside else "nor any beside it"))
    if path.is_dir():
        raise ProbeError(f"{path} is a folder, not a trace; name one file in it")
    with contextlib.ExitStack() as closing:
        try:
            h5 = _open_for_reading(path, closing, damaged=damaged)
            conventions = _plain(h5.attrs.get("Conventions", ""))
            if conventions != CONVENTIONS:
                said = f"its Conventions are `{conventions}`" if conventions else "it has no Conventions attribute"
                raise ProbeError(f"{path} is an HDF5 file but not a trace: {said}, not `{CONVENTIONS}`")
            contents = _contents(h5)
            trace = Trace(path, contents)
        except OSError as error:
            raise ProbeError(_unreadable(path, error)) from error
        except (RuntimeError, KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
            raise ProbeError(f"{path} is damaged: {_why(error)}; restore it, or run it again") from error
        contents.close = closing.pop_all().close
        return trace


def _open_for_reading(path: Path, closing: contextlib.ExitStack, *, damaged: bool = False) -> h5py.File:
    journal = _journal(path)
    if damaged:
        main = closing.enter_context(open(path, "rb", buffering=0))  # noqa: SIM115 (closed by the stack)
        return closing.enter_context(h5py.File(_as_if_whole(with_journal(main, journal)), "r"))
    if not path.name.endswith(".partial"):
        return closing.enter_context(h5py.File(path, "r", locking="best-effort"))
    main = closing.enter_context(open(path, "rb", buffering=0))  # noqa: SIM115 (closed by the stack)
    try:
        closing.callback(Lock(main, path, shared=True).release)
        view = with_journal(main, journal)
    except Busy:  # it is being written now
        copy, view = snapshot(path, journal)
        closing.callback(copy.close)
    if not view.read(PAGE).strip(b"\0"):
        raise ProbeError(f"{path} holds nothing yet: the run was stopped as it began; start it again")
    return closing.enter_context(h5py.File(view, "r"))


_END_OF_FILE = 40  # where HDF5's superblock, of version 0 as the writer makes it, says how long the file is


def _as_if_whole(view: JournaledFile) -> JournaledFile:
    """A view of a file as long as it says it should be, with zeros for what is missing; HDF5 refuses others."""
    there = view.seek(0, os.SEEK_END)
    view.seek(0)
    first = bytearray(view.read(PAGE))
    if len(first) == PAGE and first.startswith(b"\x89HDF\r\n\x1a\n\0"):
        said = int.from_bytes(first[_END_OF_FILE : _END_OF_FILE + 8], "little")
        whole = said if there <= said <= 64 * there + (1 << 20) else there
        first[_END_OF_FILE : _END_OF_FILE + 8] = whole.to_bytes(8, "little")
        view.cover(0, first, whole)
    return view


def _unreadable(path: Path, error: OSError) -> str:
    with contextlib.suppress(OSError), open(path, "rb") as file:
        head = file.read(8)
        if not head:
            return f"{path} is empty; it is no trace"
        if head != b"\x89HDF\r\n\x1a\n":
            return f"{path} is not an HDF5 file (it begins with {head!r}); traces end in .trace.h5"
        if "truncated" in str(error):
            return f"{path} is cut off: {path.stat().st_size:,} bytes are left; copy it again, or run it again"
        if "lock" in str(error):
            return f"{path} is being written by another process; wait for that run"
    return f"cannot read {path}: {_why(error)}; restore it from a copy, or run it again"


def verify(path: Path | str) -> list[str]:
    """What is wrong with a trace, one sentence per problem; empty if every value is the one that was written."""
    try:
        with open_trace(path) as trace:
            return problems(trace)
    except ProbeError as error:
        return [str(error)]


def merge(paths: Sequence[Path], out: Path, *, overwrite: bool = False) -> Path:
    """Join the shards of one run into one file, in the order of their samples. Values are copied, and checked.

    Copied, not mapped as HDF5 virtual datasets: those read as fill values, silently, once a shard was moved.
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
            found = differences(first.header, first.declared(), trace.header, trace.declared())
            if found:
                pair = f"{first.path} and {trace.path}"
                raise ProbeError(f"cannot merge {pair}, which are not shards of one run: {'; '.join(found)}")
            for i, sample in enumerate(trace.samples.tolist()):
                if sample in owner:
                    other = owner[sample][0].path
                    raise ProbeError(f"cannot merge: {other} and {trace.path} both hold sample {sample}")
                owner[sample] = (trace, i)
        names = ", ".join(t.path.name for t in traces)
        header = replace(first.header, extra={**first.header.extra, "merged_from": names})
        writer = stack.enter_context(TraceWriter(out, header, first.declared(), overwrite=overwrite))
        writer._every = 64
        for sample in sorted(owner):
            trace, i = owner[sample]
            wrong = problems(trace, rows=[i])
            if wrong:
                raise ProbeError(f"cannot merge {trace.path}, which is damaged: {wrong[0]}")
            writer.write(trace.record(i))
    return Path(out)


# -------------------------------------------------------------------- HDF5 details


def _bare_scale(group: h5py.Group, axis: str) -> h5py.Dataset:
    """An axis without coordinate values, of length 0, as netCDF4 writes it."""
    scale = group.create_dataset(axis, (0,), ">f4", maxshape=(None,), chunks=(512,))
    scale.make_scale(f"{_BARE_AXIS} {0:10d}")
    return scale


def _stacked(
    group: h5py.Group,
    name: str,
    dims: Sequence[str],
    dtype: Any,
    fill: float | int | None,
    chunk: tuple[int, ...] | None = None,
    compressed: bool = False,
) -> h5py.Dataset:
    """A variable (sample, *dims) of the present lengths of its axes, which grow with them."""
    scales = [group[axis] for axis in ("sample", *dims)]
    data = group.create_dataset(
        name,
        tuple(len(s) for s in scales),
        dtype,
        maxshape=tuple(s.maxshape[0] for s in scales),
        chunks=chunk or (256,),
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
    """Chunk shape, and whether to compress: of what is large, one sample, some steps and layers, all tokens."""
    lengths = [max(1, n, _TYPICAL.get(axis, 1)) for axis, n in zip(variable.dims, lengths, strict=True)]
    item = np.dtype(variable.dtype).itemsize
    size = int(np.prod(lengths, dtype=np.int64)) * item
    if size < _SMALL:
        return (max(1, min(512, _SMALL_CHUNK // size)), *lengths), False
    chunk = [min(n, _CHUNK.get(axis, n)) for axis, n in zip(variable.dims, lengths, strict=True)]
    while int(np.prod(chunk, dtype=np.int64)) * item > _LARGEST_CHUNK:
        longest = int(np.argmax(chunk))
        chunk[longest] = (chunk[longest] + 1) // 2
    return (1, *chunk), True


def _put(data: h5py.Dataset, row: int, array: np.ndarray) -> None:
    """`data[row, :n0, :n1, …] = array`, without h5py's selections, which cost more than the writing."""
    if array.size:
        space = data.id.get_space()
        space.select_hyperslab((row, *(0,) * array.ndim), (1, *array.shape))
        kind = _TEXT_TYPE if array.dtype == object else None
        data.id.write(h5py.h5s.create_simple((1, *array.shape)), space, array, kind)


def _note(data: h5py.Dataset, **attributes: str) -> None:
    for name, value in attributes.items():
        if value:
            data.attrs[name] = value


def _plain(value: Any) -> Any:
    """An attribute as Python data."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, np.ndarray):
        return value.item() if value.size == 1 else value.tolist()
    return value.item() if isinstance(value, np.generic) else value


def _is_bare(data: h5py.Dataset) -> bool:
    return str(_plain(data.attrs.get("NAME", ""))).startswith(_BARE_AXIS)


def _arrays(h5: h5py.File) -> dict[str, h5py.Dataset]:
    """All arrays of the file by name, those of its groups as `group/name`."""
    found: dict[str, h5py.Dataset] = {}
    for name, thing in h5.items():
        inside = thing.items() if isinstance(thing, h5py.Group) else ()
        found |= {f"{name}/{n}": d for n, d in inside if isinstance(d, h5py.Dataset)}
        if isinstance(thing, h5py.Dataset):
            found[name] = thing
    return found


def _dims(data: h5py.Dataset) -> tuple[str, ...]:
    """Names of the axes; `axis_k` where a file of others attaches no scale."""
    if h5py.h5ds.is_scale(data.id):
        return (data.name.rsplit("/", 1)[-1],)
    scales = [data.dims[k].values() for k in range(data.ndim)]
    return tuple(s[0].name.rsplit("/", 1)[-1] if s else f"axis_{k}" for k, s in enumerate(scales))


def _contents(h5: h5py.File) -> Contents:
    """What the file says of itself."""
    arrays = _arrays(h5)
    scales = {n for n, d in arrays.items() if h5py.h5ds.is_scale(d.id)}
    top = {n: d for n, d in arrays.items() if "/" not in n}
    hidden = {"CLASS", "NAME", "DIMENSION_LIST", "REFERENCE_LIST", "_FillValue", "_Netcdf4Dimid"}
    columns = h5["checksums/variable"].asstr()[...].tolist() if "checksums/variable" in h5 else []
    order = {name: k for k, name in enumerate(columns)}  # as declared; HDF5 lists names alphabetically
    dims = {n: _dims(d) for n, d in arrays.items()}
    attrs = {n: {k: _plain(v) for k, v in d.attrs.items()} for n, d in arrays.items()}
    own = {*TEXTS, *scales, *(f"n_{axis}" for axis in scales)}
    names = [n for n in top if n not in own and dims[n][:1] == ("sample",)]
    return Contents(
        attrs={k: _plain(v) for k, v in h5.attrs.items()},
        axes={n: len(d) for n, d in top.items() if n in scales},
        coords={n: tuple(d.asstr()[...]) for n, d in top.items() if n in scales and d.dtype == object},
        variables={n: _variable(n, top[n], attrs[n], dims[n]) for n in sorted(names, key=lambda n: order.get(n, -1))},
        data={n: d for n, d in arrays.items() if not _is_bare(d)},
        notes={n: {k: v for k, v in found.items() if k not in hidden} for n, found in attrs.items()},
        dims={n: dims[n] for n, d in arrays.items() if not _is_bare(d)},
    )


def _variable(name: str, data: h5py.Dataset, attrs: dict[str, Any], dims: tuple[str, ...]) -> Variable:
    """The variable as it was declared, without the checks of a declaration: odd files must be showable."""
    flags = None
    if "flag_values" in attrs:
        values = attrs["flag_values"] if isinstance(attrs["flag_values"], list) else [attrs["flag_values"]]
        flags = dict(zip(str(attrs.get("flag_meanings", "")).split(), values, strict=False))
    fill = None
    with contextlib.suppress(RuntimeError, TypeError, AttributeError, ValueError):
        usual = float("nan") if data.dtype.kind == "f" else 0 if data.dtype.kind == "u" else -1
        fill = None if repr(data.fillvalue.item()) == repr(usual) else data.fillvalue.item()
    variable = object.__new__(Variable)
    words = {k: str(attrs.get(k, "")) for k in ("units", "long_name", "formula", "probe")}
    fields = {"name": name, "dims": dims[1:], "dtype": data.dtype.name, "flags": flags, "fill": fill}
    for key, value in {**fields, **words}.items():
        object.__setattr__(variable, key, value)
    return variable
