"""The command line as its user meets it: a real run, and wrong things said to it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from probe.__main__ import load_cli
from probe.errors import ProbeError
from probe.recipe import shipped_recipes
from probe.trace import open_trace

ROOT = Path(__file__).resolve().parents[2]
app = load_cli().app


def invoke(*words: str | Path) -> str:
    result = CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("quickstart")
    return folder, invoke("run", ROOT / "recipes" / "quickstart.yaml", "--limit", "4", "--out", folder)


def test_a_run_ends_with_table_traces_and_picture(quickstart: tuple[Path, str]) -> None:
    folder, said = quickstart
    assert "baseline" in said
    assert "agrees" in said
    names = {p.name for p in folder.iterdir()}
    assert names == {"quickstart.trace.h5", "quickstart.baseline.trace.h5", "quickstart.png"}
    with Image.open(folder / "quickstart.png") as picture:
        assert picture.width > 500
    with (
        open_trace(folder / "quickstart.trace.h5") as trace,
        open_trace(folder / "quickstart.baseline.trace.h5") as base,
    ):
        assert trace.n_samples == base.n_samples == 4
        for row in range(4):
            # until half of the steps nothing was removed, so both sides agree bit for bit
            half = -(-int(trace.row("nominal_step", row).shape[0]) // 2)
            np.testing.assert_array_equal(trace.row("token", row)[: half - 1], base.row("token", row)[: half - 1])
            assert base.row("visual_tokens", row).min() == 192
        late = [trace.row("visual_tokens", row).min() for row in range(4)]
        assert min(late) == 48
        assert trace.row("attention_mass", 0).shape[1:] == (6, 1, 5)


def test_every_variable_says_its_units_meaning_and_formula(quickstart: tuple[Path, str]) -> None:
    with open_trace(quickstart[0] / "quickstart.trace.h5") as trace:
        for variable in trace.declared():
            assert variable.units, variable.name
            assert variable.long_name, variable.name
            assert variable.formula, variable.name


def test_show_check_sites_and_lists(quickstart: tuple[Path, str]) -> None:
    trace = quickstart[0] / "quickstart.trace.h5"
    assert "attention_mass" in invoke("show", trace)
    assert "question" in invoke("show", trace, "attention_mass", "--sample", "1", "--layer", "2")
    shown = json.loads(invoke("show", trace, "confidence", "--sample", "0", "--json"))
    assert "confidence" in json.dumps(shown)
    assert "," in invoke("show", trace, "visual_tokens", "--sample", "0", "--csv")
    assert "25%" in invoke("check", "quickstart")
    assert "48 of 192" in invoke("check", "quickstart", "--picture", "96x96")
    assert "2929" in invoke("check", "prune/fastv", "--backbone", "GSAI-ML/LLaDA-V", "--picture", "640x480")
    assert "layers[i].self_attn" in invoke("sites")
    assert "prune/fastv" in invoke("recipes")
    assert "GSAI-ML/LLaDA-V" in invoke("backbones")
    assert "intact" in invoke("verify", trace)


def test_a_trace_can_be_run_again_and_gives_the_same(quickstart: tuple[Path, str], tmp_path: Path) -> None:
    first = quickstart[0] / "quickstart.trace.h5"
    invoke("run", first, "--limit", "4", "--out", tmp_path, "--no-time")
    with open_trace(first) as a, open_trace(tmp_path / "quickstart.trace.h5") as b:
        timings = {"seconds", "seconds_total", "seconds_unrecorded", "flops_unrecorded", "peak_memory"}
        for name in set(a.variables) - timings:
            np.testing.assert_array_equal(a.array(name), b.array(name), err_msg=name)


def test_resuming_ends_where_an_uninterrupted_run_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from probe import runner

    plain = runner._one_sample

    def dies(*args: object, **kwargs: object) -> object:
        if args[3] == 2:
            raise KeyboardInterrupt
        return plain(*args, **kwargs)  # type: ignore[arg-type]

    words = ("run", "prune/random", "--data", "world/short", "--limit", "4", "--no-time", "--out")
    monkeypatch.setattr(runner, "_one_sample", dies)
    result = CliRunner().invoke(app, [*words, str(tmp_path / "halves")])
    assert result.exit_code != 0
    monkeypatch.setattr(runner, "_one_sample", plain)
    invoke(*words, tmp_path / "halves", "--resume")
    invoke(*words, tmp_path / "whole")
    with (
        open_trace(tmp_path / "halves" / "random.trace.h5") as a,
        open_trace(tmp_path / "whole" / "random.trace.h5") as b,
    ):
        assert a.array("sample").tolist() == b.array("sample").tolist() == [0, 1, 2, 3]
        for name in ("token", "confidence", "visual_kept", "prediction", "score"):
            np.testing.assert_array_equal(a.array(name), b.array(name), err_msg=name)


def test_shards_joined_are_the_whole(tmp_path: Path) -> None:
    words = ("run", "prune/fastv", "--data", "world/mixed", "--limit", "5", "--no-time", "--out", tmp_path)
    for i in (1, 0):
        invoke(*words, "--shard", f"{i}/2")
    invoke(*words)
    shards = [tmp_path / f"fastv.shard{i}of2.trace.h5" for i in range(2)]
    invoke("merge", *shards, "-o", tmp_path / "joined.trace.h5")
    with open_trace(tmp_path / "joined.trace.h5") as joined, open_trace(tmp_path / "fastv.trace.h5") as whole:
        assert joined.array("sample").tolist() == [0, 1, 2, 3, 4]
        for name in ("prediction", "score", "token", "confidence", "visual_kept", "flops_total"):
            np.testing.assert_array_equal(joined.array(name), whole.array(name), err_msg=name)


def test_a_picture_and_a_question_of_ones_own(tmp_path: Path) -> None:
    Image.effect_noise((320, 200), 80).save(tmp_path / "cat.png")
    said = invoke(
        "run", "quickstart", "--image", tmp_path / "cat.png", "--ask", "What colour is the cat?", "--out", tmp_path
    )
    assert "trace:" in said
    with open_trace(tmp_path / "quickstart.trace.h5") as trace:
        assert str(trace.array("question")[0]) == "What colour is the cat?"
        assert np.isnan(trace.array("score")[0])


def test_ones_own_data_goes_on_after_a_damaged_picture(tmp_path: Path) -> None:
    Image.new("RGB", (96, 96), "red").save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    rows = [{"image": f"{name}.png", "question": "What colour?", "answer": "red"} for name in ("good", "bad", "good")]
    (tmp_path / "my.jsonl").write_text("\n".join(json.dumps(r) for r in rows), encoding="utf-8")
    words = ["run", "prune/divprune", "--data", str(tmp_path / "my.jsonl"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 1
    assert "1 of 3 samples failed" in result.output
    with open_trace(tmp_path / "out" / "divprune.trace.h5") as trace:
        assert [bool(f) for f in trace.array("failed")] == [False, True, False]
        assert "bad.png" in str(trace.array("failed")[1])


FRAGMENTS = [info.name for info in shipped_recipes() if info.name.startswith("decode/")]
"""Settings for other recipes to include, some for one kind of model; they have tests of their own."""
ASKING_THE_TEXT = [info.name for info in shipped_recipes() if "text_image" in info.path.read_text()]


def test_a_recipe_without_its_weights_says_so(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["run", "prune/dyvte", "--limit", "1", "--out", str(tmp_path)])
    assert done.exit_code != 0


@pytest.mark.parametrize("name", ASKING_THE_TEXT)
def test_recipes_that_need_a_text_tower_say_so(name: str) -> None:
    with pytest.raises(ProbeError, match="comes with no text tower"):
        CliRunner().invoke(app, ["run", name, "--limit", "1"], catch_exceptions=False)


ELSEWHERE = [*ASKING_THE_TEXT, *FRAGMENTS, "prune/dyvte"]


@pytest.mark.parametrize("name", [i.name for i in shipped_recipes() if i.name not in ELSEWHERE])
def test_every_shipped_recipe_runs(name: str, tmp_path: Path) -> None:
    cache = ["--set", "generate.cache=prefix"] if name.endswith("_lavida") else []
    invoke("run", name, "--limit", "2", "--out", tmp_path, "--no-time", "--data", "world/short", *cache)
    assert list(tmp_path.glob("*.trace.h5"))


WRONG = {
    "a misspelt recipe": (["run", "prune/fastvv"], "fastv"),
    "a misspelt dial": (["run", "prune/fastv", "--set", "kepe=0.5"], "keep"),
    "a misspelt setting": (["run", "prune/fastv", "--set", "generate.step=4"], "steps"),
    "a layer that does not exist": (["run", "prune/fastv", "--set", "layer=99"], "0..5"),
    "a share beyond one": (["run", "prune/fastv", "--set", "keep=1.5"], "1.5"),
    "a picture that is not there": (["run", "quickstart", "--image", "nowhere.png", "--ask", "what?"], "nowhere.png"),
    "a picture without a question": (["run", "quickstart", "--image", "nowhere.png"], "--ask"),
    "a folder that is no checkpoint": (["run", "quickstart", "--backbone", str(ROOT / "docs")], "config.json"),
    "a backbone nobody knows": (["check", "quickstart", "--backbone", "miniatur"], "miniature"),
    "a task nobody knows": (["run", "quickstart", "--data", "world/color"], "world/colour"),
    "a plugin that is not there": (["run", "quickstart", "--plugin", "nowhere.py"], "nowhere.py"),
    "a trace that is not there": (["show", "nowhere.h5"], "nowhere.h5"),
    "a size that is none": (["check", "quickstart", "--picture", "640"], "WIDTHxHEIGHT"),
    "a shard beyond the last": (["run", "quickstart", "--shard", "2/2"], "0 to N-1"),
    "a device that is not there": (["run", "quickstart", "--device", "gpu"], "cuda"),
    "steps that do not divide": (
        ["run", "quickstart", "--set", "generate.gen_length=8", "--set", "generate.block_length=3"],
        "multiple",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_things_end_in_one_message_and_status_2(wrong: str, tmp_path: Path) -> None:
    words, hint = WRONG[wrong]
    if words[0] == "run":
        words = [*words, "--out", str(tmp_path / "out")]
    if words[0] == "run" and "--limit" not in words:
        words = [*words, "--limit", "1"]
    with pytest.raises(ProbeError) as caught:
        CliRunner().invoke(app, words, catch_exceptions=False)
    assert hint in str(caught.value)
    assert not list(tmp_path.rglob("*.h5*")), "nothing half-written"


def test_the_process_prints_the_message_alone_and_exits_with_2(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "schema: 1\nname: mine\nprobes:\n- at: {site: layer.inptu, layer: 1}\n  do: drop\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "probe", "run", "mine.yaml"], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "mine.yaml:4" in done.stderr
    assert "layer.input" in done.stderr


def test_help_does_not_import_torch() -> None:
    code = "import sys; from probe.__main__ import load_cli; load_cli(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_run_without_a_baseline_claims_no_agreement(tmp_path: Path) -> None:
    words = ("run", "prune/random", "--data", "world/short", "--limit", "2", "--no-baseline", "--out", tmp_path)
    (line,) = [row.split() for row in invoke(*words).splitlines() if row.startswith("random ")]
    assert line[3] == "-", "there is nothing to agree with"
