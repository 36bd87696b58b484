"""Every step of the generations that the original made with its dLLM-Cache hooks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from test_llada_v_generate import check, decode, rule_of

from probe.decoding.dllm_cache import DllmCache


def cached_cases(root: Path) -> Iterator[tuple[str, Any]]:
    for folder in sorted(root.glob("*/dllm_cache")):
        table = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
        for case in table["cases"]:
            yield f"{folder.parent.name}-{case['name']}", (folder, table, case)


def settings(cache: dict[str, Any]) -> DllmCache:
    return DllmCache(
        prompt=cache.get("prompt_interval_steps", 1),
        answer=cache.get("gen_interval_steps", 1),
        ratio=cache.get("transfer_ratio", 0.0),
    )


@pytest.mark.cases("llada_v", cached_cases)
def test_generation_with_dllm_cache(case: Any, model_at: Any) -> None:
    folder, table, told = case
    file, _, name = table["prompt"].partition(":")
    model = model_at((folder / table["weights"]).resolve())
    prompt = model.without_pictures(load_file(folder / file)[name][0].tolist(), 0)
    rule = replace(rule_of(told["args"], model.special, {}), caching=settings(told["cache"]))
    steps, finished = decode(model, prompt, rule, told.get("manual_seed"))
    check(steps, finished, told, rule)
