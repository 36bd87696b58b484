"""What lmms-eval makes of a finished trace: its own numbers, by letting it score the answers that are there already."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from probe.data.harness import harness, reply, task_manager
from probe.recipe import Recipe
from probe.study.finished import totals_file
from probe.trace import open_trace

MME = ("mme_perception_score", "mme_cognition_score")


def score(trace: Path, recipe: Recipe) -> dict[str, dict[str, float]]:
    """The harness's numbers of a trace, by task and metric; written beside it as well (`totals_file`).

    An answer that failed counts as an empty one, as the harness has no other word for it.
    """
    from probe.lmms_adapter import Replay

    name = str(recipe.data.lmms_eval)
    with open_trace(trace) as opened:
        ids, texts = opened.array("sample_id").tolist(), opened.array("prediction").tolist()
        backbone = opened.header.backbone
    answers = {key: reply(text, backbone) for key, text in zip(ids, texts, strict=True)}
    with harness(name):
        from lmms_eval.evaluator import simple_evaluate

        results = simple_evaluate(
            model=Replay(answers),
            tasks=[name],
            task_manager=task_manager(recipe.data.include_path),
            limit=recipe.data.limit,
            batch_size=1,
            bootstrap_iters=0,
            verbosity="ERROR",
        )
        numbers = {task: plain(found) for task, found in results["results"].items()}
        for task, sizes in results.get("n-samples", {}).items():
            numbers.setdefault(task, {})["n"] = float(sizes["effective"])
    told = {"lmms_eval": version("lmms-eval"), "task": name, "results": numbers}
    totals_file(trace).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return numbers


def plain(found: Mapping[str, Any]) -> dict[str, float]:
    """A task's numbers by metric, without filters, errors and labels; MME's two also as their sum, `mme_total`."""
    out: dict[str, float] = {}
    for key, value in found.items():
        metric = key.split(",")[0]
        number = isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
        if number and "stderr" not in metric and "," in key:
            out[metric] = float(value)
    if all(metric in out for metric in MME):
        out["mme_total"] = sum(out[metric] for metric in MME)
    return out


def note(label: str, numbers: Mapping[str, Mapping[str, float]]) -> str:
    """The harness's numbers in a line."""
    parts = [
        f"{task}: " + ", ".join(f"{metric} {value:.4g}" for metric, value in found.items() if metric != "n")
        for task, found in numbers.items()
        if found.keys() - {"n"}
    ]
    return f"lmms-eval {version('lmms-eval')} on {label}: {'; '.join(parts)}"
