"""A sweep on a real Ray cluster of two nodes: the same traces as here, whatever dies; nothing is lost or run twice."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hardship import trials
from test_sweeps import same_sweeps

from probe.errors import ProbeError
from probe.plugins import load_plugins
from probe.recipe import Recipe, load_recipe
from probe.registry import scores
from probe.sweep_run import SweepResult, sweep

ray = pytest.importorskip("ray")
REPO = Path(__file__).resolve().parents[2]
SAMPLES, PRUNED = 3, 4
CALLS = SAMPLES * PRUNED
"""How often a sweep that nothing happens to asks for the score: once per sample, of one step, of a pruned run."""

SWEEP = """
schema: 1
name: counted
dial: {keep: 0.5, deadly: false}
data: {limit: 3, task: world/short}
generate: {gen_length: 4, steps: 1, block_length: 4}
trace: {pictures: false}
sweep:
  backbones: [BACKBONES]
  dial: {VARIED}
probes:
  - {at: {site: layer.attention, layers: all}, record: [attention_mass]}
  - at: {site: before_lm}
    score: {counted: {deadly: $deadly}}
    select: {top_k: {keep: $keep}}
    do: drop
"""

PLUGIN = '''
"""A score that writes down who asks for it, and ends its process where it is told to."""
import os, signal, sys, time
from pathlib import Path

import torch

import probe
from probe import sweep_run

HERE = Path(__file__).parent
load = sweep_run.load

def note(file, words):
    with open(HERE / file, "a") as log:
        log.write(words + "\\n")

def counted_load(name, **options):
    note("loads", f"{os.getpid()} {name}")
    return load(name, **options)

sweep_run.load = counted_load

@probe.score
def counted(n: int, *, deadly: bool = False) -> torch.Tensor:
    """Worth as much as any other."""
    there = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    node = sys.modules["ray"].get_runtime_context().get_node_id() if there else "here"
    note("calls", f"{os.getpid()} {node}")
    time.sleep(PAUSE)
    trap = HERE / "trap"
    try:
        if (HERE / "calls").read_text().count("\\n") >= int(trap.read_text()):
            trap.unlink()
            deadly = True
    except FileNotFoundError:
        pass
    if deadly:
        os.kill(os.getpid(), signal.SIGKILL)
    return torch.zeros(n)
'''


class Desk:
    """A folder with a sweep and a plugin that counts."""

    def __init__(self, folder: Path, backbones: list[Path], varied: str, pause: float = 0.0) -> None:
        self.folder, self.out, self.recipe, self.plugin = folder, folder / "out", folder / "s.yaml", folder / "plug.py"
        folder.mkdir(exist_ok=True)
        text = SWEEP.replace("BACKBONES", ", ".join(map(str, backbones)))
        self.recipe.write_text(text.replace("VARIED", varied))
        self.plugin.write_text(PLUGIN.replace("PAUSE", str(pause)))

    def lines(self, file: str) -> list[list[str]]:
        path = self.folder / file
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def command(self, words: str) -> list[str]:
        """The command of the page, for this sweep."""
        named = {"retention.yaml": self.recipe, "/shared/retention": self.out}
        assert named.keys() <= set(shlex.split(words)), words
        words_here = [str(named.get(word, word)) for word in shlex.split(words)[1:]]
        return [sys.executable, "-m", "probe", *words_here, "--plugin", str(self.plugin)]


def on_the_page(option: str) -> str:
    """The command of the page on sweeps that has an option."""
    page = (REPO / "docs" / "sweeps.md").read_text()
    return next(line for line in page.splitlines() if line.startswith("probe sweep") and option in line)


def environment() -> dict[str, str]:
    more = {"PYTHONPATH": f"{REPO}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}
    return os.environ | more | {"COLUMNS": "200"}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Two nodes, each with room for one worker."""
    from ray.cluster_utils import Cluster

    before = dict(os.environ)
    os.environ.update(environment())
    node = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        cluster.add_node(**node)
        yield cluster.address
    finally:
        cluster.shutdown()
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="module")
def backbones(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same weights under two names."""
    folder = tmp_path_factory.mktemp("backbones")
    return [Path(shutil.copytree(tiny_folder, folder / name)) for name in ("one", "two")]


@pytest.fixture(scope="module")
def desk(backbones: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Desk]:
    def make(name: str, *, varied: str = "keep: [0.5, 0.25]", pause: float = 0.0, count: int = 2) -> Desk:
        return Desk(tmp_path_factory.mktemp(name), backbones[:count], varied, pause)

    return make


def here(desk: Desk) -> SweepResult:
    """The sweep, or what is left of it, in this process."""
    with plugged(desk) as recipe:
        return sweep(recipe, out=desk.out)


class plugged:
    """With the plugin of a desk; the sweep."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    def __enter__(self) -> Recipe:
        from probe import sweep_run

        self.load = sweep_run.load
        load_plugins([self.desk.plugin])
        return load_recipe(self.desk.recipe)

    def __exit__(self, *_: object) -> None:
        from probe import sweep_run

        sweep_run.load = self.load
        del scores._entries["counted"]


@pytest.fixture(scope="module")
def undisturbed(desk: Callable[..., Desk]) -> Desk:
    made = desk("undisturbed")
    assert here(made).open == 0
    assert len(made.lines("calls")) == CALLS and len(made.lines("loads")) == 2
    return made


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_loses_nothing(desk: Any, undisturbed: Desk, address: str) -> None:
    """The command of the page, on two nodes; one worker kills itself within a sample, once."""
    made = desk("killed", pause=0.2)
    (made.folder / "trap").write_text("3")
    words = re.sub(r"--address \S+", f"--address {address}", on_the_page("--on ray --address"))
    done = subprocess.run(made.command(words), env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not (made.folder / "trap").exists()
    same_sweeps(made.out, undisturbed.out)
    calls, loads = made.lines("calls"), made.lines("loads")
    assert len(calls) == CALLS + 1  # the sample in which it happened had not been finished
    assert len({node for _, node in calls}) == 2
    assert max(Counter(map(tuple, loads)).values()) == 1  # a backbone is loaded once by those who work on it
    said = " ".join(done.stderr.split())  # one note of ours, and not a word of Ray's
    assert re.fullmatch(r"note: \S+, world/short: \S+ \S+ its worker died \(.*\); another one goes on with it", said), (
        said
    )
    assert said.count("note: ") == 1 and "raylet" not in done.stdout + said
    assert "counted keep=0.25" in done.stdout and not list(made.out.glob(".here-*"))


@pytest.mark.slow
def test_a_unit_that_ends_every_worker_is_given_up_and_the_others_are_run(desk: Any, address: str) -> None:
    from probe.sweep_ray import MOST_DEATHS, workers

    made, notes = desk("deadly", varied="deadly: [true, false]", count=1), []
    asked = signal.getsignal(signal.SIGTERM)
    with plugged(made) as recipe:
        work = workers(address, plugins=[made.plugin], on_note=notes.append)
        result = sweep(recipe, out=made.out, workers=work, retries=1)
    (failure,) = result.failures
    assert failure.unit.cell.dials == {"deadly": True} and f"{MOST_DEATHS} times" in failure.reason
    assert len(notes) == MOST_DEATHS - 1 and result.open == 1
    assert len(made.lines("calls")) == MOST_DEATHS + SAMPLES
    assert signal.getsignal(signal.SIGTERM) == asked and not ray.is_initialized()


@pytest.mark.slow
def test_what_a_node_does_not_see_is_said(desk: Any, address: str) -> None:
    from probe.sweep_ray import workers

    made = desk("unseen", count=1)
    made.out.mkdir()
    handle = os.open(made.out, os.O_RDONLY)
    seen_by_us_alone = Path(f"/proc/self/fd/{handle}")
    try:
        if not (seen_by_us_alone / ".").exists():
            pytest.skip("needs /proc")
        with plugged(made) as recipe, pytest.raises(ProbeError, match=r"a worker on .* does not see .*all nodes share"):
            sweep(recipe, out=seen_by_us_alone, workers=workers(address, plugins=[made.plugin]))
        with plugged(made) as recipe, pytest.raises(ProbeError, match="there is no such file"):
            sweep(recipe, out=made.out, workers=workers(address, plugins=["nowhere.py"]))
    finally:
        os.close(handle)
    assert made.lines("calls") == [] and list(made.out.iterdir()) == []


@pytest.mark.slow
def test_asked_to_stop_it_finishes_its_samples_and_the_command_goes_on(
    desk: Any, undisturbed: Desk, address: str
) -> None:
    made = desk("stopped", pause=0.3)
    words = made.command(re.sub(r"--address \S+", f"--address {address}", on_the_page("--on ray --address")))
    with subprocess.Popen(words, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        begin = time.monotonic()
        while len(made.lines("calls")) < 3 and time.monotonic() - begin < 120:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "To go on: probe sweep" in said and "Traceback" not in said
    assert len(made.lines("calls")) < CALLS
    assert here(made).open == 0
    same_sweeps(made.out, undisturbed.out)
    assert len(made.lines("calls")) == CALLS


@pytest.mark.slow
def test_campaign_workers_killed_at_random(desk: Any, undisturbed: Desk, address: str) -> None:
    import random

    from probe.sweep_ray import workers

    rng, kills = random.Random(5), 0
    for trial in range(trials(10)):
        made, killed = desk(f"campaign{trial}", pause=0.1), 0
        deadline = rng.uniform(0.1, 1.5)

        def kill_one(_: str = "", *, made: Desk = made) -> None:
            os.kill(int(made.lines("calls")[-1][0]), signal.SIGKILL)

        pid = os.fork()
        if pid == 0:
            while not made.lines("calls"):
                time.sleep(0.02)
            time.sleep(deadline)
            try:
                kill_one()
                os._exit(0)
            except ProcessLookupError:
                os._exit(1)
        with plugged(made) as recipe:
            result = sweep(recipe, out=made.out, workers=workers(address, plugins=[made.plugin]))
        killed = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert result.open == 0 and result.failures == ()
        same_sweeps(made.out, undisturbed.out)
        assert CALLS <= len(made.lines("calls")) <= CALLS + killed
        kills += killed
    print(f"\n{kills} workers killed at random moments: nothing lost, nothing run twice")


@pytest.mark.parametrize(
    ("there", "device", "gpus", "needs", "fit"),
    [
        ({"CPU": 6.0}, "auto", 1, {"num_cpus": 1}, 6),
        ({"CPU": 6.0, "GPU": 4.0}, "auto", 1, {"num_gpus": 1, "num_cpus": 1}, 4),
        ({"CPU": 6.0, "GPU": 4.0}, "cuda", 2, {"num_gpus": 2, "num_cpus": 1}, 2),
        ({"CPU": 6.0, "GPU": 4.0}, "cpu", 1, {"num_cpus": 1}, 6),
    ],
)
def test_a_worker_for_every_device(there: Any, device: str, gpus: int, needs: Any, fit: int) -> None:
    from probe.sweep_ray import _needs

    assert _needs(SimpleNamespace(cluster_resources=lambda: there), device, gpus) == (needs, fit)


def test_a_cluster_without_the_devices_asked_for() -> None:
    from probe.sweep_ray import _needs

    with pytest.raises(ProbeError, match="needs 1 GPUs, but the cluster has 0"):
        _needs(SimpleNamespace(cluster_resources=lambda: {"CPU": 2.0}), "cuda", 1)


def test_no_cluster_there(desk: Any) -> None:
    from probe.sweep_ray import workers

    made = desk("nobody", count=1)
    with plugged(made) as recipe, pytest.raises(ProbeError, match=r"--address 127.0.0.1:1: no cluster there"):
        sweep(recipe, out=made.out, workers=workers("127.0.0.1:1", plugins=[made.plugin]))
    assert not ray.is_initialized() and not list(made.out.iterdir())
