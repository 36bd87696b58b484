"""A sweep on a Ray cluster: workers that keep a backbone loaded, on as many nodes as there are.

The driver gives units out one at a time and remembers who has which; all else is in the traces, on a file system that
all nodes share. A worker that dies is replaced, and its unit resumed by another one.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from probe.errors import ProbeError
from probe.failures import reason_of
from probe.stopping import Stopped, Stopping
from probe.sweep import Unit
from probe.sweep_ray_actor import Carrier, Setup, local_names
from probe.sweep_run import Outcome, Workers, backbone_key

MOST_DEATHS = 3
"""Workers that a unit may cost, and starts in a row that may fail."""
PATIENCE = 30.0
"""Seconds after which it is said that no worker could start yet."""
STORE = 100 * 2**20
"""Bytes of a cluster's own memory for objects: nothing but units travels."""


class SweepStopped(Stopped):
    """A sweep was asked to stop; its workers have finished their samples. `finished` of `total` runs are done."""

    def __init__(self, number: signal.Signals, folder: Path, finished: int, total: int) -> None:
        super().__init__(number, folder, finished, total)
        self.args = (f"stopped by {number.name}: {finished} of {total} runs are finished, in {folder}",)


def workers(
    address: str | None = None,
    *,
    count: int | None = None,
    gpus: int = 1,
    device: str = "auto",
    dtype: str = "auto",
    plugins: Sequence[Path | str] = (),
    command: str = "",
    on_note: Callable[[str], None] | None = None,
) -> Workers:
    """Workers on a Ray cluster, for `probe.sweep_run.sweep`.

    `address` is a running cluster's (default: RAY_ADDRESS, else a cluster of this machine's own is started and ended).
    Each of `count` workers (default: as many as fit) has `gpus` GPUs where the cluster has any, else one CPU. `on_note`
    is told what a person may want to know. Raises `ProbeError` where Ray is missing, no cluster is reached, no worker
    starts, or a worker does not see the sweep's folder.
    """
    try:
        import ray.exceptions  # which a mere folder called `ray` does not have, as Ray leaves one in /tmp
    except ImportError:
        raise ProbeError("--on ray needs Ray: pip install 'dmllm-probe[ray]'") from None

    def work(units: Sequence[Unit], root: Path) -> Iterator[Outcome]:
        if not units:
            return
        names = local_names(units)
        files = [os.path.abspath(p) if Path(p).is_file() else str(p) for p in plugins]
        with Stopping() as stopping, _cluster(ray, address, count), _marker(root) as marker:
            seen = (str(marker), *names)
            setup = Setup(os.getcwd(), seen, tuple(files), device, dtype, command)
            needs, fit = _needs(ray, device, gpus)
            team = _Team(ray, units, root, setup, needs, count or fit, on_note)
            yield from team.work(stopping)

    return work


@contextmanager
def _cluster(ray: Any, address: str | None, count: int | None) -> Iterator[None]:
    """Connected to a cluster; one that the caller is connected to already is used and left as it is."""
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    own: dict[str, Any] = {}
    if address == "local":
        own = {"include_dashboard": False, "object_store_memory": STORE}
        own |= {} if count is None else {"num_cpus": max(count, os.cpu_count() or 1)}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # whoever runs a sweep was not asked
    asked = signal.getsignal(signal.SIGTERM)
    try:
        _reach(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL, **own)
    except Exception as error:
        where = "no cluster could be started here" if address == "local" else f"--address {address}: no cluster there"
        raise ProbeError(f"{where}: {reason_of(error)}") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, asked)  # Ray puts its own there
    # of a worker's death we tell ourselves; for what Ray prints of it there is no public switch
    ray._private.worker._worker_logs_enabled = False
    try:
        yield
    finally:
        ray.shutdown()
        ray._private.worker._worker_logs_enabled = True


def _reach(address: str) -> None:
    """Raise `OSError` where nobody listens, which Ray would try again and again for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


@contextmanager
def _marker(root: Path) -> Iterator[Path]:
    """A file in the sweep's folder that only those see who see this very folder."""
    marker = Path(os.path.abspath(root)) / f".here-{uuid.uuid4().hex}"
    marker.touch()
    try:
        yield marker
    finally:
        marker.unlink(missing_ok=True)


