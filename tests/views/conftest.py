"""A small trace whose values can be told in advance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from probe.site import Fate
from probe.trace import SampleRecord, TraceHeader, TraceWriter, Variable

VARIABLES = [
    Variable("importance", ("step", "layer", "visual"), "1", "attention received", formula="mean over heads"),
    Variable("mass", ("step", "segment_key"), "1", "attention mass"),
    Variable("kept", ("step", "visual"), "1", "fate", dtype="uint8", flags={f.name: int(f) for f in Fate}),
    Variable("token", ("step", "position"), "1", "token", dtype="int32"),
    Variable("visual_tokens", ("step", "layer"), "1", "visual tokens", dtype="int32"),
    Variable("seconds_total", (), "s", "time", dtype="float64"),
]


def record(i: int) -> SampleRecord:
    """Sample `i`: 3 + i steps, 2 layers, 8 visual tokens; importance is 100 step + 10 layer + visual / 10."""
    steps = 3 + i
    step, layer, visual = np.ogrid[:steps, :2, :8]
    kept = np.full((steps, 8), Fate.KEPT)
    kept[1:, 4:] = Fate.DROPPED
    arrays = {
        "importance": 100.0 * step + 10 * layer + visual / 10,
        "mass": np.tile([0.25, 0.5, 0.25], (steps, 1)),
        "kept": kept,
        "token": np.arange(steps * 4).reshape(steps, 4),
        "visual_tokens": np.full((steps, 2), 6),
        "seconds_total": np.float64(1.5),
    }
    return SampleRecord(
        sample=i, sample_id=f"s{i}", task="vqa", question="Why?", references=("b",), prediction="because, \"so\"",
        metric="exact", score=float(i % 2), arrays=arrays,
    )  # fmt: skip


@pytest.fixture(scope="session")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples 1 and 3 of a run, sample 5 failed: a shard."""
    path = tmp_path_factory.mktemp("views") / "mini.trace.h5"
    header = TraceHeader(
        "fastv", "name: fastv", "0123456789abcdef", "mini", dtype="float32", device="cpu",
        coords={"segment_key": ["system", "visual", "answer"]},
    )  # fmt: skip
    with TraceWriter(path, header, VARIABLES) as writer:
        writer.write(record(1))
        writer.write(record(3))
        writer.write(SampleRecord(sample=5, task="vqa", failed="no such picture"))
    return path
