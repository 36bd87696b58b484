"""Whatever happens to the process, every finished sample is in the file; and no run damages another's."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from trace_samples import failed_record, make_header, make_record, make_variables, same_content

import probe.trace_journal as journal
from probe.errors import ProbeError
from probe.trace import TraceWriter, Variable, open_trace, verify

WRITER = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[2], sys.argv[3]]
from trace_samples import make_header, make_record, make_variables
from probe.trace import TraceWriter
import probe.trace_journal as journal
journal.JournaledFile.sync_seconds = float(sys.argv[5])
journal.JournaledFile.checkpoint_bytes = 300_000
records = [make_record(i) for i in range(int(sys.argv[4]))]
with TraceWriter(Path(sys.argv[1]), make_header(created="later"), make_variables(), resume=True) as writer:
    print("done", *sorted(writer.done), flush=True)
    for record in records:
        if record.sample not in writer.done:
            writer.write(record)
            print(record.sample, flush=True)
print("closed", flush=True)
"""


def start_writer(path: Path, samples: int, sync_seconds: float) -> subprocess.Popen[str]:
    root, here = Path(__file__).parents[2], Path(__file__).parent
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(root), str(here), str(samples), str(sync_seconds)],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.parametrize("sync_seconds", [0.0, 1.0])
def test_kill_9_at_random_moments(run: Callable[..., Path], tmp_path: Path, sync_seconds: float) -> None:
    """Kill the writer again and again; it resumes and ends with the file of a run that was never disturbed."""
    samples, path, rng = 40, tmp_path / "t.h5", random.Random(5)
    partial = path.with_name("t.h5.partial")
    expected: set[int] = set()
    kills = 0
    while not path.exists():
        writer = start_writer(path, samples, sync_seconds)
        assert writer.stdout is not None
        resumed = writer.stdout.readline().split()
        assert {int(x) for x in resumed[1:]} >= expected
        if kills < 5:
            time.sleep(rng.uniform(0, 0.12))
            writer.send_signal(signal.SIGKILL)
            kills += 1
        told = writer.stdout.read().split()
        writer.stdout.close()
        writer.wait()
        expected |= {int(x) for x in told if x.isdigit()}
        if path.exists():
            break
        with open_trace(partial) as trace:
            held = trace.samples.tolist()
            assert held == list(range(len(held))) and set(held) >= expected
        assert verify(partial) == []
    assert kills >= 2, "the machine is too fast for this test: write more samples"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.h5"], "no journal is left"
    same_content(path, run(tmp_path / "undisturbed.h5", list(range(samples))))
    assert verify(path) == []


class Died(BaseException):
    """Stands for the death of the process."""


