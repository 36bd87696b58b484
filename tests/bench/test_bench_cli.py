"""`probe bench` on the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from probe.__main__ import load_cli
from probe.bench.settings import shared_by
from probe.bench.share import groups_of
from probe.bench.suite import ROWS, chosen
from probe.errors import ProbeError

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


def test_processes_share_the_rows_and_the_table_is_in_order(tmp_path: Path) -> None:
    words = ["--rows", "scaling,loop,writing", *TOY, "--jobs", "2", "--device", "cpu", "-o", str(tmp_path / "table")]
    done = CliRunner().invoke(load_cli().app, ["bench", *words], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / "table.json").read_text())
    assert list(dict.fromkeys(line["row"] for line in written["lines"])) == ["loop", "writing", "scaling"]
    assert written["conditions"]["threads"].startswith("1 of") and "2 processes" in written["conditions"]["threads"]


def test_rows_that_measure_in_common_stay_together() -> None:
    assert groups_of(chosen(["pruner", "loop", "speedup"], None)) == [["speedup", "pruner"], ["loop"]]
    assert groups_of(chosen(["pruner"], None)) == [["pruner"]]
    together = [name for group in groups_of(ROWS) for name in group]
    assert sorted(together) == sorted(row.name for row in ROWS)


def test_how_many_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert shared_by(None, None, quick=True, device="cpu") == 2
    assert shared_by(None, 1, quick=True, device="cpu") == shared_by(None, None, quick=False, device="cpu") == 1
    with pytest.raises(ProbeError, match="one thread each"):
        shared_by(2, 4, quick=False, device="cpu")
    monkeypatch.setattr("probe.bench.settings.pick_device", lambda name: "cuda")
    assert shared_by(None, None, quick=True, device="auto") == 1
    with pytest.raises(ProbeError, match="on a GPU"):
        shared_by(2, None, quick=False, device="auto")
