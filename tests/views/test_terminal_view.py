"""What `probe show` prints says the right numbers, in any width, with and without colour."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
from rich.console import Console, RenderableType

from probe.errors import ProbeError
from probe.trace import SampleRecord, Trace, TraceHeader, TraceWriter, Variable, open_trace
from probe.views.selection import select
from probe.views.terminal import LEVELS, render_summary, render_variable, to_csv, to_json


@pytest.fixture
def trace(shard: Path) -> Iterator[Trace]:
    with open_trace(shard) as opened:
        yield opened


def shown(thing: RenderableType, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), no_color=True)
    console.print(thing)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert all(len(line) <= width for line in lines)
    return "\n".join(line.rstrip() for line in lines)


def test_the_summary_fits_a_screen_and_says_what_matters(trace: Trace) -> None:
    text = shown(render_summary(trace), 80)
    assert len(text.splitlines()) <= 24
    for part in ("mini.trace.h5", "finished", "fastv", "hash 0123456789ab", "3, 1 failed", "1.000", "exact, n = 2",
                 "1.5 s per sample, 3 s in all", "8 tokens per sample, 75 % kept", "no such picture"):  # fmt: skip
        assert part in text, part
    line = next(x for x in text.splitlines() if x.startswith("importance"))
    # samples of 4 and 6 steps: (150 + 250) / 2 + 5 + 0.35
    assert line.split()[-3::2] == ["0", "510.7"] and float(line.split()[-2]) == pytest.approx(205.35, abs=0.06)
    # kept: 8 + 3 * 4 of 32, 8 + 5 * 4 of 48
    assert "60.4 % kept" in next(x for x in text.splitlines() if x.startswith("kept"))
    assert "attention received" in shown(render_summary(trace), 160)


def test_a_partial_file_is_shown_while_it_is_written(tmp_path: Path, shard: Path) -> None:
    header = TraceHeader("r", "", "", "mini")
    with TraceWriter(tmp_path / "t.h5", header, [Variable("x", ("step",), "1", "an x")]) as writer:
        with open_trace(tmp_path / "t.h5.partial") as trace:
            assert "partial" in shown(render_summary(trace))
        writer.write(SampleRecord(sample=0, arrays={"x": np.arange(3.0)}))
        with open_trace(tmp_path / "t.h5.partial") as trace:
            assert "no sample has a reference" in shown(render_summary(trace))
            assert "(partial)" in shown(render_variable(trace, "x"))


def test_numbers_where_they_fit(trace: Trace) -> None:
    text = shown(render_variable(trace, "mass", sample="1"))
    assert "sample 1; shown: step (4) by segment_key (3)" in text
    assert "system" in text and "answer" in text
    rows = [line.split() for line in text.splitlines()[-4:]]
    assert rows[0] == ["0", LEVELS[0], "0.2500", LEVELS[-1], "0.5000", LEVELS[0], "0.2500"]


def test_what_is_averaged_is_said_and_right(trace: Trace) -> None:
    text = shown(render_variable(trace, "importance", mean=("visual",)))
    assert "mean over visual, sample; shown: step (6) by layer (2)" in text
    rows = {line.split()[0]: line.split()[2::2] for line in text.splitlines()[-6:]}
    assert rows["3"] == ["300.35", "310.35"] or rows["3"] == ["300.4", "310.4"] or rows["3"] == ["300.3", "310.3"]
    assert "formula: mean over heads" in text


def test_a_map_has_a_row_per_place_and_a_legend(trace: Trace) -> None:
    text = shown(render_variable(trace, "importance", sample=3, layer=0), 40)
    lines = text.splitlines()
    rows = [line.split() for line in lines if re.match(r"\s*\d+ ", line)]
    assert [r[0] for r in rows] == ["0", "1", "2", "3", "4", "5"]
    assert set(rows[0][1]) == {LEVELS[0]} and set(rows[5][1]) == {LEVELS[-1]} and len(rows[0][1]) % 8 == 0
    assert any("visual →" in x for x in lines) and any(x.startswith("step ↓") for x in lines)
    assert any(x.startswith("legend") for x in lines)


def test_codes_are_named_and_never_averaged_unasked(trace: Trace) -> None:
    text = shown(render_variable(trace, "kept", sample=1), 30)
    rows = [line.split()[1] for line in text.splitlines() if re.match(r"\s*\d+ ", line)]
    cell = len(rows[0]) // 8
    assert rows[0] == "█" * 8 * cell and rows[1] == "█" * 4 * cell + "·" * 4 * cell
    assert "█ kept" in text and "· dropped" in text
    assert "share kept" in shown(render_variable(trace, "kept", sample=1, mean=("visual",)))
    share = select(trace, "kept", sample=1, mean=("visual",))
    assert share.values.tolist() == [1.0, 0.5, 0.5, 0.5]
    tokens = shown(render_variable(trace, "token"))
    assert "sample 1" in tokens and "mean" not in tokens and "15" in tokens
    assert "kept" in shown(render_variable(trace, "kept", sample=1, step=0, at={"visual": 0})).splitlines()[-1]


def test_wide_axes_are_binned_and_it_is_said(tmp_path: Path) -> None:
    variables = [Variable("x", ("step", "visual"), "1", "x"), Variable("f", ("step", "visual"), "1", "f", dtype="int8",
                 flags={"A": 0, "B": 1}), Variable("long", ("visual",), "1", "l")]  # fmt: skip
    values = np.zeros((200, 1000))
    values[:, 500:] = 1
    arrays = {"x": values, "f": values, "long": np.linspace(0, 1, 1000)}
    with TraceWriter(tmp_path / "t.h5", TraceHeader("r", "", "", "b"), variables) as writer:
        writer.write(SampleRecord(sample=0, arrays=arrays))
    with open_trace(tmp_path / "t.h5") as trace:
        for name, glyphs in (("x", (LEVELS[0], LEVELS[-1])), ("f", ("█", "·"))):
            text = shown(render_variable(trace, name), 60)
            assert "places along visual" in text and "places along step" in text
            row = next(x for x in text.splitlines() if x.strip().startswith("0 ")).split()[1]
            assert row[0] == glyphs[0] and row[-1] == glyphs[1]
        line = shown(render_variable(trace, "long"), 60)
        assert "to a line" in line and LEVELS[0] in line and LEVELS[-1] in line


@pytest.mark.parametrize("width", [30, 61, 200])
def test_every_variable_in_every_width(trace: Trace, width: int) -> None:
    for name in (*trace.variables, "prediction", "failed", "n_step", "reference"):
        assert shown(render_variable(trace, name), width)
        assert shown(render_variable(trace, name, sample="5"), width)


def test_colour_adds_nothing_that_is_not_there_without_it(trace: Trace) -> None:
    coloured = Console(width=60, file=io.StringIO(), force_terminal=True, color_system="truecolor", record=True)
    thing = render_variable(trace, "importance", sample=1)
    coloured.print(thing)
    assert coloured.export_text(styles=False).split() == shown(thing, 60).split()


def test_failed_and_unrecorded_samples_say_so(trace: Trace) -> None:
    assert "Failed: no such picture." in shown(render_variable(trace, "mass", sample=5))


@pytest.mark.parametrize(
    ("name", "picks", "message"),
    [
        ("masss", {}, "did you mean `mass`"),
        ("mass", {"sample": "2"}, "has no sample 2; it has sample 1, 3, 5"),
        ("mass", {"step": "6"}, r"has no step 6; it has step 0..5"),
        ("mass", {"step": "4..9"}, r"has no step 4..9; it has step 0..5"),
        ("mass", {"step": "3..1"}, "ends before it begins; write 1..3"),
        ("mass", {"step": "x"}, "write a number, a range such as 4..8"),
        ("mass", {"layer": 0}, "`mass` has no axis `layer`; its axes are sample, step, segment_key"),
        ("mass", {"mean": ("head",)}, "has no axis `head`"),
        ("mass", {"at": {"segment_key": "vision"}}, "did you mean `visual`"),
        ("prediction", {"mean": ("sample",)}, "is text"),
    ],
)
def test_what_is_not_there_is_an_error_that_says_what_is(
    trace: Trace, name: str, picks: dict[str, object], message: str
) -> None:
    for show in (render_variable, to_csv, to_json):
        with pytest.raises(ProbeError, match=message):
            show(trace, name, **picks)  # type: ignore[operator]


def test_picks(trace: Trace) -> None:
    def steps(pick: object) -> list[float]:
        chosen = select(trace, "importance", sample=3, layer=0, step=pick, at={"visual": 0})  # type: ignore[arg-type]
        return np.atleast_1d(np.ma.getdata(chosen.values)).tolist()

    assert steps("1..3") == [100, 200, 300]
    assert steps(-1) == steps("5") == [500]
    assert steps("0,2,-1") == [0, 200, 500]
    assert steps("-2..-1") == [400, 500]
    assert select(trace, "mass", sample=1, step=0, at={"segment_key": "visual"}).values.item() == 0.5
    assert select(trace, "score", sample="1..3").values.tolist() == [1.0, 1.0]


def test_csv_has_a_line_per_value(trace: Trace) -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(trace, "mass", step="3..5"))))
    assert len(rows) == 3 * (1 + 3), "sample 1 has one of these steps, sample 3 has three"
    assert rows[0] == {"sample": "1", "step": "3", "segment_key": "system", "mass": "0.25"}
    rows = list(csv.DictReader(io.StringIO(to_csv(trace, "kept", sample=1, step=1))))
    assert [r["kept"] for r in rows] == ["kept"] * 4 + ["dropped"] * 4
    assert list(csv.reader(io.StringIO(to_csv(trace, "prediction"))))[1] == ["1", 'because, "so"']


def test_json_is_nested_and_has_null_where_there_is_none(trace: Trace) -> None:
    content = json.loads(to_json(trace, "mass", sample="1..5", mean=("segment_key",)))
    assert content["dims"] == ["sample", "step"] and content["labels"]["sample"] == ["1", "3", "5"]
    assert content["values"][0][4:] == [None, None] and content["values"][2] == [None] * 6
    assert content["values"][1] == pytest.approx([1 / 3] * 6)
    assert json.loads(to_json(trace, "kept", sample=1))["flags"]["dropped"] == 2
    assert json.loads(to_json(trace, "score", sample=5))["values"] is None


def test_odd_variables_do_not_stop_anything(tmp_path: Path, shard: Path) -> None:
    """Datasets that no writer of ours makes: records, texts with axes, no scales, another length, no samples."""
    path = tmp_path / "odd.h5"
    path.write_bytes(shard.read_bytes())
    with h5py.File(path, "r+") as file:
        kinds = {
            "record": np.zeros(3, dtype=[("a", "i4"), ("b", "f4")]), "flag": np.array([True, False, True]),
            "half": np.zeros((3, 2), "f2"), "short": np.zeros(1), "six": np.zeros((3, 2, 2, 2, 2, 2)),
            "infinite": np.array([np.inf, -np.inf, 1.0]), "complex": np.zeros(3, "c16"),
        }  # fmt: skip
        for name, values in kinds.items():
            file[name] = values
            file[name].dims[0].attach_scale(file["sample"])
        file["words"] = np.array([["a", "b"]] * 3, dtype=h5py.string_dtype())
        file["words"].dims[0].attach_scale(file["sample"])
        file["alone"] = 3.0
        file["nothing"] = h5py.Empty("f4")
    with open_trace(path) as trace:
        summary = shown(render_summary(trace))
        assert "infinite" in summary and "alone" not in summary
        for name in {*kinds, "words"} - {"short"}:
            assert shown(render_variable(trace, name))
            assert to_csv(trace, name)
            assert json.loads(to_json(trace, name))["variable"] == name
        with pytest.raises(ProbeError, match="`short` cannot be read"):
            render_variable(trace, "short")