def test_death_after_any_number_of_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process die after so and so many bytes that it wrote to the disk, in any file.

    Whatever is on the disk then must open with every sample whose `write` returned, and with no broken one.
    """
    monkeypatch.setattr(journal.JournaledFile, "sync_seconds", 0.0)
    monkeypatch.setattr(journal.JournaledFile, "checkpoint_bytes", 100_000)
    undisturbed = tmp_path / "undisturbed.h5"
    with TraceWriter(undisturbed, make_header(), make_variables()) as writer:
        for i in range(3):
            writer.write(make_record(i, visual=60))
    honest, left = journal._write_all, 0

    def dying(file: object, data: bytes) -> None:
        nonlocal left
        if left < len(data):
            honest(file, data[:left])  # type: ignore[arg-type]
            for name in ("t.h5.partial", "t.h5.partial.journal"):  # the disk at the moment of death
                if (alive / name).exists():
                    shutil.copy(alive / name, dead / name)
            left = 10**9
            raise Died
        left -= len(data)
        honest(file, data)  # type: ignore[arg-type]

    monkeypatch.setattr(journal, "_write_all", dying)
    seen: list[int] = []
    for allowed in range(0, 10**8, 98_299):
        alive, dead = tmp_path / f"alive{allowed}", tmp_path / f"dead{allowed}"
        alive.mkdir()
        dead.mkdir()
        left, returned, writer = allowed, -1, None
        try:
            writer = TraceWriter(alive / "t.h5", make_header(), make_variables())
            for i in range(3):
                returned = i
                writer.write(make_record(i, visual=60))
            returned = 3
            writer.close()
            assert verify(alive / "t.h5") == []
            break
        except Died:
            if writer is not None:
                with pytest.raises(ProbeError, match="can be resumed"):
                    writer.close()
        held = -1
        with contextlib.suppress(ProbeError), open_trace(dead / "t.h5.partial") as trace:
            held = trace.n_samples
        assert returned <= held <= returned + 1, "every sample whose write returned, and none that was not begun"
        seen.append(held)
        if held >= 0:
            assert verify(dead / "t.h5.partial") == []
        with TraceWriter(dead / "t.h5", make_header(), make_variables(), resume=True) as again:
            assert len(again.done) == max(0, held)
            for i in range(len(again.done), 3):
                again.write(make_record(i, visual=60))
        same_content(dead / "t.h5", undisturbed)
    assert len(seen) > 10 and sorted(seen) == seen and set(seen) == {-1, 0, 1, 2, 3}


def test_an_exception_in_the_block_keeps_a_partial_file_that_opens(tmp_path: Path) -> None:
    path = tmp_path / "t.h5"
    with pytest.raises(ZeroDivisionError), TraceWriter(path, make_header(), make_variables()) as writer:
        writer.write(make_record(0))
        writer.write(failed_record(1))
        _ = 1 / 0
    assert not path.exists()
    with open_trace(tmp_path / "t.h5.partial") as trace:
        assert trace.samples.tolist() == [0, 1]
    with TraceWriter(path, make_header(), make_variables(), resume=True) as writer:
        assert writer.done == {0, 1}
        writer.write(make_record(2))
    with h5py.File(path) as file:
        assert file["sample"][...].tolist() == [0, 1, 2]


def test_a_complete_trace_takes_more_samples(run: Callable[..., Path], tmp_path: Path) -> None:
    path = run(tmp_path / "t.h5", [0, 1])
    with TraceWriter(path, make_header(), make_variables(), resume=True) as writer:
        assert writer.done == {0, 1} and not path.exists()
        writer.write(make_record(2))
    same_content(path, run(tmp_path / "one_go.h5", [0, 1, 2]))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"recipe_hash": "other"}, "recipe_hash was `c0ffee` and is now `other`"),
        ({"backbone": "llada"}, "backbone was `mini` and is now `llada`"),
        ({"coords": {"segment": ["answer"]}}, "axis `phase`"),
    ],
)
def test_resume_refuses_another_run(
    run: Callable[..., Path], tmp_path: Path, changes: dict[str, object], says: str
) -> None:
    path = run(tmp_path / "t.h5", [0])
    before = path.read_bytes()
    with pytest.raises(ProbeError, match=says):
        TraceWriter(path, make_header(**changes), make_variables(), resume=True)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["t.h5"]


def test_resume_refuses_other_variables(run: Callable[..., Path], tmp_path: Path) -> None:
    path = run(tmp_path / "t.h5", [0])
    fewer, more = make_variables()[1:], [*make_variables(), Variable("x", (), "1", "")]
    other = [*fewer, Variable("token", ("position",), "1", "token in the slot after the step", dtype="int32")]
    for variables, says in ((fewer, "`token` is gone"), (more, "`x` is new"), (other, "`token` was declared with")):
        with pytest.raises(ProbeError, match=says):
            TraceWriter(path, make_header(), variables, resume=True)
    assert verify(path) == []


def test_what_is_there_is_not_overwritten(run: Callable[..., Path], tmp_path: Path) -> None:
    path = run(tmp_path / "t.h5", [0, 1])
    with pytest.raises(ProbeError, match="already there"):
        TraceWriter(path, make_header(), make_variables())
    with TraceWriter(path, make_header(), make_variables(), overwrite=True) as writer:
        assert writer.done == frozenset() and path.exists(), "the old file stays until the new one is complete"
        writer.write(make_record(7))
    with open_trace(path) as trace:
        assert trace.samples.tolist() == [7]
    with pytest.raises(ZeroDivisionError), TraceWriter(tmp_path / "u.h5", make_header(), make_variables()) as writer:
        writer.write(make_record(0))
        _ = 1 / 0
    with pytest.raises(ProbeError, match="resume it, or remove it"):
        TraceWriter(tmp_path / "u.h5", make_header(), make_variables())


def test_two_runs_on_one_output(tmp_path: Path) -> None:
    path = tmp_path / "t.h5"
    with TraceWriter(path, make_header(), make_variables()) as writer:
        writer.write(make_record(0))
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(ProbeError, match="another process is writing it"):
                TraceWriter(path, make_header(), make_variables(), **options)  # type: ignore[arg-type]
        with pytest.raises(OSError):
            h5py.File(tmp_path / "t.h5.partial", "r+")  # nor may other programs write it
        writer.write(make_record(1))
    assert verify(path) == []
    with open_trace(path) as trace:
        assert trace.samples.tolist() == [0, 1]
        with pytest.raises(ProbeError, match="has it open"):
            TraceWriter(path, make_header(), make_variables(), resume=True)


def test_two_processes_on_one_output(tmp_path: Path) -> None:
    first = start_writer(tmp_path / "t.h5", 400, 1.0)
    assert first.stdout is not None and first.stdout.readline()
    try:
        with pytest.raises(ProbeError, match="another process is writing it"):
            TraceWriter(tmp_path / "t.h5", make_header(), make_variables(), overwrite=True)
        for _ in range(3):  # and a reader may look while the run goes on
            with open_trace(tmp_path / "t.h5.partial") as trace:
                assert trace.samples.tolist() == list(range(trace.n_samples))
            assert verify(tmp_path / "t.h5.partial") == []
    finally:
        first.kill()
        first.stdout.close()
        first.wait()


def test_without_file_locks_an_owner_file_keeps_others_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "fcntl", None)
    path = tmp_path / "t.h5"
    with TraceWriter(path, make_header(), make_variables()) as writer:
        writer.write(make_record(0))
        with pytest.raises(ProbeError, match="remove it if that run is dead"):
            TraceWriter(path, make_header(), make_variables(), resume=True)
    assert [p.name for p in tmp_path.iterdir()] == ["t.h5"]
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / "t.h5.partial.owner").write_text(f"{journal.socket.gethostname()} {dead.pid}")
    with TraceWriter(path, make_header(), make_variables(), overwrite=True):
        pass


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A disk with `disk["free"]` bytes left."""
    state = {"free": 10**12}
    honest_write, honest_reserve = journal._write_all, os.posix_fallocate

    def write(file: object, data: bytes) -> None:
        if len(data) > state["free"]:
            honest_write(file, data[: state["free"]])  # type: ignore[arg-type]
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        state["free"] -= len(data)
        honest_write(file, data)  # type: ignore[arg-type]

    def reserve(descriptor: int, offset: int, length: int) -> None:
        if length > state["free"]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        honest_reserve(descriptor, offset, length)

    monkeypatch.setattr(journal, "_write_all", write)
    monkeypatch.setattr(journal.os, "posix_fallocate", reserve)
    return state


