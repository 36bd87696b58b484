"""Truncated and bit-flipped traces: found, read as far as they are whole, rescued, completed by a resumed run."""

from __future__ import annotations

import collections
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hardship import contents, recording_recipe, same_runs, samples_of, trials
from typer.testing import CliRunner

import probe
import probe.trace_examine as examining
import probe.trace_journal as journal
from probe.__main__ import load_cli
from probe.errors import ProbeError
from probe.trace import SampleRecord, TraceHeader, TraceWriter, Variable, open_trace, verify
from probe.trace_examine import examine, rescue

ROOT = Path(__file__).resolve().parents[2]
COUNT = 8


@pytest.fixture(scope="module")
def trace(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real trace, with texts, pictures, positions, layers and visual tokens."""
    folder = tmp_path_factory.mktemp("whole")
    samples = samples_of(COUNT, "world/mixed")
    return probe.run(recording_recipe(), backbone=tiny, samples=samples, out=folder, timed=False).trace


def damaged(content: bytes, kind: str, rng: random.Random) -> bytes:
    """The bytes with one kind of damage at a random place."""
    out = bytearray(content)
    at = rng.randrange(len(out))
    if kind == "flip":
        out[at] ^= 1 << rng.randrange(8)
    elif kind == "noise":
        length = min(rng.choice([1, 8, 64, 512, 4096]), len(out) - at)
        out[at : at + length] = rng.randbytes(length)
    elif kind == "zeros":
        out[at // 4096 * 4096 : at // 4096 * 4096 + 4096] = bytes(min(4096, len(out) - at // 4096 * 4096))
    else:
        del out[at:]
    return bytes(out)


def damage_and_rescue(trace: Path, folder: Path, kind: str, seed: int, seconds: float) -> tuple[str, int]:
    """One trial: what was said, and how many samples were whole. Fails if a wrong value passes for a right one."""
    right = contents(trace)
    bad, out = folder / "bad.trace.h5", folder / "rescued.trace.h5"
    bad.write_bytes(damaged(trace.read_bytes(), kind, random.Random(seed)))
    found = examine(bad, seconds=seconds)
    out.unlink(missing_ok=True)
    if not found.problems:
        same_runs(bad, trace)
        return "harmless", COUNT
    if found.whole:
        saved = rescue(bad, out, found=found, seconds=seconds)
        rescued = contents(out)
        assert len(rescued) == saved.kept and all(rescued[n] == right[n] for n in rescued), (kind, seed)
        assert verify(out) == []
    stopped = any("HDF5" in p and ("stopped" in p or "still reading" in p) for p in found.problems)
    return ("HDF5 stopped or hung" if stopped else "found"), len(found.whole)


@pytest.mark.parametrize("kind", ["flip", "noise", "zeros", "cut"])
def test_damage_is_found_and_the_rest_rescued(trace: Path, tmp_path: Path, kind: str) -> None:
    damage_and_rescue(trace, tmp_path, kind, 0, 20)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flip", "noise", "zeros", "cut"])
def test_campaign_damage(trace: Path, tmp_path: Path, kind: str) -> None:
    said: collections.Counter[str] = collections.Counter()
    whole = 0
    n = trials(100)
    for seed in range(n):
        kind_of, kept = damage_and_rescue(trace, tmp_path, kind, seed, 10)
        said[kind_of] += 1
        whole += kept
    print(f"\n{kind}: {n} trials of {COUNT} samples: {dict(said)}; {whole / n / COUNT:.1%} of the samples were whole")
    assert said["found"] > 0


def test_one_damaged_sample_costs_one_sample(trace: Path, tmp_path: Path) -> None:
    """A flipped bit in the compressed values of one sample, by the command line, and the run completes the rescued."""
    content = bytearray(trace.read_bytes())
    with open_trace(trace) as opened:
        question = str(opened.array("question")[3]).encode()
    places = [i for i in range(len(content)) if content.startswith(question, i)]
    for place in places:
        content[place] ^= 4
    bad = tmp_path / "hard.trace.h5"
    bad.write_bytes(content)
    app = load_cli().app
    said = CliRunner().invoke(app, ["verify", str(bad)])
    assert said.exit_code == 1 and "texts, score or extents are not what was written" in " ".join(said.output.split())
    held = examine(bad).whole
    assert 0 < len(held) < COUNT
    out = tmp_path / "rescued.trace.h5"
    said = CliRunner().invoke(app, ["verify", str(bad), "--rescue", str(out)])
    assert said.exit_code == 0 and f"rescued: {len(held)} of {COUNT} samples" in " ".join(said.output.split())
    with open_trace(out) as rescued:
        assert rescued.attrs["rescued_from"] == "hard.trace.h5"
    with pytest.raises(ProbeError, match="already there"):
        rescue(bad, out)


def test_a_rescued_trace_is_completed_by_the_run(trace: Path, tiny: Any, tmp_path: Path) -> None:
    content = trace.read_bytes()
    for share in (0.8, 0.5, 0.3):
        (tmp_path / "bad.trace.h5").write_bytes(content[: int(len(content) * share)])
        if len(examine(tmp_path / "bad.trace.h5").whole) < COUNT:
            break
    (tmp_path / "run").mkdir()
    saved = rescue(tmp_path / "bad.trace.h5", tmp_path / "run" / "hard.trace.h5")
    assert 0 < saved.kept < COUNT and "cut off" in saved.problems[0]
    shutil.copy(trace.with_name("hard.baseline.trace.h5"), tmp_path / "run")
    probe.run(
        recording_recipe(), backbone=tiny, samples=samples_of(COUNT, "world/mixed"), out=tmp_path / "run", resume=True,
        timed=False,
    )  # fmt: skip
    same_runs(tmp_path / "run" / "hard.trace.h5", trace, order=False)


def test_whole_and_partial_traces_are_whole(trace: Path, tmp_path: Path) -> None:
    found = examine(trace)
    assert found.problems == () and found.whole == tuple(range(COUNT)) and found.header_is_whole
    variables = [Variable("x", ("step",), "1", "numbers")]
    with (
        pytest.raises(ZeroDivisionError),
        TraceWriter(tmp_path / "t.h5", TraceHeader("r", "y", "h", "b"), variables) as writer,
    ):
        writer.write(SampleRecord(0, arrays={"x": np.arange(3.0)}))
        _ = 1 / 0
    assert examine(tmp_path / "t.h5.partial").whole == (0,)
    assert rescue(tmp_path / "t.h5.partial", tmp_path / "u.h5").kept == 1


def test_what_is_no_trace_is_said(tmp_path: Path) -> None:
    (tmp_path / "x.h5").write_bytes(b"hello, world")
    (tmp_path / "empty.h5").touch()
    for name, words in (("x.h5", "not an HDF5 file"), ("empty.h5", "is empty"), ("none.h5", "no such trace")):
        with pytest.raises(ProbeError, match=words):
            rescue(tmp_path / name, tmp_path / "out.h5")
        assert not (tmp_path / "out.h5").exists()


CHILD = """
import json, os, sys, time
task, given = sys.argv[2], json.loads(sys.argv[3])
def say(**words): print(json.dumps(words), flush=True)
say(opened=6, header=[])
for row in range(given["start"], 6):
    if row == 2: os.abort()
    if row == 4: time.sleep(600)
    say(row=row, problems=[])
say(end=True)
"""


def test_a_reader_that_dies_or_hangs_costs_that_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examining, "_CODE", CHILD)
    found = examine(tmp_path / "t.h5", seconds=2)
    assert found.whole == (0, 1, 3, 5)
    assert found.problems == (
        "t.h5, row 2: cannot be read: HDF5 stopped the process (SIGABRT)",
        "t.h5, row 4: cannot be read: HDF5 was still reading after 2 s",
    )


def test_a_reader_that_dies_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examining, "_CODE", "import os; os.abort()")
    assert examine(tmp_path / "t.h5").problems == ("t.h5: cannot be opened: HDF5 stopped the process (SIGABRT)",)


def test_a_damaged_journal_takes_nothing_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flip every part of the journal of a killed run: what was in its place already stays as new as it was."""
    monkeypatch.setattr(journal.JournaledFile, "sync_seconds", 0.0)  # every sample's pages are copied to their places
    variables = [Variable("x", ("step",), "1", "numbers")]
    writer = TraceWriter(tmp_path / "t.h5", TraceHeader("r", "y", "h", "b"), variables)
    for i in range(4):
        writer.write(SampleRecord(i, arrays={"x": np.arange(800.0) + i}))
    monkeypatch.setattr(journal.JournaledFile, "sync_seconds", 1e9)  # and those of the last two are not
    for i in (4, 5):
        writer.write(SampleRecord(i, arrays={"x": np.arange(800.0) + i}))
    main, log = (tmp_path / f"t.h5.partial{end}" for end in ("", ".journal"))
    content = log.read_bytes()
    held = set()
    for at in range(0, len(content), len(content) // 16):
        dead = tmp_path / "dead"
        shutil.rmtree(dead, ignore_errors=True)
        dead.mkdir()
        shutil.copy(main, dead)
        (dead / log.name).write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with open_trace(dead / main.name) as trace:
            assert trace.n_samples >= 4
            held.add(trace.n_samples)
        assert verify(dead / main.name) == []
        with TraceWriter(dead / "t.h5", TraceHeader("r", "y", "h", "b"), variables, resume=True) as again:
            for i in sorted(set(range(6)) - again.done):
                again.write(SampleRecord(i, arrays={"x": np.arange(800.0) + i}))
        assert verify(dead / "t.h5") == []
    assert held == {4, 5, 6}
    writer.close()


def test_the_command_ends_with_a_message_where_hdf5_stops_it(trace: Path, tmp_path: Path) -> None:
    """The whole process: whatever the damage, `probe verify` itself says something and does not crash."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "300"}
    bad = tmp_path / "bad.trace.h5"
    bad.write_bytes(trace.read_bytes()[:100] + os.urandom(5000) + trace.read_bytes()[5100:])
    done = subprocess.run(
        [sys.executable, "-m", "probe", "verify", str(bad)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr and "bad.trace.h5" in done.stderr
