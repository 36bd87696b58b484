"""Tables of finished traces: pooled, averaged and laid out as the study has them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from probe.errors import ProbeError
from probe.recipe import load_recipe, parse_recipe
from probe.study import printed
from probe.study.finished import Finished, in_folder, read, totals_file
from probe.study.tables import Cell, Row, Table, printed_tables, tables
from probe.trace import SampleRecord, TraceHeader, TraceWriter, Variable
from probe.views.study_tables import to_csv, to_latex, to_markdown

COUNTS = Variable("visual_tokens", ("step", "layer"), "1", "visual tokens", dtype="int32")
BOX = Variable("visual_original", (), "1", "visual tokens at first", dtype="int32")
SOURCE = "schema: 1\nname: {name}\nprobes: []\n"
Scores = Mapping[str, Sequence[float]]


def _trace(
    path: Path,
    scores: Scores,
    recipe: str = "",
    *,
    sets: Sequence[str] = (),
    counts: Sequence[Sequence[int]] = ((8, 8), (8, 8)),
    numbers: Sequence[int] | None = None,
    metric: str = "anls",
    **header: object,
) -> Path:
    """A trace with these scores by task; 8 visual tokens, of which `counts` are left by step and layer."""
    made = load_recipe(recipe, sets) if recipe else parse_recipe(SOURCE.format(name="none"))
    fields: dict[str, object] = {"backbone": "GSAI-ML/LLaDA-V", **header}
    head = TraceHeader(made.name, made.to_yaml(), made.hash, **fields)  # type: ignore[arg-type]
    arrays = {"visual_tokens": np.array(counts, np.int32), "visual_original": np.int32(8)}
    rows = [(task, score) for task, several in scores.items() for score in several]
    with TraceWriter(path, head, [COUNTS, BOX]) as writer:
        for number, (task, score) in zip(numbers or range(len(rows)), rows, strict=True):
            name = f"{task}/{number}"
            writer.write(SampleRecord(number, name, task, "?", ("yes",), "yes", metric, score, arrays=arrays))
    return path


def _of(folder: Path, study: str | None = None) -> list[Table]:
    return tables(read(in_folder(folder)), study)


def _rows(table: Table) -> dict[str, Row]:
    return {row.label: row for section in table.sections for row in section.rows}


QUARTER = ((8, 2), (8, 2))


def test_a_cell_is_the_mean_score_in_percent_beside_the_study_s(tmp_path: Path) -> None:
    _trace(tmp_path / "none.trace.h5", {"gqa": [1, 0.5], "chartqa": [1, 1]})
    _trace(tmp_path / "fastv.trace.h5", {"gqa": [0.5, 0.25], "chartqa": [1, 0]}, "fastv", sets=["keep=0.25"],
           counts=QUARTER)  # fmt: skip
    (table,) = _of(tmp_path)
    assert (table.title, table.layout, table.columns, table.study) == (
        "GSAI-ML/LLaDA-V", "retention", ("GQA", "CQA"), "LLaDA-V",
    )  # fmt: skip
    assert [section.title for section in table.sections] == ["", "Retention ratio = 25%"]
    bare, fastv = _rows(table)["none"], _rows(table)["FastV"]
    assert [cell.ours.value for cell in bare.cells] == [75, 100]
    assert [(cell.ours.value, cell.ours.n, cell.study) for cell in fastv.cells] == [(37.5, 2, 39.1), (50, 2, 10.8)]
    assert (bare.average, fastv.average.ours.value) == (Cell(bare.average.ours, 100.0), 50)
    assert fastv.average.study == 64.2
    assert (fastv.keep, fastv.kept) == (25, pytest.approx(62.5))
    low, high = fastv.cells[0].ours.low, fastv.cells[0].ours.high
    assert (low, high) == (0, 100)  # t(1) = 12.7 standard errors of 12.5, cut to what is possible


def test_the_study_s_average_comes_out_of_traces_that_score_as_it_prints(tmp_path: Path) -> None:
    """Each of the study's rows as a trace: a recipe of its method, with its scores."""
    told = {"ToMe": ("tome", []), "FastV": ("fastv", ["keep"]), "TRIM": ("trim", ["keep"]), "none": ("", []),
            "SparseVLM": ("sparsevlm", ["keep"]), "DivPrune": ("divprune", ["keep"]), "VTW": ("vtw", [])}  # fmt: skip
    numbers = printed.by_retention("LLaDA-V")
    for method, retention in dict.fromkeys((p.method, p.retention) for p in numbers):
        scores = {p.benchmark: p.score for p in numbers if (p.method, p.retention) == (method, retention)}
        del scores[printed.AVERAGE]
        recipe, dials = told[method]
        left = 8 if method == "none" else 8 * retention / 100
        path = tmp_path / f"{method}{retention:.0f}.trace.h5"
        _trace(
            path,
            {printed.BENCHMARKS[name][0]: [score / 2000] for name, score in scores.items()},
            recipe,
            sets=[f"{dial}={retention / 100}" for dial in dials],
            counts=((8, round(left)), (8, round(left))),
        )
    (table,) = _of(tmp_path)
    found = [row for section in table.sections for row in section.rows]
    assert len(found) == 17
    for row in found:
        if row.label == "ToMe" and row.keep not in (50, 25, 0):
            continue  # a tenth of eight tokens is no whole number, so this row finds no partner
        assert abs(row.average.ours.value - row.average.study) < 0.1, row
        for cell in row.cells:
            assert cell.ours.value == pytest.approx(cell.study / 20)


