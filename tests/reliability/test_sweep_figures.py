"""What a finished sweep leaves beside its traces."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli import app

SWEEP = """
schema: 1
name: small
data: {limit: 2, task: world/short}
trace: {pictures: false}
sweep:
  recipes:
    - {recipe: prune/random, dial: {keep: 25%, start: [0%, 50%]}}
probes:
  - {name: a, at: {site: layer.attention, layers: all}, record: [attention_mass]}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "small.yaml").write_text(SWEEP)
    done = CliRunner().invoke(app, ["sweep", str(folder / "small.yaml"), "--out", str(folder / "out")])
    assert done.exit_code == 0, done.output
    return folder, " ".join(done.output.split())


def test_tables_and_figures_are_there(finished: tuple[Path, str]) -> None:
    folder, said = finished
    title = "miniature-world-short"
    figures = {f"{n}-{title}.png" for n in ("tradeoff", "attention_mass", "confidence")} | {"late_pruning.png"}
    assert {path.name for path in (folder / "out").glob("*.png")} == figures
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (folder / "out").glob("*.png"))
    study = (folder / "out" / "study.md").read_text()
    assert "pruned from the first step" in study and "pruned after a share of the steps" in study
    assert all(name in said for name in ("study.md", *figures))


def test_without_matplotlib_the_tables_come_and_a_note_says_what_to_install(
    finished: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = finished
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    for path in (folder / "out").glob("*.png"):
        path.unlink()
    done = CliRunner().invoke(app, ["sweep", str(folder / "small.yaml"), "--out", str(folder / "out")])
    assert done.exit_code == 0
    assert "pip install 'dmllm-probe[plot]'" in " ".join(done.output.split())
    assert not list((folder / "out").glob("*.png")) and (folder / "out" / "table.md").exists()


def test_figures_can_be_left_out(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    for path in (folder / "out").glob("*.png"):
        path.unlink()
    words = ["sweep", str(folder / "small.yaml"), "--out", str(folder / "out"), "--no-figures"]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert not list((folder / "out").glob("*.png"))
