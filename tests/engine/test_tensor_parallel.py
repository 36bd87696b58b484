"""Heads split over processes: answers, signals and what is pruned are those of the whole model, in every process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from probe.backbones import load
from probe.backbones.tiny import tiny_names, write_tiny
from probe.errors import ProbeError

NATIVE = [name for name in tiny_names() if name.startswith(("llava-hf/", "Qwen/"))]
PROCESSES = 2

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs gloo"
)


def in_parallel(folder: Path, edits: str) -> list[dict[str, Any]]:
    """What every process of a torchrun says of every intervention and cache."""
    here = Path(__file__).parent
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(PROCESSES), "--master-port",
            str(port), here / "run_in_parallel.py", edits, folder,
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(here), *sys.path]), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def nothing_is_off(found: list[dict[str, Any]]) -> None:
    """Up to the rounding of sums that are taken part by part, in float64; what is recorded is float32."""
    assert {line["rank"] for line in found} == set(range(PROCESSES))
    assert [line for line in found if line["off"] > 1e-6] == []


def test_one_of_each_kind(tmp_path: Path) -> None:
    nothing_is_off(in_parallel(write_tiny(NATIVE[-1], tmp_path / "it"), "fastv,evict"))


@pytest.mark.slow
@pytest.mark.parametrize("name", NATIVE)
def test_every_edit(name: str, tmp_path: Path) -> None:
    nothing_is_off(in_parallel(write_tiny(name, tmp_path / "it"), "all"))


@pytest.mark.parametrize("name", tiny_names())
def test_where_it_cannot_be(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tiny(name, tmp_path / "it")
    said = "torchrun --nproc-per-node N" if name in NATIVE else "not one of transformers' own classes.*device_map"
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ProbeError, match=said):
        load(folder, tp_plan="auto")


@pytest.mark.parametrize(
    ("options", "processes", "said"),
    [
        ({"tp_plan": "mine"}, 2, "tp_plan='mine'; known: auto"),
        ({"tp_plan": "auto", "device_map": "cpu"}, 2, "give one of them"),
        ({"tp_plan": "auto"}, 3, "3 processes cannot share [0-9]+ num_"),
    ],
)
def test_settings_that_do_not_go_together(
    options: dict[str, Any], processes: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tiny(NATIVE[0], tmp_path / "it")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    if "device_map" in options:
        pytest.importorskip("accelerate")
    with pytest.raises(ProbeError, match=said):
        load(folder, **options)
