"""The study's printed numbers and settings, from the files in `probe/study/printed`."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "printed"
TABLES: Mapping[str, str] = {"LLaDA-V": "table1_llada_v.csv", "LaViDa-Dream": "table2_lavida_dream.csv"}
"""The study's backbones, and the file of each with scores by retention."""
BENCHMARKS: Mapping[str, tuple[str, ...]] = {
    "MME": ("mme",),
    "SQA": ("scienceqa_img",),
    "GQA": ("gqa",),
    "POPE": ("pope", "pope_full"),
    "MMB": ("mmbench_en_dev_static", "mmbench_en_dev"),
    "TVQA": ("textvqa_val",),
    "CQA": ("chartqa",),
    "MMMUP": ("mmmu_pro_vision",),
    "IVQA": ("infovqa_val", "infovqa_val_llada_v"),
    "DVQA": ("docvqa_val", "docvqa_val_llada_v"),
    "VMME": ("videomme",),
    "VDC": ("video_dc499",),
}
"""The study's abbreviations, and the names of the benchmarks' tasks in lmms-eval (and of our variants)."""
METHODS = ("none", "ToMe", "FastV", "TRIM", "SparseVLM", "DivPrune", "VTW")
"""The study's rows, in its order."""
AVERAGE = "Avg"


@dataclass(frozen=True)
class Printed:
    """One printed number. `start` is the percentage of the steps before pruning, 0 in the first two tables."""

    backbone: str
    method: str
    retention: float
    benchmark: str
    start: float
    score: float


def _rows(name: str) -> list[dict[str, str]]:
    with (FOLDER / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@cache
def by_retention(backbone: str) -> tuple[Printed, ...]:
    """Table 1 (LLaDA-V) or 2 (LaViDa-Dream): pruned from the first step. `Avg` is among the benchmarks."""
    return tuple(
        Printed(backbone, row["method"], float(row["retention_percent"]), name, 0.0, float(value))
        for row in _rows(TABLES[backbone])
        for name, value in row.items()
        if name not in ("method", "retention_percent")
    )


@cache
def by_start(backbone: str) -> tuple[Printed, ...]:
    """Table 3: pruned from a later step on. The unpruned row has the start 0."""
    return tuple(
        Printed(
            row["backbone"],
            row["method"],
            float(row["retention_percent"]),
            row["benchmark"],
            float(row["start_percent"] or 0),
            float(row["score"]),
        )
        for row in _rows("table3_start.csv")
        if row["backbone"] == backbone
    )


@cache
def times(backbone: str) -> Mapping[str, str]:
    """The unpruned backbone's total time by benchmark, as printed (m:ss or h:mm:ss)."""
    return {row["benchmark"]: row["total_time"] for row in _rows("times.csv") if row["backbone"] == backbone}


def benchmark_of(task: str) -> str | None:
    """The study's abbreviation of a task, or None where the study has not measured it."""
    return next((short for short, names in BENCHMARKS.items() if task in names or task == short), None)


def method_of(recipe: str) -> str:
    """The study's name of a recipe's method (`study/study_fastv_lavida` is FastV), else the recipe's own name."""
    words = recipe.rsplit("/", 1)[-1].removeprefix("study_").split("_")
    kept = [word for word in words if word not in ("late", "lavida")]
    known = {name.casefold(): name for name in METHODS}
    return known.get("_".join(kept).casefold(), recipe)


def backbone_of(name: str) -> str:
    """Which of the study's backbones a backbone stands beside: those made from autoregressive models beside LaViDa."""
    return "LaViDa-Dream" if any(word in name.casefold() for word in ("lavida", "dream", "adapted")) else "LLaDA-V"


@dataclass(frozen=True)
class Generation:
    """The study's generation settings of one benchmark: answer length and block length in tokens, denoising steps."""

    gen_length: int
    block_length: int
    steps: int
    think: bool


def generation_of(backbone: str, task: str) -> Generation | None:
    """The settings that the study used for a benchmark on one of its backbones, None where it did not run that."""
    short = benchmark_of(task)
    for row in _rows("generation.csv"):
        if row["backbone"] == backbone and short in row["benchmarks"].split():
            gen, block, steps = (int(row[key]) for key in ("gen_length", "block_length", "gen_steps"))
            return Generation(gen, block, steps, row["think_mode"] == "think")
    return None