def test_shards_are_one_row_and_repeated_samples_count_once(tmp_path: Path) -> None:
    _trace(tmp_path / "a.shard0of2.trace.h5", {"gqa": [1, 1]}, "fastv", numbers=[0, 2])
    _trace(tmp_path / "a.shard1of2.trace.h5", {"gqa": [0, 1]}, "fastv", numbers=[1, 3])
    _trace(tmp_path / "again.trace.h5", {"gqa": [0, 0]}, "fastv", numbers=[0, 1])
    _trace(tmp_path / "seed.trace.h5", {"gqa": [0]}, "fastv", numbers=[0], seed=1)
    (table,) = _of(tmp_path)
    (cell,) = _rows(table)["FastV"].cells
    assert (cell.ours.value, cell.ours.n) == (60, 5)
    assert any("no unpruned run" in note for note in table.notes)
    assert np.isnan(_rows(table)["FastV"].average.ours.value)


def test_other_dials_other_recipes_and_other_weights_do_not_share_a_row(tmp_path: Path) -> None:
    _trace(tmp_path / "a.trace.h5", {"gqa": [1]}, "fastv")
    _trace(tmp_path / "b.trace.h5", {"gqa": [0]}, "fastv", sets=["layer=3"])
    _trace(tmp_path / "c.trace.h5", {"gqa": [0.5]}, "study_fastv", sets=["keep=0.5"])
    _trace(tmp_path / "d.trace.h5", {"gqa": [0.25]}, "random")
    _trace(tmp_path / "e.trace.h5", {"gqa": [0.75]}, "fastv", weights_revision="other")
    one, two = _of(tmp_path)
    values = {label: row.cells[0].ours.value for label, row in _rows(one).items()}
    assert values == {
        "FastV (fastv, layer 2)": 100,
        "FastV (fastv, layer 3)": 0,
        "FastV (study_fastv)": 50,
        "random": 25,
    }
    assert (one.title, two.title) == ("GSAI-ML/LLaDA-V (as it comes)", "GSAI-ML/LLaDA-V (other)")
    assert _rows(two)["FastV"].cells[0].ours.value == 75


def test_what_begins_late_stands_in_a_table_by_start(tmp_path: Path) -> None:
    late = ((8, 8), (2, 2))
    _trace(tmp_path / "none.trace.h5", {"docvqa_val": [1]})
    _trace(tmp_path / "a.trace.h5", {"docvqa_val": [0.5]}, "study_fastv", sets=["when={done: [25%]}"], counts=late)
    _trace(tmp_path / "b.trace.h5", {"docvqa_val": [0.75]}, "study_fastv", sets=["when={done: [75%]}"], counts=late)
    _trace(tmp_path / "c.trace.h5", {"docvqa_val": [0.6]}, "study_vtw", sets=["when={done: [75%]}"],
           counts=((8, 8), (8, 0)))  # fmt: skip
    _trace(tmp_path / "d.trace.h5", {"docvqa_val": [0.9]}, "vtw", sets=["start=50%"], counts=((8, 8), (0, 0)))
    (table,) = _of(tmp_path)
    assert (table.layout, table.columns) == ("start", ("DVQA 25%", "DVQA 50%", "DVQA 75%"))
    rows = {label: [(c.ours.value, c.study) for c in row.cells] for label, row in _rows(table).items()}
    assert rows["none"] == [(100, 83.9)] * 3
    assert [rows["FastV"][0], rows["FastV"][2]] == [(50, 58.2), (75, 83.0)]
    assert np.isnan(rows["FastV"][1][0]) and rows["FastV"][1][1] == 81.2
    assert rows["VTW (study_vtw)"][2] == (60, 83.0)
    assert rows["VTW (vtw)"][1] == (90, 80.9)


def test_a_step_s_number_is_a_share_of_the_steps_that_were_run(tmp_path: Path) -> None:
    path = _trace(tmp_path / "a.trace.h5", {"gqa": [1]}, "fastv", sets=["start=1"], counts=((8, 8), (8, 2)))
    assert read([path])[0].start == 0.5