@pytest.mark.parametrize("free", [0, 5_000, 40_000, 90_000])
def test_disk_full(tmp_path: Path, disk: dict[str, int], free: int) -> None:
    path = tmp_path / "t.h5"
    message = "No space left on device; free some space and resume"
    with pytest.raises(ProbeError, match=message), TraceWriter(path, make_header(), make_variables()) as writer:
        writer.write(make_record(0))
        disk["free"] = free
        for i in range(1, 50):
            writer.write(make_record(i))
    with open_trace(tmp_path / "t.h5.partial") as trace:
        held = trace.samples.tolist()
        assert held and held == list(range(len(held)))
    assert verify(tmp_path / "t.h5.partial") == []
    disk["free"] = 10**12
    with TraceWriter(path, make_header(), make_variables(), resume=True) as writer:
        for i in range(len(held), 6):
            writer.write(make_record(i))
    assert verify(path) == []


def test_disk_full_from_the_start(tmp_path: Path, disk: dict[str, int]) -> None:
    disk["free"] = 100
    with pytest.raises(ProbeError, match="No space left on device; free some space"):
        TraceWriter(tmp_path / "t.h5", make_header(), make_variables())
    assert not (tmp_path / "t.h5.partial").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_really_full_device_raises_what_the_simulation_raises() -> None:
    with open("/dev/full", "r+b", buffering=0) as full, pytest.raises(OSError) as caught:
        journal._write_all(full, b"x" * 100)
    assert caught.value.errno == errno.ENOSPC


