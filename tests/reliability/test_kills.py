"""Whatever stops a run, finished samples stay, and a resumed run ends where an undisturbed one ends."""

from __future__ import annotations

import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hardship import ended, forked, needs_fork, partials, recording_recipe, same_runs, samples_of, trials
from typer.testing import CliRunner

import probe
import probe.trace_journal as journal
from probe.__main__ import load_cli
from probe.stopping import SIGNALS, Stopped
from probe.trace import open_trace, verify

ROOT = Path(__file__).resolve().parents[2]
COUNT = 5

Run = Callable[[Path, bool], None]


@pytest.fixture(scope="module")
def run_to(tiny: Any) -> Run:
    """Run the recipe into a folder, with its baseline."""
    samples = samples_of(COUNT)

    def act(folder: Path, resume: bool) -> None:
        probe.run(recording_recipe(), backbone=tiny, samples=samples, out=folder, resume=resume)

    return act


@pytest.fixture(scope="module")
def undisturbed(run_to: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The folder of a run that nobody disturbed, and how long it took."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_to(folder, False)  # the first one also pays for what libraries do once
    start = time.perf_counter()
    run_to(tmp_path_factory.mktemp("again"), False)
    return folder, time.perf_counter() - start


def held(folder: Path) -> dict[str, list[int]]:
    """The samples in each trace of a folder, all of which must be whole."""
    found = {}
    for path in [*partials(folder), *folder.glob("*.trace.h5")]:
        problems = verify(path)
        if problems and "holds nothing yet" in problems[0]:
            continue
        assert problems == []
        with open_trace(path) as trace:
            found[path.name.removesuffix(".partial")] = trace.samples.tolist()
    return found


def survive(run_to: Run, folder: Path, undisturbed: Path, kill: Callable[[int], None], most: int) -> int:
    """Start the run again and again, until it is done; `kill` ends it. The number of kills."""
    before: dict[str, list[int]] = {}
    kills = 0
    while not (folder / "hard.trace.h5").exists() or not (folder / "hard.baseline.trace.h5").exists():
        pid = forked(lambda: run_to(folder, True))
        if kills < most:
            kill(pid)
        status = ended(pid)
        assert status in (0, -signal.SIGKILL)
        kills += status == -signal.SIGKILL
        now = held(folder)
        for name, numbers in before.items():
            assert now.get(name, [])[: len(numbers)] == numbers, "a finished sample is gone"
        for numbers in now.values():
            assert numbers == list(range(len(numbers)))
        before = now
    assert sorted(p.suffix for p in folder.iterdir()) in ([".h5", ".h5"], [".h5", ".h5", ".png"])
    for name in ("hard.trace.h5", "hard.baseline.trace.h5"):
        same_runs(folder / name, undisturbed / name)
    return kills


def at_a_moment(rng: random.Random, seconds: float) -> Callable[[int], None]:
    def kill(pid: int) -> None:
        time.sleep(rng.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)

    return kill


@needs_fork
def test_kill_9_at_random_moments_of_a_run(run_to: Run, undisturbed: tuple[Path, float], tmp_path: Path) -> None:
    whole, seconds = undisturbed
    assert survive(run_to, tmp_path, whole, at_a_moment(random.Random(0), seconds), 3) >= 1


@needs_fork
@pytest.mark.slow
def test_campaign_kill_9_at_random_moments(run_to: Run, undisturbed: tuple[Path, float], tmp_path: Path) -> None:
    whole, seconds = undisturbed
    kills = runs = 0
    while kills < trials(250):
        kill = at_a_moment(random.Random(1000 + runs), seconds)
        kills += survive(run_to, tmp_path / str(runs), whole, kill, 4)
        runs += 1
    print(f"\n{kills} kills at random moments of {runs} runs: nothing lost")


def dying_in_a_write(run_to: Run, rng: random.Random, most: int) -> Run:
    """The run, but the process kills itself after so and so many bytes that it wrote, in the middle of a write."""
    honest = journal._write_all

    def act(folder: Path, resume: bool) -> None:
        left = rng.randrange(most)

        def write(file: Any, data: bytes) -> None:
            nonlocal left
            if left < len(data):
                honest(file, data[:left])
                os.kill(os.getpid(), signal.SIGKILL)
            left -= len(data)
            honest(file, data)

        if rng.random() < 0.85:  # or it would never be done
            journal._write_all = write
            journal.JournaledFile.sync_seconds = rng.choice([0.0, 0.1, 1.0])
            journal.JournaledFile.checkpoint_bytes = rng.choice([50_000, 16 << 20])
        run_to(folder, resume)

    return act


def campaign_in_writes(run_to: Run, whole: Path, folder: Path, wanted: int) -> tuple[int, int]:
    kills = runs = 0
    rng = random.Random(11)
    while kills < wanted:
        before: dict[str, list[int]] = {}
        here = folder / str(runs)
        while not (here / "hard.baseline.trace.h5").exists() or not (here / "hard.trace.h5").exists():
            seed = rng.random()
            pid = forked(
                lambda seed=seed, here=here: dying_in_a_write(run_to, random.Random(seed), 500_000)(here, True)
            )
            kills += ended(pid) == -signal.SIGKILL
            now = held(here)
            assert all(now.get(name, [])[: len(numbers)] == numbers for name, numbers in before.items())
            before = now
        for name in ("hard.trace.h5", "hard.baseline.trace.h5"):
            same_runs(here / name, whole / name)
        runs += 1
    return kills, runs


@needs_fork
def test_kill_9_inside_a_write(run_to: Run, undisturbed: tuple[Path, float], tmp_path: Path) -> None:
    assert campaign_in_writes(run_to, undisturbed[0], tmp_path, 2)[0] >= 2


@needs_fork
@pytest.mark.slow
def test_campaign_kill_9_inside_a_write(run_to: Run, undisturbed: tuple[Path, float], tmp_path: Path) -> None:
    kills, runs = campaign_in_writes(run_to, undisturbed[0], tmp_path, trials(250))
    print(f"\n{kills} kills inside a write in {runs} runs: nothing lost")


@needs_fork
@pytest.mark.parametrize("number", SIGNALS, ids=lambda s: s.name)
def test_a_signal_lets_the_sample_finish(tiny: Any, tmp_path: Path, number: signal.Signals) -> None:
    samples = samples_of(COUNT)
    told: list[int] = []

    def stop(at: Any) -> None:
        if at.sample == 2 and not told:
            told.append(at.step)
            os.kill(os.getpid(), number)

    before = [signal.getsignal(s) for s in SIGNALS]
    with pytest.raises(Stopped) as stopped:
        probe.run(recording_recipe(), backbone=tiny, samples=samples, out=tmp_path, on_progress=stop)
    assert (stopped.value.signal, stopped.value.finished, stopped.value.total) == (number, 3, COUNT)
    assert stopped.value.status == 128 + number
    assert [signal.getsignal(s) for s in SIGNALS] == before, "the handlers are given back"
    assert held(tmp_path) == {"hard.trace.h5": [0, 1, 2], "hard.baseline.trace.h5": [0, 1, 2]}
    assert not isinstance(stopped.value, Exception), "a loop over recipes that catches errors is stopped as well"


@needs_fork
def test_a_second_signal_stops_at_once(tiny: Any, tmp_path: Path) -> None:
    def stop(at: Any) -> None:
        if at.sample == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt) as stopped:
        probe.run(recording_recipe(), backbone=tiny, samples=samples_of(COUNT), out=tmp_path, on_progress=stop)
    assert not isinstance(stopped.value, Stopped)
    assert held(tmp_path) == {"hard.trace.h5": [0, 1], "hard.baseline.trace.h5": [0, 1]}


