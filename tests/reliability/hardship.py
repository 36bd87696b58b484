"""What the tests of this folder share: runs in a forked process that can be killed, and comparing what runs left."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import probe
from probe.data import Sample
from probe.data.tasks import load as load_task
from probe.recipe import Recipe
from probe.trace import open_trace, verify

TIMINGS = {"seconds", "seconds_total", "seconds_unrecorded", "peak_memory"}
"""Variables that differ between two runs of the same recipe on the same machine."""

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


def trials(usual: int) -> int:
    """How many trials a campaign makes: `usual`, times the whole number in PROBE_TRIALS."""
    return usual * int(os.environ.get("PROBE_TRIALS", "1"))


def recording_recipe() -> Recipe:
    """FastV that records attention and logits: interventions, layers, positions and visual tokens in one trace."""
    return probe.parse_recipe(
        """
schema: 1
name: hard
generate: {gen_length: 4, steps: 4, block_length: 4}
probes:
  - at: {site: layer.input, layer: 1, steps: {from: 50%}}
    score: {attention: {layer: -1, queries: last}}
    select: {top_k: {keep: 0.25}}
    do: {drop: {positions: keep, lasts: forward}}
  - at: {site: layer.attention, layers: all}
    record: [attention_mass, visual_importance]
  - at: {site: logits}
    record: [entropy, margin]
"""
    )


def samples_of(count: int, task: str = "world/short") -> list[Sample]:
    """Samples of an embedded task."""
    return list(load_task(task, count))


def contents(path: Path, *, order: bool = True) -> dict[int, dict[str, Any]]:
    """Everything that a trace holds, timings apart, by the number of the sample."""
    out: dict[int, dict[str, Any]] = {}
    with open_trace(path) as trace:
        rows = list(trace.samples.tolist())
        if order:
            assert rows == sorted(rows)
        for row, number in enumerate(rows):
            record = trace.record(row)
            arrays = {n: (a.shape, a.dtype.str, a.tobytes()) for n, a in record.arrays.items() if n not in TIMINGS}
            score = None if np.isnan(record.score) else record.score
            out[number] = {"texts": record.texts(), "score": score, "picture": record.picture, **arrays}
    return out


def same_runs(a: Path, b: Path, *, order: bool = True) -> None:
    """Assert that two traces hold the same, timings apart, and that their checksums agree with it."""
    one, two = contents(a, order=order), contents(b, order=order)
    assert one.keys() == two.keys()
    for number in one:
        wrong = [k for k in one[number] if one[number][k] != two[number].get(k)]
        assert not wrong and one[number].keys() == two[number].keys(), (number, wrong)
    assert verify(a) == [] and verify(b) == []


def forked(act: Callable[[], None]) -> int:
    """Start `act` in a forked process; its pid. The process ends with 0, or with 1 and a traceback."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        act()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def ended(pid: int) -> int:
    """Wait for a forked process: its status, or the negative number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def partials(folder: Path) -> Iterator[Path]:
    """The partial traces in a folder."""
    yield from sorted(folder.glob("*.partial"))
