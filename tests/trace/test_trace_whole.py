"""Merging shards, finding damage, and the numbers of a run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from trace_samples import failed_record, make_header, make_record, make_variables, same_content

from probe.errors import ProbeError
from probe.site import Fate
from probe.trace import SampleRecord, TraceWriter, Variable, merge, open_trace, verify


def test_shards_merge_into_the_file_of_one_run(run: Callable[..., Path], tmp_path: Path) -> None:
    shards = [run(tmp_path / f"{k}.h5", list(range(k, 8, 3)), created=f"shard {k}") for k in (0, 1, 2)]
    out = merge([shards[2], shards[0], shards[1]], tmp_path / "all.h5")
    with open_trace(out) as trace:
        assert trace.samples.tolist() == list(range(8))
        assert trace.header.extra["merged_from"] == "2.h5, 0.h5, 1.h5"
        whole = dict(trace.attrs)
    extra = {**make_header().extra, "merged_from": whole["merged_from"]}
    one_go = run(tmp_path / "one_go.h5", list(range(8)), extra=extra)
    same_content(out, one_go)
    assert verify(out) == []


def test_a_merged_trace_with_ragged_shards_opens_in_xarray(run: Callable[..., Path], tmp_path: Path) -> None:
    xarray = pytest.importorskip("xarray")
    pytest.importorskip("h5netcdf")
    out = merge([run(tmp_path / "a.h5", [0, 4]), run(tmp_path / "b.h5", [-1, 7])], tmp_path / "all.h5")
    (tmp_path / "a.h5").unlink()  # the merged file needs nobody
    with xarray.open_dataset(out, engine="h5netcdf") as data:
        assert data["sample"].values.tolist() == [0, 1, 4, 7]
        assert data["n_visual"].values.tolist() == [20, 0, 20, 41]
        last = data["visual_importance"].sel(sample=7).values[: data["n_step"].values[3]]
        assert np.array_equal(last, make_record(7).arrays["visual_importance"].astype("f4"))


def test_merge_refuses_what_is_not_one_run(run: Callable[..., Path], tmp_path: Path) -> None:
    a = run(tmp_path / "a.h5", [0, 1])
    with pytest.raises(ProbeError, match="both hold sample 1"):
        merge([a, run(tmp_path / "b.h5", [1, 2])], tmp_path / "out.h5")
    with pytest.raises(ProbeError, match="recipe_hash was `c0ffee` and is now `x`"):
        merge([a, run(tmp_path / "c.h5", [2], recipe_hash="x")], tmp_path / "out.h5")
    with pytest.raises(ProbeError, match="already there"):
        merge([a], a)
    with pytest.raises(ProbeError, match="nothing to merge"):
        merge([], tmp_path / "out.h5")
    a.rename(tmp_path / "d.h5.partial")
    with pytest.raises(ProbeError, match="not finished"):
        merge([tmp_path / "d.h5.partial"], tmp_path / "out.h5")
    assert not list(tmp_path.glob("out*"))


def flip(path: Path, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 0x10
    path.write_bytes(content)


def test_a_flipped_bit_in_any_array_is_found(run: Callable[..., Path], tmp_path: Path) -> None:
    """For every variable: flip one bit where the file keeps the values of sample 1, and expect its name."""
    path = run(tmp_path / "t.h5", [0, 1, 2])
    whole = path.read_bytes()
    places: dict[str, int] = {}
    with h5py.File(path) as file:
        for v in make_variables():
            data = file[v.name]
            chunk = data.id.get_chunk_info_by_coord((1, *(0,) * (data.ndim - 1)))
            row = 1 % data.chunks[0]
            places[v.name] = chunk.byte_offset + row * int(np.prod(data.chunks[1:])) * data.dtype.itemsize + 1
        score = file["score"].id.get_chunk_info_by_coord((1,)).byte_offset + 8 + 1
        picture = file["pictures/data"].id.get_chunk_info_by_coord((0,)).byte_offset + 20
    for name, place in places.items():
        flip(path, place)
        assert any("row 1" in p and f"`{name}`" in p for p in verify(path)), (name, verify(path))
        path.write_bytes(whole)
    flip(path, score)
    assert "texts, score or extents" in verify(path)[0]
    path.write_bytes(whole)
    flip(path, picture)
    assert "the picture" in verify(path)[0]
    path.write_bytes(whole.replace(b"answer 1", b"answer 7"))
    assert verify(path) == ["t.h5, row 1: texts, score or extents are not what was written"]
    path.write_bytes(whole.replace(b"name: fastv", b"name: fastw"))
    assert "header" in verify(path)[0]
    path.write_bytes(whole.replace(b"-sum p log p", b"+sum p log p"))
    assert "header" in verify(path)[0]
    path.write_bytes(whole)
    assert verify(path) == []


def test_values_where_a_sample_has_none_are_found(run: Callable[..., Path], tmp_path: Path) -> None:
    path = run(tmp_path / "t.h5", [0, 2])
    with h5py.File(path, "r+") as file:
        file["token"][0, 5, 0] = 3  # sample 0 has 4 steps
    assert verify(path) == ["t.h5, row 0: `token` has values where this sample has none"]


def test_damage_is_not_merged_on(run: Callable[..., Path], tmp_path: Path) -> None:
    a, b = run(tmp_path / "a.h5", [0]), run(tmp_path / "b.h5", [1])
    with h5py.File(b, "r+") as file:
        file["confidence"][0, 0, 0] = 0.123
    with pytest.raises(ProbeError, match="damaged: b.h5, row 0: `confidence`"):
        merge([a, b], tmp_path / "out.h5")
    assert not (tmp_path / "out.h5").exists()


DAMAGE = """
import random, sys
from pathlib import Path
sys.path[:0] = [sys.argv[2], sys.argv[3]]
from trace_samples import same_content
from probe.trace import verify
path = Path(sys.argv[1])
whole, rng = path.read_bytes(), random.Random(1)
(path.parent / "reference.h5").write_bytes(whole)
for _ in range(12):
    content = bytearray(whole)
    place = rng.randrange(4096, len(content) - 16)
    content[place : place + 16] = rng.randbytes(16)
    path.write_bytes(content)
    if verify(path):
        print("found", flush=True)
    else:
        same_content(path, path.parent / "reference.h5")
        print("harmless", flush=True)
