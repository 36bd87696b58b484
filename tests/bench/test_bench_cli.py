"""`probe bench` on the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from probe.__main__ import load_cli
from probe.bench.suite import ROWS

TOY = ["--layers", "4", "--width", "64", "--tokens", "48", "--answer", "8", "--steps", "2", "--repeats", "1"]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_rows_at_a_toy_size_and_what_is_written(tmp_path: Path) -> None:
    words = ["--rows", "loop,recording", *TOY, "--threads", "1", "--device", "cpu", "-o", str(tmp_path / "table")]
    done = CliRunner().invoke(load_cli().app, ["bench", *words], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert done.output.count("outputs equal: yes") == 2
    written = json.loads((tmp_path / "table.json").read_text())
    assert {line["row"] for line in written["lines"]} == {"loop", "recording"}
    assert all(line["target"] and line["equal"] and line["value"]["median"] > 0 for line in written["lines"])
    assert written["conditions"]["threads"].startswith("1 of")
    page = (tmp_path / "table.md").read_text()
    assert "| loop |" in page and "≤ 1.010x" in page and "4 x 64" in page


def test_the_list_names_every_row_with_target_and_command() -> None:
    done = CliRunner().invoke(load_cli().app, ["bench", "--list"])
    assert done.exit_code == 0
    for row in ROWS:
        assert row.name in done.output and all(target in done.output for target in row.targets)
    assert "--backbone GSAI-ML/LLaDA-V --random-weights" in done.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rows", "lop"], "loop"),
        (["--random-weights"], "--backbone"),
        (["--width", "100"], "multiple"),
        (["--dtype", "int8"], "float32"),
        (["--backbone", "miniature", "--rows", "startup"], "no backbone"),
        (["--backbone", "miniature", "--layers", "2"], "--random-weights"),
    ],
)
def test_what_does_not_go_together_is_said(words: list[str], said: str) -> None:
    done = CliRunner().invoke(load_cli().app, ["bench", *words])
    assert done.exception is not None and said in str(done.exception)
