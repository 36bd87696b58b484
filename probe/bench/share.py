"""Rows of a processor shared by processes with one thread each: what a row compares runs within one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

from probe.bench.line import Line
from probe.bench.suite import Row, chosen, measure

TOGETHER = (("speedup", "pruner"),)
"""Rows that have a measurement in common."""


def groups_of(rows: Sequence[Row]) -> list[list[str]]:
    """Names of rows that stay together, the groups that take longest first."""
    left = [row.name for row in rows]
    groups = [[name for name in left if name in some] for some in TOGETHER]
    return [g for g in groups if g] + [[name] for name in left if not any(name in some for some in TOGETHER)]


def measure_shared(
    rows: Sequence[Row],
    jobs: int,
    settings: Mapping[str, Any],
    *,
    steps: int | None = None,
    repeats: int | None = None,
    on_lines: Callable[[list[Line]], None] | None = None,
) -> list[Line]:
    """`suite.measure` in `jobs` processes, lines in the order of `rows`; `settings` are those of `prepared`."""
    found: dict[str, list[Line]] = {}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        running = [pool.submit(_measure, names, dict(settings), steps, repeats) for names in groups_of(rows)]
        try:
            for done in as_completed(running):
                for line in done.result():
                    found.setdefault(line.row, []).append(line)
                if on_lines is not None:
                    on_lines(_in_order(found, rows))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return _in_order(found, rows)


def _in_order(found: Mapping[str, list[Line]], rows: Sequence[Row]) -> list[Line]:
    return [line for row in rows for line in found.get(row.name, ())]


def _measure(names: list[str], settings: dict[str, Any], steps: int | None, repeats: int | None) -> list[Line]:
    """In a process of its own."""
    from probe.bench.settings import prepared

    bench = prepared(**settings | {"threads": 1})
    return measure(bench, chosen(names, settings.get("backbone")), steps=steps, repeats=repeats)