print("end")
"""


def test_random_damage_never_passes_as_whole(run: Callable[..., Path], tmp_path: Path) -> None:
    """Overwrite random places; either something is reported, or all that we would read is unharmed.

    In a process of its own: on damage to its own structures HDF5 itself may abort, which is no pass either.
    """
    path = run(tmp_path / "t.h5", [0, 1])
    here = Path(__file__)
    words = [sys.executable, "-c", DAMAGE, str(path), str(here.parents[2]), str(here.parent)]
    child = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert child.returncode <= 0, child.stderr
    assert {"found", "harmless"} <= set(child.stdout.split())


def test_summary(tmp_path: Path) -> None:
    """Samples of 10 visual tokens, 2 steps x 2 layers. Sample 0 keeps 10, 5, 10, 5: 75 %; sample 1 keeps half."""
    variables = [
        Variable("visual_tokens", ("step", "layer"), "1", "tokens", dtype="int32"),
        Variable("visual_importance", ("step", "layer", "visual"), "1", "importance"),
        Variable("seconds_total", (), "s", "time", dtype="float64"),
        Variable("flops_total", (), "FLOP", "operations", dtype="float64"),
        Variable("peak_memory", (), "byte", "memory", dtype="int64"),
    ]

    def record(i: int, tokens: list[list[int]], score: float) -> SampleRecord:
        arrays = {
            "visual_tokens": np.array(tokens), "visual_importance": np.zeros((2, 2, 10)),
            "seconds_total": np.float64(1 + i), "flops_total": np.float64(100), "peak_memory": np.int64(7 - i),
        }  # fmt: skip
        return SampleRecord(sample=i, task="t", metric="exact", score=score, arrays=arrays)

    with TraceWriter(tmp_path / "t.h5", make_header(coords={}), variables) as writer:
        writer.write(record(0, [[10, 5], [10, 5]], 1.0))
        writer.write(record(1, [[5, 5], [5, 5]], 0.0))
        writer.write(failed_record(2))
        writer.write(record(3, [[10, 10], [10, -1]], float("nan")))
    with open_trace(tmp_path / "t.h5") as trace:
        found = trace.summary()
    low, high = found.pop("score_interval")
    assert (low + high) / 2 == pytest.approx(0.5) and high - low == pytest.approx(2 * 1.96 * 0.5)
    assert found == {
        "n_samples": 4, "n_failed": 1, "n_scored": 2, "tasks": ["t", "vqa"], "metrics": ["exact"],
        "mean_score": 0.5, "seconds_per_sample": pytest.approx(7 / 3), "seconds_total": 7.0,
        "flops_per_sample": 100.0, "peak_memory": 7.0, "retention": pytest.approx((0.75 + 0.5 + 1) / 3),
        "visual_tokens": 10.0,
    }  # fmt: skip


def test_retention_from_fates(tmp_path: Path) -> None:
    kept = Variable("visual_kept", ("step", "layer", "visual"), "1", "fate", dtype="uint8")
    fates = np.full((1, 2, 4), Fate.KEPT)
    fates[0, 1] = [Fate.KEPT, Fate.DROPPED, Fate.MERGED, Fate.MASKED]
    with TraceWriter(tmp_path / "t.h5", make_header(coords={}), [kept]) as writer:
        writer.write(replace(SampleRecord(sample=0), arrays={"visual_kept": fates}))
    with open_trace(tmp_path / "t.h5") as trace:
        assert trace.summary()["retention"] == pytest.approx((1 + 0.25) / 2)
        assert trace.summary()["visual_tokens"] == 4


def test_writing_is_cheap(tmp_path: Path) -> None:
    """A sample of the size of a quickstart run costs some milliseconds of CPU (measured in docs/trace.md)."""
    import time

    with TraceWriter(tmp_path / "t.h5", make_header(), make_variables()) as writer:
        records = [make_record(i, steps=24, layers=6, visual=192) for i in range(12)]
        writer.write(records[0])
        began = time.process_time()
        for record in records[1:]:
            writer.write(record)
        each = (time.process_time() - began) / 11
    assert each < 0.05, f"{1000 * each:.1f} ms per sample"
