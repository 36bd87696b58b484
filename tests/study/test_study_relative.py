"""The score that is left, by retention and by start: of traces worked out by hand, and of the study's tables."""

from __future__ import annotations

import csv
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

from probe.errors import ProbeError
from probe.lmms_settings import with_settings
from probe.recipe import Recipe, load_recipe, parse_recipe
from probe.study import printed
from probe.study.finished import in_folder, read, settings_of
from probe.study.relative import Series, printed_series, series_of
from probe.study.tables import tables
from probe.trace import SampleRecord, TraceHeader, TraceWriter, Variable

VARIABLES = [
    Variable("visual_tokens", ("step", "layer"), "1", "visual tokens", dtype="int32"),
    Variable("visual_original", (), "1", "visual tokens at first", dtype="int32"),
    Variable("commit_step", ("position",), "1", "step", dtype="int32"),
]


def write(
    path: Path, scores: dict[str, list[float]], recipe: str = "", *, sets: tuple[str, ...] = (), slots: int = 4,
    cut: int = 0, left: int = 2, backbone: str = "toy", made: Recipe | None = None,
) -> None:  # fmt: skip
    """A trace of 4 steps with 8 visual tokens, `left` of them from step `cut` on, unless it has no recipe."""
    if made is None:
        made = load_recipe(recipe, sets) if recipe else parse_recipe("schema: 1\nname: none\nprobes: []\n")
    counts = np.full((4, 2), 8)
    if made.probes:
        counts[cut:] = left
    arrays = {"visual_tokens": counts, "visual_original": np.int32(8), "commit_step": np.zeros(slots, int)}
    with TraceWriter(path, TraceHeader(made.name, made.to_yaml(), made.hash, backbone), VARIABLES) as writer:
        for i, (task, score) in enumerate((t, s) for t, several in scores.items() for s in several):
            writer.write(SampleRecord(i, f"{task}{i}", task, "?", ("yes",), "yes", "anls", score, arrays=arrays))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    names = (f"{i}.trace.h5" for i in itertools.count())
    keep = ("keep=25%", "positions=keep")
    for slots, tasks in ((2, ("a", "b")), (12, ("long",))):
        write(tmp_path / next(names), {t: [1, 0.5] for t in tasks}, slots=slots)
        write(tmp_path / next(names), {t: [0.5, 0.25] for t in tasks}, "divprune", sets=keep, slots=slots)
        more = {t: [0.75, 0.75] if t == "a" else [0.75, 0] for t in tasks}
        write(tmp_path / next(names), more, "divprune", sets=(*keep, "start=50%"), slots=slots, cut=2)
        ten = ("keep=50%", "positions=keep")
        write(tmp_path / next(names), {t: [1, 0] for t in tasks}, "divprune", sets=ten, slots=slots, left=4)
    return tmp_path


def values(one: Series) -> tuple[dict[float, float], dict[float, float]]:
    left, late = ({k: v.value for k, v in points.items()} for points in (one.by_keep, one.by_start))
    return left, late


def test_what_is_left_of_the_score_by_hand(folder: Path) -> None:
    short, long = series_of(read(in_folder(folder)))
    assert (short.backbone, short.method, short.length, short.tasks, short.samples) == (
        "toy", "DivPrune", "short", ("a", "b"), 4,
    )  # fmt: skip
    # unpruned 0.75; at 25 % 0.375, at 50 % 0.5; late 0.75 and 0.375 of the two tasks
    assert values(short) == (
        pytest.approx({1.0: 100, 0.5: 100 * 2 / 3, 0.25: 50}), pytest.approx({0.0: 50, 0.5: (100 + 50) / 2}),
    )  # fmt: skip
    assert list(short.by_keep) == [1.0, 0.5, 0.25] and short.keep == 0.25
    assert (long.length, long.tasks) == ("long", ("long",)) and long.by_start[0.5].value == pytest.approx(50)
    late = short.by_start[0.5]
    # a's scores do not spread; b's half interval is cut at 1 - 0, and goes into the mean of two tasks
    assert late.high - late.value == pytest.approx(50 * 1 / 0.75 / 2) and late.low == pytest.approx(75 - 100 / 3)


def test_a_pruner_without_an_unpruned_run_is_left_out(folder: Path) -> None:
    write(folder / "x.trace.h5", {"a": [1.0]}, "random", backbone="another")
    assert {one.backbone for one in series_of(read(in_folder(folder)))} == {"toy"}
    write(folder / "y.trace.h5", {"a": [1.0]}, "random", slots=2)
    assert {one.method for one in series_of(read(in_folder(folder)))} == {"DivPrune"}, "it has not run task b"


