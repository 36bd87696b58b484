"""What one worker of a sweep on a Ray cluster does: Ray makes an actor of this class. Knows nothing of Ray."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from probe.errors import ProbeError
from probe.plugins import load_plugins
from probe.stopping import Stopping
from probe.sweep import Unit
from probe.sweep_run import Outcome, Worker

RELEASE = 120.0
"""Seconds in which the lock of a process that died is gone, at the latest: a file server may hold it for a while."""


@dataclass(frozen=True)
class Setup:
    """What a worker needs to know of the command: `folder` is where it was called, `seen` what has to be there."""

    folder: str
    seen: tuple[str, ...] = ()
    plugins: tuple[str, ...] = ()
    device: str = "auto"
    dtype: str = "auto"
    command: str = ""


class Carrier:
    """Carries out units in a process of its own. `stop` is called from another thread than the rest."""

    def __init__(self) -> None:
        self._stopping = Stopping()  # not entered: signals are the cluster's business, `stop` is ours
        self._worker = Worker()

    def open(self, setup: Setup) -> str:
        """Get ready; returns what is wrong here, empty if nothing is."""
        where = f"a worker on {socket.gethostname()}"
        if missing := [name for name in setup.seen if not os.path.exists(name)]:
            rule = "the sweep's folder and the files that it names must be on a file system that all nodes share"
            return f"{where} does not see {missing[0]}; {rule}"
        if os.path.isdir(setup.folder):  # names in recipes mean what they mean there
            os.chdir(setup.folder)
        try:
            load_plugins(setup.plugins)
        except ProbeError as error:
            return f"{where}: {error}"
        self._worker = Worker(setup.device, setup.dtype, command=setup.command, stopping=self._stopping)
        return ""

    def carry_out(self, unit: Unit, root: Path, *, again: bool) -> Outcome | None:
        """Run a unit, or what is left of it; None where `stop` ended that.

        `again`: its last worker died, whose lock on the trace may outlive it for a while.
        """
        until = time.monotonic() + (RELEASE if again else 0)
        while True:
            if self._stopping.signal is not None:
                return None
            try:
                outcome = self._worker(unit, root)
            except KeyboardInterrupt:
                return None
            if outcome.state != "elsewhere" or time.monotonic() > until:
                return outcome
            time.sleep(1)

    def stop(self) -> None:
        """Ask for an end after the present sample."""
        self._stopping.signal = signal.SIGTERM


def local_names(units: Sequence[Unit]) -> tuple[str, ...]:
    """Whatever the units' recipes name that is a file or a folder here: backbones, data, settings of loading."""
    names: dict[str, None] = {}
    for unit in units:
        recipe = unit.cell.recipe
        for name in (recipe.backbone, recipe.data.source, *recipe.load.values()):
            if isinstance(name, str) and os.path.exists(name):
                names[os.path.abspath(name)] = None
    return tuple(names)
