"""Cases of the `metrics` set: what a model wrote, what was right, and the score that the harness gave."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

File = dict[str, Any]


def read(folder: Path, metric: str) -> File | None:
    """One metric's file, or None where the set has none."""
    path = folder / f"{metric}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def cases(*metrics: str) -> Callable[[Path], Iterator[tuple[str, Any]]]:
    """A finder of the single cases of some metrics: (metric, file, case)."""

    def find(folder: Path) -> Iterator[tuple[str, Any]]:
        for metric in metrics:
            file = read(folder, metric)
            for case in file["cases"] if file else ():
                name = case["id"] if case["id"].startswith(metric) else f"{metric}-{case['id']}"
                yield name, (metric, file, case)

    return find


def files(*metrics: str) -> Callable[[Path], Iterator[tuple[str, File]]]:
    """A finder of whole files."""

    def find(folder: Path) -> Iterator[tuple[str, File]]:
        for metric in metrics:
            file = read(folder, metric)
            if file and file["cases"]:
                yield metric, file

    return find


def answers_of(case: dict[str, Any]) -> list[str]:
    """The references: as given, or the letter of the right choice."""
    return case["answers"] if "answers" in case else ["ABCDEFGHIJKLMNOPQRSTUVWXYZ"[case["answer_index"]]]
