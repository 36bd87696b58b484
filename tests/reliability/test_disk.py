"""Full disks, folders that cannot be written, files in use: one clear error, and no damage to what is there."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hardship import contents, ended, forked, needs_fork, partials, recording_recipe, same_runs, samples_of

import probe
import probe.trace_journal as journal
from probe import run_files
from probe.__main__ import load_cli
from probe.errors import ProbeError
from probe.trace import SampleRecord, TraceHeader, TraceWriter, Variable, open_trace, verify

ROOT = Path(__file__).resolve().parents[2]


def test_a_disk_that_fills_up_ends_the_run_with_one_error(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, left = journal._write_all, 1_200_000

    def write(file: Any, data: bytes) -> None:
        nonlocal left
        if len(data) > left:
            honest(file, data[:left])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left -= len(data)
        honest(file, data)

    monkeypatch.setattr(journal, "_write_all", write)
    words: dict[str, Any] = {"backbone": tiny, "samples": samples_of(8), "timed": False}
    with pytest.raises(ProbeError, match="No space left on device; free some space"):
        probe.run(recording_recipe(), out=tmp_path / "full", **words)
    left = 10**12
    kept = {p.name: contents(p).keys() for p in partials(tmp_path / "full")}
    assert len(kept) == 2 and any(kept.values())
    assert all(verify(p) == [] for p in partials(tmp_path / "full"))
    probe.run(recording_recipe(), out=tmp_path / "full", resume=True, **words)
    probe.run(recording_recipe(), out=tmp_path / "whole", **words)
    for name in ("hard.trace.h5", "hard.baseline.trace.h5"):
        same_runs(tmp_path / "full" / name, tmp_path / "whole" / name)


@pytest.mark.parametrize("command", ["report", "plot", "replay"])
def test_views_say_it_when_the_disk_is_full(
    tiny: Any, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    for module in {"report": ["plotly"], "plot": ["matplotlib"]}.get(command, []):
        pytest.importorskip(module)
    trace = probe.run(recording_recipe(), backbone=tiny, samples=samples_of(1), out=tmp_path, timed=False).trace
    full = {"report": "page.html", "plot": "figure.png", "replay": "film.gif"}[command]
    (tmp_path / full).symlink_to("/dev/full")
    words = {"report": ["-o"], "plot": ["--figure", "commit_order", "-o"], "replay": ["--gif"]}[command]
    monkeypatch.setattr(sys, "argv", ["probe", command, str(trace), *words, str(tmp_path / full)])
    with pytest.raises(SystemExit) as exit_:
        load_cli().main()
    said = capsys.readouterr()
    assert exit_.value.code == 2
    assert "No space left" in " ".join(said.err.split()) and "Traceback" not in said.err


def test_a_picture_that_cannot_be_drawn_does_not_cost_the_run(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("probe.runner.draw_run", full)
    result = probe.run(recording_recipe(), backbone=tiny, samples=samples_of(1), out=tmp_path, timed=False)
    assert result.picture is None and result.failed == 0 and "traces are complete" in result.notes[-1]
    assert verify(result.trace) == []


def test_a_folder_that_cannot_be_written(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = os.open

    def refuse(path: Any, flags: int, *rest: Any, **more: Any) -> int:  # as a read-only file system does, also to root
        if flags & os.O_CREAT and str(path).endswith(".partial"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return honest(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ProbeError, match="Read-only file system; choose a folder that you may write to"):
        probe.run(recording_recipe(), backbone=tiny, samples=samples_of(1), out=tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_an_output_that_is_a_file(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ProbeError, match="cannot make the folder .*out"):
        probe.run(recording_recipe(), backbone=tiny, samples=samples_of(1), out=tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_run_that_fails_before_its_first_sample_leaves_nothing_in_the_way(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "hard.trace.h5").mkdir()  # the second of the two traces cannot be written
    with pytest.raises(ProbeError, match="it is a folder"):
        probe.run(recording_recipe(), backbone=tiny, samples=samples_of(1), out=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["hard.trace.h5"], "no empty partial trace of the baseline"


@needs_fork
def test_the_second_of_two_runs_on_one_output_is_refused(tiny: Any, tmp_path: Path) -> None:
    words: dict[str, Any] = {"backbone": tiny, "samples": samples_of(4), "out": tmp_path, "timed": False}

    def slowly() -> None:
        probe.run(recording_recipe(), on_progress=lambda at: time.sleep(0.05), **words)

    first = forked(slowly)
    try:
        deadline = time.monotonic() + 60
        while not list(partials(tmp_path)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for resume in (False, True):
            with pytest.raises(ProbeError, match="another process is writing it"):
                probe.run(recording_recipe(), resume=resume, **words)
    finally:
        assert ended(first) == 0
    assert contents(tmp_path / "hard.trace.h5").keys() == {0, 1, 2, 3}
    assert verify(tmp_path / "hard.trace.h5") == [] and verify(tmp_path / "hard.baseline.trace.h5") == []
    with open_trace(tmp_path / "hard.trace.h5"), pytest.raises(ProbeError, match="has it open"):
        probe.run(recording_recipe(), resume=True, **words)
    assert {p.suffix for p in tmp_path.iterdir()} == {".h5", ".png"}, "and both traces are as complete as before"
    with pytest.raises(ProbeError, match="already there; resume it"):
        probe.run(recording_recipe(), **words)


@needs_fork
def test_runs_that_begin_together_take_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    children = [forked(lambda: (run_files.output_folder("same", None, resume=False), None)[1]) for _ in range(12)]
    assert [ended(c) for c in children] == [0] * 12
    names = {p.name for p in (tmp_path / "runs").iterdir()}
    assert names == {"same", *(f"same-{i}" for i in range(2, 13))}


def test_samples_of_a_resumed_run_survive_a_kill(tmp_path: Path) -> None:
    """The journal of a resumed run belongs to the file, though the header of the new run says another time."""
    variables = [Variable("x", ("step",), "1", "numbers")]

    def writer(created: str, resume: bool) -> TraceWriter:
        header = TraceHeader("r", "schema: 1\n", "h", "b", created=created)
        return TraceWriter(tmp_path / "t.h5", header, variables, resume=resume)

    def record(i: int) -> SampleRecord:
        return SampleRecord(i, arrays={"x": np.arange(500.0) + i})

    with pytest.raises(ZeroDivisionError), writer("monday", False) as first:
        first.write(record(0))
        _ = 1 / 0

    def second() -> None:
        again = writer("tuesday", True)
        for i in range(1, 5):
            again.write(record(i))
        os.kill(os.getpid(), signal.SIGKILL)

    assert ended(forked(second)) == -signal.SIGKILL
    with open_trace(tmp_path / "t.h5.partial") as trace:
        assert trace.samples.tolist() == [0, 1, 2, 3, 4]
    assert verify(tmp_path / "t.h5.partial") == []


ON_A_SMALL_DISK = r"""
set -u
mkdir -p disk && mount -t tmpfs -o size=1m none disk || exit 77
"$PYTHON" -m probe run quickstart --limit 6 --no-time --out disk/run > full.out 2> full.err; echo $? > full.status
ls disk/run > full.names
for f in disk/run/*.partial; do "$PYTHON" -m probe verify "$f" || exit 5; done
mount -o remount,size=30m disk
"$PYTHON" -m probe run quickstart --limit 6 --no-time --out disk/run --resume > again.out 2> again.err || exit 6
cp disk/run/*.trace.h5 .
mount -o remount,ro disk
"$PYTHON" -m probe run quickstart --limit 6 --no-time --out disk/other > ro.out 2> ro.err; echo $? > ro.status
"$PYTHON" -m probe verify disk/run/quickstart.trace.h5 > ro.verify || exit 7
"$PYTHON" -m probe run quickstart --limit 7 --no-time --resume --out disk/run > ro2.out 2> ro2.err; echo $? > ro2.status
"$PYTHON" -m probe show disk/run/quickstart.trace.h5 > ro.show || exit 8
"""


@pytest.mark.slow
def test_on_a_disk_that_is_really_full_and_really_read_only(tmp_path: Path) -> None:
    """In a mount namespace of its own, which only root can make."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "COLUMNS": "400"}
    words = ["unshare", "-m", "bash", "-c", ON_A_SMALL_DISK]
    try:
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs unshare")
    if done.returncode in (1, 77):
        pytest.skip(f"needs the right to mount: {done.stderr}")
    assert done.returncode == 0, done.stderr

    def said(name: str) -> str:
        return (tmp_path / name).read_text()

    assert said("full.status").strip() == "2"
    assert "No space left on device; free some space" in said("full.err")
    assert said("full.err").count("error:") == 1 and "Traceback" not in said("full.err")
    assert sorted(said("full.names").split())[0].startswith("quickstart.baseline.trace.h5.partial")
    for name in ("ro", "ro2"):
        assert said(f"{name}.status").strip() == "2" and "Traceback" not in said(f"{name}.err")
        assert "Read-only file system" in said(f"{name}.err")
    assert "intact" in said("ro.verify")
    whole: Callable[[Path], Any] = contents
    assert whole(tmp_path / "quickstart.trace.h5").keys() == set(range(6))