def test_a_benchmark_s_own_total_stands_in_its_column(tmp_path: Path) -> None:
    """POPE's F1 from the answers, MME's points from what the harness left beside the trace."""
    path = _trace(tmp_path / "none.trace.h5", {"pope": [1, 1], "mme": [1, 0]}, metric="yes_no_exact")
    totals_file(path).write_text(json.dumps({"results": {"mme": {"mme_total": 1994.4, "n": 2}}}))
    (table,) = _of(tmp_path)
    assert table.columns == ("MME", "POPE")
    assert [cell.ours.value for cell in _rows(table)["none"].cells] == [1994.4, 100]


def test_a_harness_s_number_stands_alone_where_single_answers_have_no_score(tmp_path: Path) -> None:
    """MMBench: only groups of copies are right or wrong. Two seeds are averaged, a smaller run does not count."""
    sizes = {"a": (0, 80.0, 4), "b": (0, 10.0, 2), "c": (1, 60.0, 4)}
    for name, (seed, value, n) in sizes.items():
        path = _trace(tmp_path / f"{name}.trace.h5", {"mmbench_en_dev_static": [float("nan")]}, seed=seed)
        numbers = {"mmbench_en_dev_static": {"gpt_eval_score": value, "n": n}}
        totals_file(path).write_text(json.dumps({"results": numbers}))
    (table,) = _of(tmp_path)
    (cell,) = _rows(table)["none"].cells
    assert (table.columns, cell.ours.value, cell.ours.n, cell.study) == (("MMB",), 70, 8, 83.3)


def test_what_must_be_known_before_comparing_is_said(tmp_path: Path) -> None:
    _trace(tmp_path / "none.trace.h5", {"gqa": [1, 1, 1], "pope": [0]})
    _trace(tmp_path / "a.trace.h5", {"gqa": [1], "pope": [1]}, "fastv")
    (table,) = _of(tmp_path)
    assert table.notes == (
        "gqa: rows have between 1 and 3 samples, so they are of different ones",
        "pope: the unpruned run scores 0, so the average leaves it out",
    )
    assert _rows(table)["FastV"].average.ours.value == 100


def _finished(tmp_path: Path) -> Finished:
    return read([_trace(tmp_path / "x.trace.h5", {"my_data": [1, 0]}, "fastv")])[0]


def test_formats_hold_the_same_numbers(tmp_path: Path) -> None:
    bare = replace(_finished(tmp_path), unpruned=True, keep=1.0, kept=1.0)
    found = tables([bare, _finished(tmp_path / "two")], "LaViDa-Dream") if (tmp_path / "two").mkdir() is None else []
    markdown, latex, rows = to_markdown(found), to_latex(found), list(csv.DictReader(io.StringIO(to_csv(found))))
    assert "| FastV | 100% | 50.0 | 100.0% (85.0%) |" in markdown
    assert r"FastV & 100\% & 50.0 & 100.0\% (85.0\%) \\" in latex and r"my\_data" in latex
    assert latex.count("{") == latex.count("}")
    (cell,) = [r for r in rows if r["method"] == "FastV" and r["column"] == "my_data"]
    assert (cell["score"], cell["n"], cell["retention_percent"], cell["study_score"]) == ("50", "2", "50", "")
    assert [r["study_score"] for r in rows if r["column"] == "Avg"] == ["100", "85"]
    assert "±" in to_markdown(found, intervals=True)
    assert "study" not in to_markdown(tables([bare], ""))


def test_the_study_s_own_tables() -> None:
    found = printed_tables()
    rows = list(csv.DictReader(io.StringIO(to_csv(found))))
    for backbone in printed.TABLES:
        for one in (*printed.by_retention(backbone), *printed.by_start(backbone)):
            same = [
                float(r["study_score"])
                for r in rows
                if (r["backbone"], r["method"], float(r["retention_percent"])) == (backbone, one.method, one.retention)
                and r["column"].split()[0] == one.benchmark
                and (one.method == "none" or r["column"] in (one.benchmark, f"{one.benchmark} {one.start:.0f}%"))
            ]
            assert one.score in same
    assert sum(bool(r["study_score"]) for r in rows) >= 2 * 17 * 9


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match="there is no folder"):
        in_folder(tmp_path / "none")
    assert in_folder(tmp_path) == []


def test_answers_that_end_before_a_pruner_comes_are_its_row_all_the_same(tmp_path: Path) -> None:
    """Nothing was withdrawn from them, which is no reason to take the run for an unpruned one or for a milder one."""
    _trace(tmp_path / "none.trace.h5", {"gqa": [1]})
    _trace(tmp_path / "a.trace.h5", {"gqa": [1]}, "vtw", sets=["start=50%"], counts=((8, 8), (8, 0)))
    _trace(tmp_path / "b.trace.h5", {"gqa": [0.5]}, "vtw", sets=["start=75%"], counts=((8, 8), (8, 8)))
    (table,) = _of(tmp_path)
    assert [section.title for section in table.sections] == ["", "Retention ratio = 0%"]
    assert [cell.ours.value for cell in _rows(table)["VTW"].cells] == [100, 50]
