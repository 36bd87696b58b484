"""lmms-eval runs our recipes, from its side and from ours, on local files. Skipped where it is not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lmms_eval")

from probe.data import named
from probe.data.harness import harness, task_manager
from probe.errors import ProbeError
from probe.lmms_adapter import Probe
from probe.recipe import Recipe, load_recipe, parse_recipe
from probe.runner import run
from probe.study.finished import in_folder, read, totals_file
from probe.study.printed import BENCHMARKS
from probe.study.tables import tables
from probe.sweep import cells_of, is_done, units_of
from probe.sweep_run import sweep
from probe.trace import open_trace

REPO = Path(__file__).resolve().parents[2]
QUICK = ["generate.gen_length=2", "generate.steps=2"]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)  # some tasks leave files where they run


def _recipe(toy: Path, name: str = "random", task: str = "toy_colour") -> Recipe:
    data = {**named(f"lmms_eval:{task}"), "include_path": str(toy)}
    return load_recipe(name, ["keep=0.5"] if name == "random" else []).replace(data=data).with_sets(QUICK)


def _scores(path: Path) -> list[float]:
    with open_trace(path) as trace:
        return trace.array("score").tolist()


def test_a_recipe_that_names_a_task_runs_it_on_both_sides(toy: Path, tmp_path: Path) -> None:
    result = run(_recipe(toy), out=tmp_path / "out", timed=False)
    assert (result.failed, result.samples) == (0, 4)
    assert result.baseline is not None
    with open_trace(result.baseline) as trace:
        assert trace.array("sample_id").tolist() == [f"toy_colour/{i}" for i in range(4)]
        assert set(trace.array("task").tolist()) == {"toy_colour"}
        assert "lmms-eval" in trace.header.versions
        assert trace.picture(0) is not None
    assert _scores(result.baseline) == [1, 1, 1, 0]  # the miniature knows its colours, and nothing is plaid
    for path in (result.baseline, result.trace):
        told = json.loads(totals_file(path).read_text())
        assert told["results"]["toy_colour"] == {"exact_match": pytest.approx(np.mean(_scores(path))), "n": 4}
    assert any("lmms-eval" in note and "baseline" in note and "exact_match 0.75" in note for note in result.notes)
    (table,) = tables(read(in_folder(tmp_path / "out")))
    assert table.columns == ("toy_colour",)
    assert table.sections[0].rows[0].cells[0].ours.value == 75


def test_a_limit_resuming_and_repeating(toy: Path, tmp_path: Path) -> None:
    recipe = _recipe(toy, "none")
    run(recipe, out=tmp_path / "out", limit=2, baseline=False, timed=False)
    result = run(recipe, out=tmp_path / "out", resume=True, baseline=False, timed=False)
    assert _scores(result.trace) == [1, 1, 1, 0]
    with open_trace(result.trace) as trace:
        assert not trace.header.extra["own_samples"]
        assert f"include_path: {toy}" in trace.header.recipe_yaml
    shard = run(recipe, out=tmp_path / "shard", shard=(1, 2), baseline=False, timed=False)
    with open_trace(shard.trace) as trace:
        assert trace.samples.tolist() == [1, 3]


def test_a_sweep_over_a_task_is_done_when_it_is_done(toy: Path, tmp_path: Path) -> None:
    """In shards, which the harness scores when they are joined; a second call finds nothing left to do."""
    text = f"""
schema: 1
name: few
generate: {{gen_length: 2, steps: 2}}
data: {{limit: 4, include_path: "{toy}", lmms_eval: toy_colour}}
sweep: {{recipes: [random], data: ["lmms_eval:toy_colour"], dial: {{keep: [0.5]}}, shards: 2}}
"""
    recipe = parse_recipe(text)
    done = sweep(recipe, out=tmp_path / "sweep")
    assert (done.failures, done.open) == ((), 0)
    units = units_of(cells_of(recipe), 2)
    assert len(units) == 4 and all(is_done(unit, tmp_path / "sweep") for unit in units)
    (table,) = tables(read(in_folder(tmp_path / "sweep")))
    bare, pruned = (section.rows[0] for section in table.sections)
    assert (bare.cells[0].ours.value, bare.cells[0].ours.n) == (75, 4)
    assert (pruned.label, pruned.cells[0].ours.n) == ("random", 4)


def test_mistakes_and_failures_of_the_harness_are_our_errors(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match="no task `toy_color`; did you mean `toy_colour`"):
        run(_recipe(toy, task="toy_color"), out=tmp_path / "a")
    with pytest.raises(ProbeError, match="there is no folder"):
        run(_recipe(toy / "none"), out=tmp_path / "b")
    with pytest.raises(ProbeError, match="lmms-eval failed on `toy_broken`: RuntimeError: the scorer is out of order"):
        run(_recipe(toy, task="toy_broken"), out=tmp_path / "c", timed=False)
    with pytest.raises(ProbeError, match="lmms-eval failed on `x`: SystemExit: 3"), harness("x"):
        sys.exit(3)


def test_the_harness_knows_our_variants_and_the_twelve_benchmarks(toy: Path) -> None:
    known = set(task_manager(str(toy)).all_tasks)
    assert {name for names in BENCHMARKS.values() for name in names} <= known


def test_the_harness_runs_the_model_in_process(toy: Path, tmp_path: Path) -> None:
    with harness("toy_colour"):
        from lmms_eval.evaluator import simple_evaluate

        model = Probe("none", backbone="miniature", out=str(tmp_path / "out"), keep=1.0)
        model.recipe = model.recipe.with_sets(QUICK)
        results: dict[str, Any] = simple_evaluate(
            model=model, tasks=["toy_colour"], task_manager=task_manager(str(toy)), batch_size=1, bootstrap_iters=0
        )
    assert results["results"]["toy_colour"]["exact_match,none"] == 0.75
    (trace,) = in_folder(tmp_path / "out")
    with open_trace(trace) as opened:
        assert opened.n_samples == 4


def test_the_harness_s_own_command_line_finds_the_model(toy: Path, tmp_path: Path) -> None:
    """Through the entry point, which takes an installed package: its metadata stand in a folder of their own."""
    site = tmp_path / "site" / "dmllm_probe-0.dist-info"
    site.mkdir(parents=True)
    (site / "METADATA").write_text("Metadata-Version: 2.1\nName: dmllm-probe\nVersion: 0\n")
    (site / "entry_points.txt").write_text("[lmms_eval.models]\nprobe = probe.lmms:manifests\n")
    paths = [str(tmp_path / "site"), str(REPO), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [
            sys.executable, "-m", "lmms_eval", "--model", "probe", "--model_args",
            f"recipe=random,backbone=miniature,keep=0.5,out={tmp_path / 'traces'}", "--tasks", "toy_colour",
            "--include_path", str(toy), "--batch_size", "1", "--output_path", str(tmp_path / "results"),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    found = list((tmp_path / "results").rglob("*results*.json"))
    assert found, done.stdout[-3000:] + done.stderr[-3000:]
    score = json.loads(found[0].read_text())["results"]["toy_colour"]["exact_match,none"]
    (trace,) = in_folder(tmp_path / "traces")
    with open_trace(trace) as opened:
        assert opened.header.recipe_name == "random"
        assert opened.n_samples == 4
    assert score in (0, 0.25, 0.5, 0.75)
