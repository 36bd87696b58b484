"""The commands behind the results: every sweep can be planned as it is written, every training begins."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from probe.__main__ import load_cli
from probe.backbones.checkpoint import EMBEDDED
from probe.zoo.train import main as train

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "results.md").read_text()
COMMANDS = re.findall(r"^ {4,}((?:probe|python) .+)$", PAGE, flags=re.MULTILINE)
SWEEPS = [c for c in COMMANDS if c.startswith("probe sweep")]
TRAININGS = [c for c in COMMANDS if c.startswith("python -m probe.zoo.train")]
OUTS = [shlex.split(c)[shlex.split(c).index("--out") + 1] for c in TRAININGS]


def test_the_page_has_its_commands() -> None:
    assert len(SWEEPS) >= 6 and len(TRAININGS) == 7
    assert all(c in SWEEPS + TRAININGS or c.startswith("probe tables") for c in COMMANDS)


@pytest.mark.parametrize("command", SWEEPS)
def test_a_sweep_can_be_planned(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in OUTS:  # the trained models, each of its kind
        kind = "miniature" if name.startswith("scratch") else "miniature-adapted"
        (tmp_path / name).symlink_to(EMBEDDED[kind], target_is_directory=True)
    done = CliRunner().invoke(load_cli().app, [*shlex.split(command)[1:], "--plan"])
    assert done.exit_code == 0, done.output
    assert re.search(r"\d+ runs in runs/", done.output)


@pytest.mark.slow
def test_the_trainings_run_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "probe" / "zoo").mkdir(parents=True)
    train(
        ["--out", "probe/zoo/llava_next_mini", "--kind", "autoregressive", "--smoke", "--steps", "4", "--evaluate", "1"]
    )
    for command in TRAININGS:
        train([*shlex.split(command)[3:], "--smoke", "--steps", "4", "--evaluate", "1"])
    assert all((tmp_path / name / "model.safetensors").exists() for name in OUTS)
