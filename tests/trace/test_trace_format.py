"""The file is what docs/trace.md says, for our reader and for tools that know nothing of us."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from trace_samples import failed_record, make_header, make_record, make_variables

from probe.errors import ProbeError
from probe.site import Fate
from probe.trace import SampleRecord, TraceHeader, TraceWriter, Variable, open_trace

xarray = pytest.importorskip("xarray")
pytest.importorskip("h5netcdf")


def test_a_sample_comes_back_as_it_was_written(trace_path: Path) -> None:
    with open_trace(trace_path) as trace:
        for row, i in enumerate([0, 1, 2, 3, 4, 5, 6]):
            if i == 3:
                continue
            written, read = make_record(i), trace.sample(row)
            for name in ("sample", "sample_id", "task", "question", "prediction", "metric", "score", "references"):
                assert read[name] == getattr(written, name)
            for v in make_variables():
                expected = np.asarray(written.arrays[v.name], dtype=v.dtype)
                assert read[v.name].dtype == v.dtype
                assert read[v.name].shape == expected.shape
                assert np.array_equal(read[v.name], expected), v.name
            assert trace.picture(row) == written.picture


def test_header_and_variables_come_back(trace_path: Path) -> None:
    with open_trace(trace_path) as trace:
        header = make_header()
        assert trace.header.coords == {k: tuple(v) for k, v in header.coords.items()}
        assert {k: trace.header.extra[k] for k in header.extra} == header.extra
        for name in TraceHeader.__dataclass_fields__:
            if name not in ("coords", "extra"):
                assert getattr(trace.header, name) == getattr(header, name), name
        assert list(trace.variables) == ["score", *(v.name for v in make_variables())]
        for v in make_variables():
            stored = trace.variables[v.name]
            for part in ("dims", "units", "long_name", "formula", "probe", "dtype"):
                assert getattr(stored, part) == getattr(v, part)
        assert trace.variables["visual_kept"].flags == {
            "kept": 1, "dropped": 2, "merged": 3, "withdrawn": 4, "masked": 5, "skipped": 6,
            "evicted": 7,
        }  # fmt: skip


def test_a_failed_sample_keeps_its_reason_and_nothing_else(trace_path: Path) -> None:
    with open_trace(trace_path) as trace:
        sample = trace.sample(3)
        assert sample["failed"] == "picture cannot be read" and math.isnan(sample["score"])
        assert not {v.name for v in make_variables()} & set(sample)
        assert np.isnan(trace.array("confidence")[3]).all()
        assert (trace.array("token")[3] == -1).all() and (trace.array("visual_kept")[3] == 0).all()
        assert trace.extents(3)["step"] == 0


def test_padding_and_extents(trace_path: Path) -> None:
    """Sample 0: 4 steps, 20 visual tokens, 6 slots. The longest: 6 steps, 41 visual tokens, 7 slots."""
    with open_trace(trace_path) as trace:
        assert trace.array("n_step").tolist() == [4, 5, 6, 0, 5, 6, 4]
        assert trace.array("n_visual").tolist() == [20, 27, 34, 0, 20, 27, 34]
        importance = trace.array("visual_importance")
        assert importance.shape == (7, 6, 3, 34)
        assert np.isnan(importance[0, 4:]).all() and np.isnan(importance[0, :, :, 20:]).all()
        assert not np.isnan(importance[0, :4, :, :20]).any()
        assert (trace.array("token")[0, :, 6] == -1).all()


def test_xarray_reads_the_file_without_our_code(trace_path: Path) -> None:
    with xarray.open_dataset(trace_path, engine="h5netcdf") as data, open_trace(trace_path) as trace:
        assert dict(data.sizes) == {
            "sample": 7, "step": 6, "layer": 3, "segment": 1, "segment_key": 5, "position": 7, "visual": 34,
            "phase": 5, "corner": 4,
        }  # fmt: skip
        assert data["attention_mass"].dims == ("sample", "step", "layer", "segment", "segment_key")
        assert data["token"].dtype == np.int32 and data["visual_kept"].dtype == np.uint8
        assert data["segment_key"].values.tolist() == ["system", "visual", "newline", "question", "answer"]
        assert data["prediction"].values[1] == "answer 1\nline two"
        assert json.loads(data["reference"].values[0]) == ["yes", "ja, “genau”"]
        mass = data["attention_mass"].isel(sample=0, step=slice(0, 4)).sum("segment_key")
        assert np.allclose(mass, 1, atol=1e-6)
        assert data["seconds"].dtype == np.float64, "xarray must not take seconds for a timedelta"
        assert data["visual_kept"].attrs["flag_meanings"].split() == [f.name.lower() for f in Fate]
        assert data["visual_kept"].attrs["flag_values"].tolist() == [int(f) for f in Fate]
        assert data["entropy"].attrs["units"] == "nat" and data["entropy"].attrs["probe"] == "uncertainty"
        assert data.attrs["Conventions"] == "probe-trace-1" and "name: fastv" in data.attrs["recipe"]
        ours = trace.to_xarray()
        assert ours.identical(data)


def test_pictures_and_checksums_are_groups_that_xarray_reads_apart(trace_path: Path) -> None:
    with xarray.open_dataset(trace_path, group="pictures", engine="h5netcdf") as pictures:
        offset, length = int(pictures["offset"][1]), int(pictures["length"][1])
        assert pictures["data"].values[offset : offset + length].tobytes() == make_record(1).picture
        assert pictures["offset"].values[3] == -1, "the failed sample has none"
        assert pictures["offset"].values[0] == pictures["offset"].values[1], "one picture, stored once"
    with xarray.open_dataset(trace_path, group="checksums", engine="h5netcdf") as sums:
        assert sums["crc32"].shape == (7, 2 + len(make_variables()))


def test_the_rules_of_netcdf(trace_path: Path) -> None:
    """No float16, no bool, no axis twice, no _FillValue on integers, every axis a scale, texts variable-length."""
    with h5py.File(trace_path) as file:
        for name, data in file.items():
            if not isinstance(data, h5py.Dataset):
                continue
            assert data.dtype.kind in "iufO" and data.dtype != np.float16, name
            assert ("_FillValue" in data.attrs) == (data.dtype.kind == "f" and not h5py.h5ds.is_scale(data.id)), name
            if data.dtype.kind == "O":
                assert h5py.check_string_dtype(data.dtype).length is None
                assert h5py.check_string_dtype(data.dtype).encoding == "utf-8"
            if not h5py.h5ds.is_scale(data.id):
                axes = [data.dims[k][0].name for k in range(data.ndim)]
                assert len(set(axes)) == len(axes) and axes[0] == "/sample"
        assert file["visual_importance"].compression == "gzip" or file["visual_importance"].nbytes < 7 * 16384
        assert file["score"].compression is None


def test_large_variables_are_compressed_in_chunks_of_one_sample(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "t.h5", make_header(), make_variables()) as writer:
        writer.write(make_record(0, steps=24, layers=32, visual=729))
    with h5py.File(tmp_path / "t.h5") as file:
        data = file["visual_importance"]
        assert data.chunks == (1, 4, 8, 729)
        assert (data.compression, data.compression_opts, data.shuffle) == ("gzip", 4, True)
        assert file["commit_step"].compression is None and file["seconds"].compression is None


def test_the_token_of_the_journal_is_in_the_first_page(trace_path: Path) -> None:
    with h5py.File(trace_path) as file:
        token = file.attrs["trace_id"]
    assert bytes(token) in trace_path.read_bytes()[:4096]


def test_a_partial_trace_becomes_the_same_xarray(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "t.h5", make_header(), make_variables())
    for i in range(3):
        writer.write(make_record(i))
    with open_trace(tmp_path / "t.h5.partial") as trace:  # while the writer lives
        early = trace.to_xarray()
        assert trace.partial and "partial" in repr(trace)
    writer.close()
    with open_trace(tmp_path / "t.h5") as trace:
        assert trace.to_xarray().load().identical(early)


def test_all_samples_failed(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "t.h5", make_header(), make_variables()) as writer:
        writer.write(failed_record(0))
        writer.write(failed_record(1))
    with open_trace(tmp_path / "t.h5") as trace:
        assert trace.n_samples == 2 and list(trace.variables)[1] == "token"
        assert trace.summary()["n_failed"] == 2 and trace.summary()["mean_score"] is None
    with xarray.open_dataset(tmp_path / "t.h5", engine="h5netcdf") as data:
        assert data.sizes["sample"] == 2 and data.sizes["step"] == 0


def test_no_sample_at_all(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "t.h5", make_header(), make_variables()):
        assert (tmp_path / "t.h5.partial").exists()
    with open_trace(tmp_path / "t.h5") as trace:
        assert trace.n_samples == 0 and trace.summary()["n_samples"] == 0
        with pytest.raises(ProbeError, match="no row 0: it holds no samples"):
            trace.sample(0)


def test_texts_that_hdf5_could_not_hold(tmp_path: Path) -> None:
    odd = "a\0b \ud800 é 🙂"
    with TraceWriter(tmp_path / "t.h5", make_header(recipe_yaml=odd * 20_000), make_variables()) as writer:
        writer.write(SampleRecord(sample=5, prediction=odd, references=(odd, "")))
    with open_trace(tmp_path / "t.h5") as trace:
        sample = trace.sample(0)
        assert sample["prediction"] == "a␀b \\ud800 é 🙂" and sample["sample"] == 5
        assert sample["references"] == ("a\0b \ud800 é 🙂", "")
        assert trace.header.recipe_yaml == "a␀b \\ud800 é 🙂" * 20_000


def test_variables_missing_from_a_sample_are_left_out_of_it(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "t.h5", make_header(), make_variables()) as writer:
        writer.write(SampleRecord(sample=0, arrays={"seconds_total": np.float64(2)}))
        writer.write(make_record(1))
    with open_trace(tmp_path / "t.h5") as trace:
        first = trace.sample(0)
        assert first["seconds_total"] == 2 and "token" not in first
        assert np.isnan(trace.array("confidence")[0]).all()
        assert np.array_equal(trace.sample(1)["token"], make_record(1).arrays["token"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token": np.zeros((4, 6, 1))}, r"shape \(4, 6, 1\), but its axes are \('step', 'position'\)"),
        ({"token": np.full((4, 6), 0.5)}, "int32 cannot"),
        ({"visual_kept": np.full((4, 3, 20), 256)}, "uint8 cannot"),
        ({"entropy": np.zeros((4, 5))}, "axis `position`"),
        ({"attention_mass": np.zeros((4, 3, 1, 4))}, "the header names 5"),
        ({"tokens": np.zeros(3)}, "did you mean `token`"),
        ({"token": np.array([["a"]])}, "only numbers"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_before_anything_is_written(
    tmp_path: Path, change: dict[str, np.ndarray], message: str
) -> None:
    record = make_record(0)
    wrong = SampleRecord(sample=0, arrays={**record.arrays, **change})
    with TraceWriter(tmp_path / "t.h5", make_header(), make_variables()) as writer:
        with pytest.raises(ProbeError, match=message):
            writer.write(wrong)
        writer.write(record)  # the file is as good as before
        with pytest.raises(ProbeError, match="already holds"):
            writer.write(record)
        with pytest.raises(ProbeError, match="failed sample cannot have arrays"):
            writer.write(SampleRecord(sample=1, failed="x", arrays=record.arrays))
    with open_trace(tmp_path / "t.h5") as trace:
        assert trace.n_samples == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("x y", (), "1", ""), "is no name"),
        (("score", (), "1", ""), "already has"),
        (("a", ("layer", "layer"), "1", ""), "must differ"),
        (("a", ("sample",), "1", ""), "leave out `sample`"),
        (("step", ("step",), "1", ""), "like one of its axes"),
        (("a", (), "1", "", "", "", "float16"), "float16"),
        (("a", (), "1", "", "", "", "bool"), "bool"),
    ],
)
def test_declarations_that_netcdf_could_not_read_are_refused(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ProbeError, match=message):
        Variable(*arguments)  # type: ignore[arg-type]


def test_names_that_clash_are_refused(tmp_path: Path) -> None:
    step = Variable("step", (), "1", "")
    for pair in ([step, step], [step, Variable("a", ("step",), "1", "")], [Variable("a", ("task",), "1", "")]):
        with pytest.raises(ProbeError, match="the name of two things"):
            TraceWriter(tmp_path / "t.h5", make_header(), pair)
    with pytest.raises(ProbeError, match="extra"):
        make_header(extra={"recipe": "x"}).attributes()
    with pytest.raises(ProbeError, match="`when` is a list; give a text or a number"):
        make_header(extra={"when": [1]}).attributes()
    assert not list(tmp_path.iterdir())


def test_unknown_names_rows_and_a_closed_trace(trace_path: Path) -> None:
    trace = open_trace(trace_path)
    assert "visual_importance" in repr(trace) and "7 samples" in repr(trace)
    with pytest.raises(ProbeError, match="did you mean `entropy`"):
        trace.array("entropie")
    with pytest.raises(ProbeError, match="no row 7: it holds 7 samples"):
        trace.sample(7)
    trace.close()
    assert "Trace(" in repr(trace)
    with pytest.raises(ProbeError, match="was closed"):
        trace.array("score")


def test_the_same_values_give_the_same_bytes(run: Callable[..., Path], tmp_path: Path) -> None:
    assert run(tmp_path / "a.h5", [0, 1, 2]).read_bytes() == run(tmp_path / "b.h5", [0, 1, 2]).read_bytes()


def test_netcdf4_reads_it(trace_path: Path) -> None:
    import netCDF4 as netcdf

    with netcdf.Dataset(trace_path) as data:
        assert data["attention_mass"].dimensions == ("sample", "step", "layer", "segment", "segment_key")
        assert data["prediction"][1] == "answer 1\nline two"
        assert data["token"][0, 0, 6] == -1, "padding of ids is not masked"
        assert data["phase"][:].tolist()[:2] == ["prefill", "denoise"]
        assert data.groups["pictures"]["length"][0] == 508


def test_xarray_opens_it_with_the_netcdf4_engine(trace_path: Path) -> None:
    import xarray

    with xarray.open_dataset(trace_path, engine="netcdf4") as data, open_trace(trace_path) as trace:
        np.testing.assert_array_equal(data["attention_mass"].values, trace.array("attention_mass"))
        assert data["token"].dtype.kind == "i"


def test_h5glance_lists_it(trace_path: Path) -> None:
    command = [sys.executable, "-m", "h5glance", str(trace_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "attention_mass" in done.stdout