def test_a_run_stopped_in_its_last_sample_is_complete(tiny: Any, tmp_path: Path) -> None:
    def stop(at: Any) -> None:
        if at.sample == 1 and at.step == 1 and at.side == "hard":
            os.kill(os.getpid(), signal.SIGTERM)

    probe.run(recording_recipe(), backbone=tiny, samples=samples_of(2), out=tmp_path, on_progress=stop, timed=False)
    assert {p.suffix for p in tmp_path.iterdir()} == {".h5", ".png"}


def test_handlers_of_others_are_left_alone(tiny: Any, tmp_path: Path) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        probe.run(
            recording_recipe(), backbone=tiny, samples=samples_of(1), out=tmp_path, timed=False,
            on_progress=lambda at: os.kill(os.getpid(), signal.SIGTERM) if not seen else None,
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]


SLEEPER = """
import time
from probe.registry import scores

@scores.register
def sleepy(n: int, generator):
    time.sleep(0.25)
    import torch
    return torch.rand(n, generator=generator)
"""
SLEEPY = """
schema: 1
name: sleepy
data: {task: world/short, limit: 5}
probes:
  - {at: {site: layer.input, layer: 1}, score: sleepy, select: {top_k: {keep: 0.5}}, do: drop}
"""


def test_the_command_says_how_to_go_on_and_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sleep.py").write_text(SLEEPER)
    (tmp_path / "sleepy.yaml").write_text(SLEEPY)
    command = [sys.executable, "-m", "probe", "run", "sleepy.yaml", "--plugin", "sleep.py", "--no-time"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "400", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    folder = tmp_path / "runs" / "sleepy"
    deadline = time.monotonic() + 120
    while not any(held(folder).values()) if folder.exists() else True:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in said and "stopped by SIGTERM" in said
    (again,) = [line.removeprefix("to go on: probe ") for line in said.splitlines() if line.startswith("to go on: ")]
    words = shlex.split(again)
    assert words[-3:] == ["--out", "runs/sleepy", "--resume"]
    partial = held(folder)
    assert 0 < len(partial["sleepy.trace.h5"]) < 5
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(load_cli().app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert held(folder) == {f"sleepy{side}.trace.h5": [0, 1, 2, 3, 4] for side in ("", ".baseline")}
