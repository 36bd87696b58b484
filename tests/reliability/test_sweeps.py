"""A sweep that is killed, shared, cut into shards or has runs that fail ends with what an undisturbed one has."""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hardship import contents, ended, forked, needs_fork, same_runs, trials
from typer.testing import CliRunner

from probe.__main__ import load_cli
from probe.backbones.base import Backbone
from probe.errors import ProbeError
from probe.recipe import Recipe, parse_recipe
from probe.registry import scores
from probe.sweep import Unit
from probe.sweep_jobs import accelerator
from probe.sweep_run import Outcome, SweepResult, Worker, sweep
from probe.trace import open_trace, verify

SWEEP = """
schema: 1
name: small
data: {limit: LIMIT}
generate: {gen_length: 4, steps: 4, block_length: 4}
trace: {pictures: false}
sweep:
  recipes: prune/random
  backbones: BACKBONE
  data: [world/short, world/long]
  dial: {keep: [50%, 25%]}
  shards: SHARDS
probes:
  - {at: {site: layer.attention, layers: all}, record: [attention_mass]}
"""
RUNS = 2 * (1 + 2)


class Ready(Worker):
    """A worker whose backbone is loaded."""

    def __init__(self, model: Backbone, **more: Any) -> None:
        super().__init__(**more)
        self.model = model

    def backbone(self, recipe: Recipe) -> Backbone:
        return self.model


@pytest.fixture(scope="module")
def small(tiny_folder: Path) -> Callable[..., Recipe]:
    def make(*, shards: int = 1, limit: int = 3, text: str = SWEEP) -> Recipe:
        values = {"BACKBONE": str(tiny_folder), "SHARDS": str(shards), "LIMIT": str(limit)}
        for name, value in values.items():
            text = text.replace(name, value)
        return parse_recipe(text, source="small.yaml")

    return make


