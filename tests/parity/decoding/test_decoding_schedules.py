"""Budgets and decisions that need no logits, of every table that `schedules.json` holds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from probe.decoding import dllm_cache, dpad, prophet, schedule

Tensors = dict[str, Tensor]


def check_linear(row: Any, tensors: Tensors) -> None:
    masks, steps, want = row
    if isinstance(masks, int):
        masks, want = [masks], [want]
    assert [schedule.linear(m, steps) for m in masks] == want


def check_lavida(row: Any, tensors: Tensors) -> None:
    name, shift, masks, steps, want = row
    settings = {} if shift is None else {"shift": shift}
    assert schedule.lavida(masks, steps, name, **settings) == want


def check_dllm(row: Any, tensors: Tensors) -> None:
    alpha, masks, steps, want = row
    assert schedule.dllm(masks, steps, alpha) == want


def check_dream(row: Any, tensors: Tensors) -> None:
    masks, steps, eps, want = row
    assert schedule.dream(masks, steps, eps) == want


def check_dimple(row: Any, tensors: Tensors) -> None:
    masks, steps, eps, want = row
    assert schedule.dimple(masks, steps, eps) == want


def check_lavida_dream(row: Any, tensors: Tensors) -> None:
    """A route is `steps`, `step_ratio`, or `step_ratio` plus a schedule with an optional number."""
    length, wanted, route, prefix_lm, want = row
    found = re.fullmatch(r"(steps|step_ratio)(?:\+([a-z_]+?)_?([\d.]+)?)?", route)
    assert found, f"a route that no rule here reads: {route}"
    way, curve, number = found.groups()
    settings: dict[str, Any] = {"schedule": curve} if curve else {}
    if number:
        settings["shift"] = float(number)
    if way == "steps":
        got = schedule.lavida_dream(length, wanted, prefix_lm=prefix_lm, **settings)
    else:
        got = schedule.lavida_dream(length, length, step_ratio=wanted / length, prefix_lm=prefix_lm, **settings)
    assert got == want


def check_prophet(row: Any, tensors: Tensors) -> None:
    step, planned, gap, want = row
    assert prophet.should_exit(step, planned, gap) is want


def check_refresh(row: Any, tensors: Tensors) -> None:
    prompt, answer, want = row
    assert [list(map(int, dllm_cache.refreshes(step, prompt, answer))) for step in range(1, len(want) + 1)] == want


def check_dpad(row: Any, tensors: Tensors) -> None:
    chance = dpad.density(row["sigma"], row["scale"], row["window"], row["gen_length"])
    torch.testing.assert_close(chance, tensors[row["pdf"]], atol=1e-5, rtol=0)
    uniform = tensors[row["uniform"]]
    assert len(uniform) == row["suffix_len"]
    assert dpad.kept(chance, uniform, row["suffix_first"]) == row["kept"]


CHECKS: dict[str, Callable[[Any, Tensors], None]] = {
    "llada_linear": check_linear,
    "lavida": check_lavida,
    "dllm": check_dllm,
    "dream_counts": check_dream,
    "dimple_dim_counts": check_dimple,
    "lavida_dream_counts": check_lavida_dream,
    "prophet_should_exit": check_prophet,
    "dllm_cache_refresh": check_refresh,
    "dpad_suffix": check_dpad,
}


def tables(root: Path) -> Iterator[tuple[str, Any]]:
    """Every table: its name, all of its rows, and the tensors that rows may name."""
    if (root / "schedules.json").is_file():
        tensors = load_file(root / "selections.safetensors") if (root / "selections.safetensors").is_file() else {}
        for name, table in json.loads((root / "schedules.json").read_text(encoding="utf-8")).items():
            for key, rows in table.items():
                if isinstance(rows, list) and not key.endswith("columns"):
                    yield f"{name}-{key}", (name, rows, tensors)


@pytest.mark.cases("decoding", tables)
def test_schedule(case: Any) -> None:
    name, rows, tensors = case
    assert rows
    for row in rows:
        CHECKS[name](row, tensors)
