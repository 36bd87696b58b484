"""What can be said of the harness's benchmarks without the harness."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from probe.__main__ import load_cli
from probe.data.benchmarks import MARKER
from probe.data.harness import number_in, reply
from probe.errors import ProbeError
from probe.lmms import TASKS
from probe.lmms_settings import with_settings
from probe.recipe import load_recipe, parse_recipe
from probe.runner import run
from probe.study.printed import benchmark_of

REPO = Path(__file__).resolve().parents[2]


def _recipe(task: str, *sets: str, name: str = "fastv") -> object:
    return load_recipe(name).replace(data={"lmms_eval": task}).with_sets(sets)


def test_a_recipe_gets_the_study_s_settings_where_it_has_none_of_its_own() -> None:
    said = with_settings(_recipe("docvqa_val"), "GSAI-ML/LLaDA-V")
    assert (said.generate.gen_length, said.generate.block_length, said.generate.steps) == (32, 32, 16)
    assert said.generate.think is None
    assert "gen_length: 32" in said.to_yaml()
    lavida = with_settings(_recipe("mme"), "jacklishufan/lavida-dream-v1.0-instruct")
    assert (lavida.generate.gen_length, lavida.generate.steps) == (4, 2)
    assert with_settings(_recipe("video_dc499"), "GSAI-ML/LLaDA-V").generate.think is True


def test_what_a_recipe_says_itself_stays() -> None:
    own = _recipe("docvqa_val", "generate.gen_length=8")
    assert with_settings(own, "GSAI-ML/LLaDA-V") == own
    unknown = _recipe("some_task")
    assert with_settings(unknown, "GSAI-ML/LLaDA-V") == unknown
    task = load_recipe("fastv")
    assert with_settings(task, "GSAI-ML/LLaDA-V") == task


def test_replies_are_made_ready_as_the_published_evaluations_do() -> None:
    assert reply(" Yes. ", "GSAI-ML/LLaDA-V") == "Yes"
    assert reply("Yes..", "GSAI-ML/LLaDA-V") == "Yes."
    assert reply("Yes.", "miniature") == "Yes."
    assert reply("!!Yes.", "jacklishufan/lavida-dream-v1.0-instruct") == "Yes."


def test_the_score_in_what_a_task_makes_of_an_answer() -> None:
    assert number_in({"anls": 0.75}) == 0.75
    assert number_in({"mme_perception_score": {"question_id": "x", "score": 1.0}}) == 1
    assert number_in({"submission": {"answer": "x"}, "exact_match": True}) == 1
    assert number_in({"mmmu_acc": {"answer": "A", "parsed_pred": "A"}}) != number_in({})  # neither is a number


def test_our_task_files_are_the_study_s_documents() -> None:
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    found = {path.stem: yaml.load(path.read_text(), Loader) for path in sorted(TASKS.glob("*.yaml"))}
    assert {benchmark_of(name) for name in found} == {"DVQA", "IVQA"}
    for name, task in found.items():
        assert task["task"] == name
        module, function = task["process_results"].split(".")
        assert (TASKS / f"{module}.py").is_file()
        assert function == "process_results"


def test_the_variant_asks_for_the_marker_and_scores_what_follows_it() -> None:
    import runpy

    task = runpy.run_path(str(TASKS / "llada_v_documents.py"))
    assert MARKER in task["doc_to_text"]({"question": "Date?"}, {"pre_prompt": "", "post_prompt": ""})
    doc = {"answers": ["1998"]}
    assert task["process_results"](doc, ["It says so at the top. Answer: 1998."]) == {"anls": 1}
    assert task["process_results"](doc, ["1998"]) == {"anls": 0}


def test_the_entry_point_names_the_manifests_and_imports_no_torch() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["lmms_eval.models"] == {"probe": "probe.lmms:manifests"}
    code = "import sys, probe.lmms; sys.exit(bool({'torch', 'numpy', 'lmms_eval'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0


@pytest.mark.skipif(find_spec("lmms_eval") is not None, reason="lmms-eval is installed")
def test_without_the_harness_one_line_names_the_extra(tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match=r"takes lmms-eval itself .*pip install 'dmllm-probe\[lmms\]'"):
        run(_recipe("docvqa_val"), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("{lmms_eval: x, task: world/mixed}", "names both a `task` and a `lmms_eval`"),
        ("{task: world/mixed, include_path: x}", "holds task files for `lmms_eval`"),
    ],
)
def test_parts_of_data_that_do_not_fit_are_named(said: str, message: str) -> None:
    with pytest.raises(ProbeError, match=message):
        parse_recipe(f"schema: 1\nname: r\ndata: {said}\n")


def test_the_command_line_takes_a_task_by_its_prefix() -> None:
    found = CliRunner().invoke(load_cli().app, ["run", "none", "--data", "lmms_eval:x", "--ask", "Why?"])
    assert isinstance(found.exception, ProbeError) and "questions of its own" in str(found.exception)