@pytest.fixture(scope="module")
def undisturbed(small: Any, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    return sweep(small(), out=tmp_path_factory.mktemp("sweep"), workers=Ready(tiny).all)


def traces(folder: Path) -> dict[str, Path]:
    return {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*.trace.h5")) if ".shard" not in p.name}


def same_sweeps(a: Path, b: Path) -> None:
    one, two = traces(a), traces(b)
    assert one.keys() == two.keys() and len(one) == RUNS
    for name in one:
        same_runs(one[name], two[name])
    assert values(a) == values(b)
    assert not list(a.rglob("*.partial"))


def values(folder: Path) -> list[dict[str, str]]:
    with open(folder / "table.csv", encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if k not in ("seconds", "speed")} for row in csv.DictReader(file)]


def test_every_run_is_there_and_a_second_call_has_nothing_to_do(small: Any, tiny: Any, undisturbed: Any) -> None:
    assert undisturbed.failures == () and undisturbed.open == 0
    assert [len(rows) for rows in undisturbed.rows.values()] == [3, 3]
    before = {name: path.stat().st_mtime_ns for name, path in traces(undisturbed.folder).items()}
    told: list[tuple[int, int]] = []

    def no_work(unit: Unit, root: Path) -> Outcome:
        raise AssertionError(f"{unit.title} was done already")

    again = sweep(
        small(),
        out=undisturbed.folder,
        workers=lambda units, root: (no_work(u, root) for u in units),
        on_unit=lambda finished, total, unit: told.append((finished, total)),
    )
    assert told == [(RUNS, RUNS)] and again.rows.keys() == undisturbed.rows.keys()
    assert before == {name: path.stat().st_mtime_ns for name, path in traces(undisturbed.folder).items()}


def test_the_table_says_what_the_traces_say(undisturbed: SweepResult) -> None:
    rows = values(undisturbed.folder)
    assert len(rows) == RUNS
    for row in rows:
        with open_trace(undisturbed.folder / row["trace"]) as trace:
            assert int(row["n"]) == trace.n_samples == 3
            assert float(row["score"]) == pytest.approx(trace.array("score").mean())
            assert float(row["flops"]) == pytest.approx(trace.array("flops_total").mean())
        assert (row["agreement"] == "") == (row["recipe"] == "unpruned")
    kept = {(r["recipe"], r["dials"]): float(r["retention"]) for r in rows if r["data"] == "world/short"}
    assert kept["random", '{"keep": "25%"}'] == pytest.approx(0.25)
    assert kept["unpruned", ""] == 1


def test_more_samples_continue_the_runs(small: Any, tiny: Any, undisturbed: SweepResult, tmp_path: Path) -> None:
    sweep(small(limit=2), out=tmp_path, workers=Ready(tiny).all)
    first = {name: contents(path) for name, path in traces(tmp_path).items()}
    sweep(small(), out=tmp_path, workers=Ready(tiny).all)
    same_sweeps(tmp_path, undisturbed.folder)
    for name, path in traces(tmp_path).items():
        now = contents(path)
        assert all(now[number] == sample for number, sample in first[name].items())


def test_shards_by_several_calls_are_the_whole(small: Any, tiny: Any, undisturbed: SweepResult, tmp_path: Path) -> None:
    done = [sweep(small(shards=2), out=tmp_path, workers=Ready(tiny).all, shard=(i, 3)) for i in range(3)]
    assert [r.open for r in done][-1] == 0 and done[0].open > 0
    same_sweeps(tmp_path, undisturbed.folder)


@needs_fork
def test_kill_9_at_random_moments_of_a_sweep(small: Any, tiny: Any, undisturbed: SweepResult, tmp_path: Path) -> None:
    assert kill_until_done(small, tiny, undisturbed, tmp_path, random.Random(3), most=3) >= 1


@needs_fork
@pytest.mark.slow
def test_campaign_kill_9_of_sweeps(small: Any, tiny: Any, undisturbed: SweepResult, tmp_path: Path) -> None:
    kills = sweeps = 0
    while kills < trials(100):
        rng = random.Random(500 + sweeps)
        kills += kill_until_done(small, tiny, undisturbed, tmp_path / str(sweeps), rng, most=8)
        sweeps += 1
    print(f"\n{kills} kills at random moments of {sweeps} sweeps: nothing lost")


def kill_until_done(small: Any, tiny: Any, whole: SweepResult, folder: Path, rng: random.Random, most: int) -> int:
    shards, kills, status = rng.choice([1, 2]), 0, 1
    folder.mkdir(exist_ok=True)
    begin = time.perf_counter()
    before: dict[str, int] = {}
    while status:
        pid = forked(lambda: sweep(small(shards=shards), out=folder, workers=Ready(tiny).all) and None)
        if kills < most:
            time.sleep(rng.uniform(0, 2.0))
            os.kill(pid, signal.SIGKILL)
        status = ended(pid)
        assert status in (0, -signal.SIGKILL) and time.perf_counter() - begin < 600
        kills += status == -signal.SIGKILL
        now = {str(p): p.stat().st_ino for p in folder.rglob("*.trace.h5")}
        merged = {name for name in before if ".shard" not in name} if shards > 1 else set()
        assert all(now.get(name) == inode for name, inode in before.items() if name not in merged)
        before = now
    same_sweeps(folder, whole.folder)
    return kills


@needs_fork
def test_several_processes_share_one_sweep(small: Any, tiny: Any, undisturbed: SweepResult, tmp_path: Path) -> None:
    def join_in() -> None:
        result = sweep(small(), out=tmp_path, workers=Ready(tiny).all)
        assert result.failures == ()

    pids = [forked(join_in) for _ in range(3)]
    assert [ended(pid) for pid in pids] == [0, 0, 0]
    result = sweep(small(), out=tmp_path, workers=Ready(tiny).all)
    assert result.open == 0
    same_sweeps(tmp_path, undisturbed.folder)


@pytest.fixture
def moody(small: Any) -> Any:
    """A sweep with a score that raises what it is told to, as often as it is told to."""
    faults: list[Exception] = []

    @scores.register
    def moody(n: int) -> torch.Tensor:
        """Worth as much as any other."""
        return torch.zeros(n)

    text = SWEEP.replace("  recipes: prune/random\n", "").replace("[50%, 25%]", "[0.5, 0.25]")
    text = text.replace("small", "moody").replace("data: {", "dial: {keep: 1.0}\ndata: {")
    text += "  - {at: {site: before_lm}, score: moody, select: {top_k: {keep: $keep}}, do: drop}\n"
    yield small(text=text), faults
    del scores._entries["moody"]


def failing(model: Backbone, faults: list[Exception], which: str) -> Callable[..., Any]:
    """Workers that fail at a unit as long as there are faults."""
    ready = Ready(model)

    def work(units: Any, root: Path) -> Any:
        for unit in units:
            if which in unit.title and faults:
                try:
                    raise faults.pop()
                except Exception as error:
                    again = not isinstance(error, ProbeError)
                    yield Outcome(unit, "failed", str(error), again=again)
            else:
                yield ready(unit, root)

    return work


def test_a_run_that_failed_is_tried_again_last_of_all(moody: Any, tiny: Any, tmp_path: Path) -> None:
    recipe, _ = moody
    order: list[str] = []
    faults: list[Exception] = [RuntimeError("the device was lost")]
    result = sweep(
        recipe,
        out=tmp_path,
        workers=failing(tiny, faults, "world/short: moody keep=0.5"),
        on_unit=lambda finished, total, unit: order.append(unit.title.split(", ")[-1] if unit else "end"),
    )
    assert result.failures == () and result.open == 0
    assert order[-2:] == ["world/short: moody keep=0.5", "end"]


def test_what_cannot_pass_is_not_tried_again_and_the_others_run(moody: Any, tiny: Any, tmp_path: Path) -> None:
    recipe, _ = moody
    faults: list[Exception] = [ProbeError("no such thing"), ProbeError("no such thing")]
    result = sweep(recipe, out=tmp_path, workers=failing(tiny, faults, "world/short: moody keep=0.25"), retries=5)
    assert [f.reason for f in result.failures] == ["no such thing"] and result.open == 1
    assert sum(len(rows) for rows in result.rows.values()) == 5 and len(faults) == 1


def test_a_lost_device_in_a_run_is_said_and_the_sweep_goes_on(small: Any, tiny: Any, tmp_path: Path) -> None:
    class Lost(Ready):
        def backbone(self, recipe: Recipe) -> Backbone:
            raise RuntimeError("the device was lost")

    result = sweep(small(), out=tmp_path, workers=Lost(tiny).all, retries=2)
    assert len(result.failures) == RUNS and "the device was lost" in result.failures[0].reason
    assert result.open == RUNS and result.rows == {} and result.tables == ()


SLEEPER = """
import time

import torch

import probe

@probe.score
def sleepy(n: int) -> torch.Tensor:
    time.sleep(0.2)
    return torch.zeros(n)
"""


def test_processes_of_one_command_share_the_runs(small: Any, undisturbed: SweepResult, tmp_path: Path) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text(small().to_yaml())
    out = tmp_path / "out"
    words = ["sweep", str(recipe), "--out", str(out), "--jobs", "2"]
    ran = CliRunner().invoke(load_cli().app, words, catch_exceptions=False, env={"COLUMNS": "200"})
    assert ran.exit_code == 0 and (out / "job1.log").read_text() == ""
    same_sweeps(out, undisturbed.folder)


def test_siblings_take_turns_on_the_accelerators_that_may_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [accelerator(i, 2) for i in range(4)] == ["0", "1", "0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [accelerator(i, 2) for i in range(4)] == ["3", "5", "3", "5"]


def test_siblings_end_with_the_process_that_began_them(moody: Any, small: Any, tmp_path: Path) -> None:
    (tmp_path / "sleep.py").write_text(SLEEPER)
    (tmp_path / "sleepy.yaml").write_text(moody[0].to_yaml().replace("moody", "sleepy"))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    words = ["sweep", "sleepy.yaml", "--plugin", "sleep.py", "--out", "out", "--jobs", "2", "--limit", "40"]
    begun = subprocess.Popen([sys.executable, "-m", "probe", *words], cwd=tmp_path, env=environment)
    log = tmp_path / "out" / "job1.log"
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").glob("*sleepy*/*.partial")):
        assert begun.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    (sibling,) = psutil.Process(begun.pid).children()
    time.sleep(2)
    begun.kill()
    begun.wait()
    sibling.wait(60)
    assert not sibling.is_running()
    assert log.read_text() in ("", "\nSIGTERM: stopping after this sample; once more stops at once\n")
    for path in (tmp_path / "out").rglob("*.partial"):
        assert verify(path) == []


def test_the_command(small: Any, undisturbed: SweepResult, tmp_path: Path) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text(small().to_yaml())
    app, terminal = load_cli().app, {"COLUMNS": "200"}

    def invoke(*words: object) -> Any:
        return CliRunner().invoke(app, ["sweep", str(recipe), *map(str, words)], env=terminal, catch_exceptions=False)

    out = tmp_path / "out"
    planned = invoke("--out", out, "--plan")
    assert planned.exit_code == 0 and f"{RUNS} runs" in planned.output and "0 of them done" in planned.output
    assert not out.exists()
    ran = invoke("--out", out)
    assert ran.exit_code == 0 and "random keep=25%" in ran.output and "25%" in ran.output
    same_sweeps(out, undisturbed.folder)
    assert f"{RUNS} of them done" in invoke("--out", out, "--plan").output
    wrong = CliRunner().invoke(app, ["sweep", str(recipe), "--set", "sweep.shards=0"], env=terminal)
    assert isinstance(wrong.exception, ProbeError) and "shards" in str(wrong.exception)
