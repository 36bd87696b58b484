"""A run that is asked to stop (Ctrl-C, `kill`, a closed terminal) finishes its sample first."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, Self

SIGNALS: tuple[signal.Signals, ...] = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
"""What asks a run to stop: Ctrl-C; `kill`, a scheduler, a container; a terminal that goes away."""


class Stopped(KeyboardInterrupt):
    """A run was asked to stop and did so between two samples.

    `folder` holds its partial traces, `finished` of `total` samples are in them (`total` None: not known).
    """

    def __init__(self, number: signal.Signals, folder: Path, finished: int, total: int | None) -> None:
        self.signal, self.folder, self.finished, self.total = number, folder, finished, total
        share = f"{finished} samples" if total is None else f"{finished} of {total} samples"
        super().__init__(f"stopped by {number.name}: {share} are finished, in {folder}; resume goes on with the others")

    @property
    def status(self) -> int:
        """What a shell expects of a process that a signal ended."""
        return 128 + int(self.signal)


class Stopping:
    """While it is entered, a first signal is only noted in `signal`, for the run to see between two samples.

    A second one interrupts at once. Only handlers that Python or the system set are replaced, and only in the main
    thread; whoever has handlers of their own (a notebook's kernel, a scheduler's worker) keeps them.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """Take the signals over."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                before = signal.getsignal(number)
                if before in (signal.SIG_DFL, signal.default_int_handler):
                    self._before[number] = signal.signal(number, self._asked)
        return self

    def __exit__(self, *_: object) -> None:
        """Give them back."""
        for number, before in self._before.items():
            signal.signal(number, before)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        with suppress(OSError):  # not through sys.stderr, which may be in the middle of a write
            os.write(2, f"\n{self.signal.name}: stopping after this sample; once more stops at once\n".encode())
