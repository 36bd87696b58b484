"""A run as the trace sees it: variables, a header, and samples whose values follow from their number alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from probe.site import SEGMENTS, Fate, Phase
from probe.trace import SampleRecord, TraceHeader, TraceWriter, Variable

PNG = b"\x89PNG\r\n\x1a\n"


def make_variables() -> list[Variable]:
    """What a full run records."""
    return [
        Variable("token", ("step", "position"), "1", "token in the slot after the step", dtype="int32"),
        Variable("confidence", ("step", "position"), "1", "probability of the chosen token"),
        Variable("entropy", ("step", "position"), "nat", "entropy", formula="-sum p log p", probe="uncertainty"),
        Variable("margin", ("step", "position"), "1", "top-1 minus top-2 probability"),
        Variable("commit_step", ("position",), "1", "step that wrote the slot", dtype="int32"),
        Variable(
            "visual_kept", ("step", "layer", "visual"), "1", "fate of a visual token", dtype="uint8",
            flags={f.name: int(f) for f in Fate},
        ),
        Variable("visual_tokens", ("step", "layer"), "1", "visual tokens computed", dtype="int32"),
        Variable("visual_box", ("visual", "corner"), "1", "where the token is in the picture"),
        Variable("attention_mass", ("step", "layer", "segment", "segment_key"), "1", "attention mass"),
        Variable("visual_importance", ("step", "layer", "visual"), "1", "attention received"),
        Variable("seconds", ("step", "phase"), "s", "time", dtype="float64"),
        Variable("flops", ("step", "phase"), "FLOP", "executed operations", dtype="float64"),
        Variable("seconds_total", (), "s", "time of the sample", dtype="float64"),
        Variable("flops_total", (), "FLOP", "operations of the sample", dtype="float64"),
        Variable("peak_memory", (), "byte", "most memory", dtype="int64"),
    ]  # fmt: skip


def make_header(**changes: object) -> TraceHeader:
    """A header with everything said."""
    header = TraceHeader(
        recipe_name="fastv",
        recipe_yaml="schema: 1\nname: fastv\n# « ü »\n",
        recipe_hash="c0ffee",
        backbone="mini",
        weights_revision="r1",
        dtype="float32",
        attention_kernel="sdpa",
        device="cpu",
        seed=7,
        versions={"torch": "2.0", "python": "3.11"},
        created="2026-01-02T03:04:05+00:00",
        command="probe run fastv.yaml",
        coords={
            "segment": ["answer"],
            "segment_key": list(SEGMENTS),
            "phase": [p.value for p in Phase],
            "corner": ["left", "top", "right", "bottom"],
        },
        extra={"keep": 0.5, "note": "extra", "limit": 12},
    )
    return replace(header, **changes)  # type: ignore[arg-type]


def make_record(i: int, *, steps: int | None = None, layers: int = 3, visual: int | None = None) -> SampleRecord:
    """Sample `i`. Its numbers of steps, visual tokens and slots differ from those of its neighbours."""
    s = steps or 4 + i % 3
    v = visual or 20 + 7 * (i % 4)
    p = 6 + i % 2
    rng = np.random.default_rng(i)
    kept = rng.integers(1, 6, (s, layers, v))
    arrays = {
        "token": rng.integers(0, 126_000, (s, p)),
        "confidence": rng.random((s, p)),
        "entropy": rng.random((s, p)),
        "margin": rng.random((s, p)),
        "commit_step": rng.integers(0, s, p),
        "visual_kept": kept,
        "visual_tokens": (kept == Fate.KEPT).sum(-1),
        "visual_box": rng.random((v, 4)),
        "attention_mass": rng.dirichlet(np.ones(5), (s, layers, 1)),
        "visual_importance": rng.random((s, layers, v)),
        "seconds": rng.random((s, 5)),
        "flops": rng.random((s, 5)) * 1e12,
        "seconds_total": np.float64(0.25 + i),
        "flops_total": np.float64(1e12 * (i + 1)),
        "peak_memory": np.int64(5_000_000_000 + i),
    }
    return SampleRecord(
        sample=i, sample_id=f"q{i}", task="vqa" if i % 2 else "chart", question=f"What is № {i}?",
        references=("yes", "ja, “genau”"), prediction=f"answer {i}\nline two", metric="exact",
        score=float(i % 2), arrays=arrays, picture=PNG + bytes([i // 2]) * 500,
    )  # fmt: skip


def failed_record(i: int) -> SampleRecord:
    """A sample that failed."""
    return SampleRecord(sample=i, sample_id=f"q{i}", task="vqa", question="?", failed="picture cannot be read")


@pytest.fixture(scope="session")
def run() -> Callable[..., Path]:
    """Write samples into a file: `run(path, [0, 1, 2])`; a negative number -k is sample k, failed."""

    def write(path: Path, samples: list[int], **changes: object) -> Path:
        with TraceWriter(path, make_header(**changes), make_variables()) as writer:
            for i in samples:
                writer.write(make_record(i) if i >= 0 else failed_record(-i))
        return path

    return write


@pytest.fixture(scope="session")
def trace_path(run: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished trace of seven samples, the fourth of which failed."""
    return run(tmp_path_factory.mktemp("trace") / "fastv.trace.h5", [0, 1, 2, -3, 4, 5, 6])


def same_content(a: Path, b: Path) -> None:
    """Assert that two traces hold the same samples, byte for byte, and the same descriptions."""
    from probe.trace import open_trace

    with open_trace(a) as one, open_trace(b) as two:
        assert one.samples.tolist() == two.samples.tolist()
        assert list(one.variables.values()) == list(two.variables.values())
        drop = {"created", "trace_id", "header_crc32"}
        assert {k: v for k, v in one.attrs.items() if k not in drop} == {
            k: v for k, v in two.attrs.items() if k not in drop
        }
        for i in range(one.n_samples):
            left, right = one.sample(i), two.sample(i)
            assert left.keys() == right.keys()
            for name in left:
                x, y = np.asarray(left[name]), np.asarray(right[name])
                assert x.shape == y.shape and x.dtype == y.dtype, name
                assert x.tolist() == y.tolist() or x.tobytes() == y.tobytes(), name
            assert one.picture(i) == two.picture(i)