def _needs(ray: Any, device: str, gpus: int) -> tuple[dict[str, float], int]:
    """What a worker occupies, and how many fit into the cluster."""
    there = ray.cluster_resources()
    kind = device.partition(":")[0]
    if kind == "cuda" or (kind == "auto" and there.get("GPU", 0) >= 1):
        if there.get("GPU", 0) < gpus:
            raise ProbeError(f"a worker needs {gpus} GPUs, but the cluster has {there.get('GPU', 0):.0f}")
        return {"num_gpus": gpus, "num_cpus": 1}, int(there["GPU"] // gpus)
    return {"num_cpus": 1}, max(1, int(there.get("CPU", 0)))


@dataclass
class _Member:
    """A worker: what it has been given (None: it is getting ready), and which backbone it has loaded."""

    actor: Any
    unit: int | None = None
    loaded: str = ""


class _Team:
    """Gives units to workers and replaces those that die. Every member in `at` has something to do."""

    def __init__(
        self,
        ray: Any,
        units: Sequence[Unit],
        root: Path,
        setup: Setup,
        needs: dict[str, float],
        count: int,
        on_note: Callable[[str], None] | None,
    ) -> None:
        self._ray, self._units, self._setup, self._count, self._on_note = ray, units, setup, count, on_note
        self._root = Path(os.path.abspath(root))
        # a thread of its own for `stop`; whom to start anew is decided here, with what it was doing in mind
        kind = ray.remote(concurrency_groups={"control": 1}, max_restarts=0, max_task_retries=0)(Carrier)
        self._kind = kind.options(scheduling_strategy="SPREAD", **needs)
        self._keys = [backbone_key(unit.cell.recipe) for unit in units]
        self._waiting = list(range(len(units)))
        self._deaths: Counter[int] = Counter()
        self._failed_starts = 0
        self._at: dict[Any, _Member] = {}

    def work(self, stopping: Stopping) -> Iterator[Outcome]:
        """Outcomes as they come. Raises `SweepStopped` when asked to stop, after everybody's present sample."""
        begun, finished = time.monotonic(), 0
        try:
            while self._waiting or self._busy():
                self._hire()
                if stopping.signal is not None:
                    finished += self._let_finish()
                    raise SweepStopped(stopping.signal, self._root, finished, len(self._units))
                for ref in self._ray.wait(list(self._at), timeout=0.5)[0]:
                    outcome = self._answered(ref)
                    if outcome is not None:
                        finished += outcome.state == "done"
                        yield outcome
                if begun and (self._busy() or not self._waiting):
                    begun = 0.0
                elif begun and time.monotonic() - begun > PATIENCE:
                    begun = 0.0
                    self._note("no worker could start yet: the cluster is busy, or has no node that is free")
        finally:
            for member in self._at.values():
                self._dismiss(member)

    def _note(self, words: str) -> None:
        if self._on_note is not None:
            self._on_note(words)

    def _busy(self) -> list[_Member]:
        return [member for member in self._at.values() if member.unit is not None]

    def _hire(self) -> None:
        """As many workers as can have something to do."""
        while len(self._at) < min(self._count, len(self._waiting) + len(self._busy())):
            actor = self._kind.remote()
            self._at[actor.open.remote(self._setup)] = _Member(actor)

    def _dismiss(self, member: _Member) -> None:
        with suppress(self._ray.exceptions.RayError):
            self._ray.kill(member.actor)

    def _answered(self, ref: Any) -> Outcome | None:
        """What a worker says; it is given its next unit."""
        member = self._at.pop(ref)
        outcome: Outcome | None = None
        wrong = self._ray.exceptions
        try:
            answer = self._ray.get(ref)
        except wrong.LocalRayletDiedError as error:
            raise ProbeError("the cluster's node on this machine is gone; the same command goes on") from error
        except wrong.RayTaskError as error:  # the worker is well, but what it was given could not be read or told
            answer = f"{reason_of(error.cause or error)} (in a worker)"
            if member.unit is not None:
                outcome = Outcome(self._units[member.unit], "failed", answer, again=True)
        except wrong.RayError as error:
            return self._lost(member, error)
        else:
            if member.unit is not None and answer is not None:
                outcome = replace(answer, unit=self._units[member.unit])
        if member.unit is None:
            self._failed_starts = 0
            if answer:
                self._dismiss(member)
                raise ProbeError(answer)
        self._give(member)
        return outcome

    def _give(self, member: _Member) -> None:
        """The next unit, preferably of the backbone that is loaded, else of the one that the fewest have."""
        if not self._waiting:
            self._dismiss(member)
            return
        have = Counter(other.loaded for other in self._at.values())
        index = min(self._waiting, key=lambda i: (self._keys[i] != member.loaded, have[self._keys[i]]))
        self._waiting.remove(index)
        member.unit, member.loaded = index, self._keys[index]
        again = self._deaths[index] > 0
        self._at[member.actor.carry_out.remote(self._units[index], self._root, again=again)] = member

    def _lost(self, member: _Member, error: Exception) -> Outcome | None:
        """A worker died, or cannot be reached any more."""
        self._dismiss(member)  # in the latter case it must not go on
        reason = _last_line(error)
        if member.unit is None:
            self._failed_starts += 1
            if self._failed_starts >= MOST_DEATHS:
                raise ProbeError(f"{self._failed_starts} workers in a row could not be started: {reason}") from error
            return None
        self._deaths[member.unit] += 1
        unit = self._units[member.unit]
        if self._deaths[member.unit] >= MOST_DEATHS:
            return Outcome(unit, "failed", f"it ended its worker {MOST_DEATHS} times; the last time: {reason}")
        self._note(f"{unit.title}: its worker died ({reason}); another one goes on with it")
        self._waiting.insert(0, member.unit)
        return None

    def _let_finish(self) -> int:
        """Ask everybody to finish their sample and wait for it; how many finished their unit with it."""
        done = 0
        for member in self._busy():
            member.actor.stop.options(concurrency_group="control").remote()
        while busy := [ref for ref, member in self._at.items() if member.unit is not None]:
            for ref in self._ray.wait(busy, timeout=0.5)[0]:
                with suppress(self._ray.exceptions.RayError):
                    answer = self._ray.get(ref)
                    done += answer is not None and answer.state == "done"
                self._dismiss(self._at.pop(ref))
        return done


def _last_line(error: Exception) -> str:
    """The end of an error's text, where Ray says what it was, without its advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].partition(" Some common causes")[0] if lines else type(error).__name__
