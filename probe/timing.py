"""Where the time of a sample goes, by phase, without making the device wait.

Nested sections are exclusive: time inside an inner section is not counted in the outer one. On CUDA, marks are events
and are read once, at the end of the sample.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

PHASES: tuple[str, ...] = ("encode", "backbone", "head", "sampler", "probe")
"""The phases of a trace's `seconds` and `flops`."""


class Stopwatch:
    """Exclusive times by (step, phase). `step` counts passes; -1 is what happens before the first (encoding)."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._stack: list[str] = []
        self._last: Any = None
        self._spans: list[tuple[int, str, Any, Any]] = []
        self.step = -1

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _switch(self) -> None:
        now = self._mark()
        if self._stack:
            self._spans.append((self.step, self._stack[-1], self._last, now))
        self._last = now

    @contextmanager
    def section(self, phase: str) -> Iterator[None]:
        """Attribute the time inside the block to `phase`."""
        self._switch()
        self._stack.append(phase)
        try:
            yield
        finally:
            self._switch()
            self._stack.pop()

    def drain(self) -> dict[tuple[int, str], float]:
        """Seconds by (step, phase) since the last drain; synchronises once on CUDA."""
        if self._cuda:
            torch.cuda.synchronize()
        out: dict[tuple[int, str], float] = {}
        for step, phase, start, end in self._spans:
            seconds = start.elapsed_time(end) / 1000 if self._cuda else end - start
            out[step, phase] = out.get((step, phase), 0.0) + seconds
        self._spans.clear()
        return out