def test_the_release_s_recipes_are_one_method_and_its_benchmarks_one_backbone(tmp_path: Path) -> None:
    """As sweeps of the study's tables leave them: each benchmark's own length, another recipe for later steps."""
    names = (tmp_path / f"{i}.trace.h5" for i in itertools.count())
    for task, slots in (("gqa", 2), ("docvqa_val_llada_v", 32)):
        for recipe, sets, score in (
            ("", (), 1.0),
            ("study_divprune", ("keep=0.25",), 0.5),
            ("study_divprune_late", ("done=[50%]",), 0.75),
        ):
            made = load_recipe(recipe, sets) if recipe else parse_recipe("schema: 1\nname: none\nprobes: []\n")
            made = made.replace(data={"lmms_eval": task}, backbone="GSAI-ML/LLaDA-V")
            made = with_settings(made, "GSAI-ML/LLaDA-V")
            assert made.generate.gen_length == slots
            cut = 0 if score == 0.5 else 2
            write(next(names), {task: [score, score]}, made=made, slots=slots, cut=cut, backbone="GSAI-ML/LLaDA-V")
    found = read(in_folder(tmp_path))
    assert {table.title for table in tables(found)} == {"GSAI-ML/LLaDA-V"}
    assert [(one.backbone, one.method, one.length) for one in series_of(found)] == [
        ("GSAI-ML/LLaDA-V", "DivPrune", "short"), ("GSAI-ML/LLaDA-V", "DivPrune", "long"),
    ]  # fmt: skip
    assert [values(one) for one in series_of(found)] == [({1.0: 100, 0.25: 50}, {0.0: 50, 0.5: 75})] * 2
    other = load_recipe("none").replace(data={"lmms_eval": "gqa"}, generate={"gen_length": 8, "steps": 2})
    assert settings_of(other) == "gen_length 8, steps 2"


def test_answers_that_ended_before_the_cut_do_not_change_the_retention(tmp_path: Path) -> None:
    write(tmp_path / "a.trace.h5", {"a": [1, 1]}, "vtw", sets=("start=50%",), cut=2, left=0)
    (one,) = read(in_folder(tmp_path))
    assert one.keep == 0
    made = load_recipe("vtw", ["start=50%"])
    with TraceWriter(tmp_path / "b.trace.h5", TraceHeader(made.name, made.to_yaml(), made.hash, "toy"), VARIABLES) as w:
        for i, cut in enumerate((2, 4)):
            counts = np.full((4, 2), 8)
            counts[cut:] = 0
            arrays = {"visual_tokens": counts, "visual_original": np.int32(8), "commit_step": np.zeros(4, int)}
            w.write(SampleRecord(i, f"s{i}", "a", "?", ("yes",), "yes", "anls", 1.0, arrays=arrays))
    assert [f.keep for f in read(in_folder(tmp_path))] == [0, 0]


@pytest.mark.parametrize("method", [m for m in printed.METHODS if m != "none"])
def test_the_study_s_numbers_from_its_files(method: str) -> None:
    """Read anew from the printed tables: 2 or 4 tokens are short, the rest long; MME and POPE are in both tables."""
    files = {"LLaDA-V": "table1_llada_v.csv", "LaViDa-Dream": "table2_lavida_dream.csv"}
    long = {"CQA", "IVQA", "DVQA", "VDC"}
    late = list(csv.DictReader((printed.FOLDER / "table3_start.csv").open()))
    for one in printed_series(method):
        rows = list(csv.DictReader((printed.FOLDER / files[one.backbone]).open()))
        names = [n for n in rows[0] if n not in ("method", "retention_percent", "Avg")]
        names = [n for n in names if (n in long) == (one.length == "long")]
        base = {n: float(rows[0][n]) for n in names}
        for row in rows:
            if row["method"] == method:
                wanted = np.mean([100 * float(row[n]) / base[n] for n in names])
                assert one.by_keep[float(row["retention_percent"]) / 100].value == pytest.approx(wanted)
        own = [r for r in late if r["backbone"] == one.backbone and (r["benchmark"] in long) == (one.length == "long")]
        bare = {r["benchmark"]: float(r["score"]) for r in own if r["method"] == "none"}
        own = [r for r in own if r["method"] == method and (one.length == "long" or r["benchmark"] in ("MME", "POPE"))]
        for start in {r["start_percent"] for r in own}:
            shares = [100 * float(r["score"]) / bare[r["benchmark"]] for r in own if r["start_percent"] == start]
            assert one.by_start[float(start) / 100].value == pytest.approx(np.mean(shares))
        assert len(one.by_start) == len({r["start_percent"] for r in own}) + (one.length == "short" and bool(own))


# -------------------------------------------------------------------- the figure


def test_the_figure_draws_these_numbers(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sys.path.insert(0, str(Path(__file__).parents[1] / "views"))
    from test_figures import check_layout, panel

    from probe.views.figures import draw, plot

    write(folder / "r0.trace.h5", {"a": [1, 0.5], "b": [1, 0.5]}, "random", sets=("keep=25%",), slots=2)
    write(folder / "r1.trace.h5", {"a": [1, 0.5], "b": [1, 0.5]}, "random", sets=("keep=25%", "start=75%"), cut=3)
    paths = in_folder(folder)
    figure = draw(paths, "late_pruning")
    check_layout(figure)
    axes = panel(figure, "DivPrune: start, these runs:")
    lines = {container.get_label(): container[0] for container in axes.containers}
    assert set(lines) == {"toy, short", "toy, long"}
    np.testing.assert_allclose(lines["toy, short"].get_ydata(), [50, 75])
    np.testing.assert_allclose(lines["toy, long"].get_ydata(), [50, 50])
    broken = [line for line in axes.get_lines() if list(line.get_xdata()) == [0, 100]]
    assert [list(line.get_ydata()) for line in broken] == [[50, 100], [50, 100]]
    study = panel(figure, "DivPrune: keep, study, as printed:").containers
    assert {c.get_label() for c in study} == {
        f"{b}, {n}" for b in ("LLaDA-V", "LaViDa-Dream") for n in ("short", "long")
    }
    assert "not printed" in [t.get_text() for t in panel(figure, "random: keep, study, as printed:").texts]
    assert plot(paths, "late_pruning", tmp_path / "x.png").stat().st_size > 5000
    with pytest.raises(ProbeError, match="study/figure1"):
        draw([paths[1], paths[2]], "late_pruning")