def test_folders_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ProbeError, match="No such file or directory; create .*nowhere first"):
        TraceWriter(tmp_path / "nowhere" / "t.h5", make_header(), make_variables())
    with pytest.raises(ProbeError, match="it is a folder"):
        TraceWriter(tmp_path, make_header(), make_variables())
    honest = os.open

    def refuse(path: object, flags: int, *rest: object) -> int:  # as a read-only folder does, also to root
        if flags & os.O_CREAT and str(path).endswith(".partial"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return honest(path, flags, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ProbeError, match="Permission denied; choose a folder that you may write to"):
        TraceWriter(tmp_path / "t.h5", make_header(), make_variables())
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_traces(trace_path: Path, tmp_path: Path) -> None:
    def says(path: Path) -> str:
        with pytest.raises(ProbeError) as caught:
            open_trace(path)
        assert verify(path) == [str(caught.value)]
        return str(caught.value)

    assert "no such trace" in says(tmp_path / "x.trace.h5")
    assert "folder" in says(tmp_path)
    (tmp_path / "x.txt").write_text("hello, world")
    assert "not an HDF5 file (it begins with b'hello, w')" in says(tmp_path / "x.txt")
    (tmp_path / "empty.h5").touch()
    assert "is empty" in says(tmp_path / "empty.h5")
    (tmp_path / "new.h5.partial").touch()
    assert "holds nothing yet" in says(tmp_path / "new.h5.partial")
    assert "not finished; what there is so far is in" in says(tmp_path / "new.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = np.arange(3)
    assert "not a trace: it has no Conventions" in says(tmp_path / "other.h5")
    assert "did you mean `other.h5`" in says(tmp_path / "othr.h5")
    (tmp_path / "cut.h5").write_bytes(trace_path.read_bytes()[:20_000])
    assert "is cut off: 20,000 bytes are left" in says(tmp_path / "cut.h5")


def test_a_journal_of_another_file_is_ignored(run: Callable[..., Path], tmp_path: Path) -> None:
    """Someone copies a good partial file over one that was killed, whose journal stays behind."""
    writer = TraceWriter(tmp_path / "t.h5", make_header(), make_variables())
    writer.write(make_record(0))
    stale = (tmp_path / "t.h5.partial.journal").read_bytes()
    assert len(stale) > 10_000
    good = run(tmp_path / "good.h5", [4, 5], created="another time")
    shutil.copy(good, tmp_path / "u.h5.partial")
    (tmp_path / "u.h5.partial.journal").write_bytes(stale)
    with open_trace(tmp_path / "u.h5.partial") as trace:
        assert trace.samples.tolist() == [4, 5]
    with TraceWriter(tmp_path / "u.h5", make_header(), make_variables(), resume=True) as resumed:
        assert resumed.done == {4, 5}
    (tmp_path / "v.h5.partial.journal").write_bytes(stale)  # or someone removes the partial file, but not its journal
    with TraceWriter(tmp_path / "v.h5", make_header(), make_variables(), resume=True) as begun:
        assert begun.done == frozenset()
        begun.write(make_record(9))
    assert verify(tmp_path / "v.h5") == []
    writer.close()
