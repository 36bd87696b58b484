"""Parity tests take their cases from files: expectations that the original systems produced.

The environment variable PROBE_FIXTURES names the folder (default: `tests/fixtures`); each of its subfolders is
a *set*, described by its own README. A test says which set it reads and how to find cases in it:

    @pytest.mark.cases("llada_v", find)     # find(folder of the set) yields (id, anything) pairs
    def test_logits(case): ...

A set that is not there skips the test. A set that is there but yields no case fails it, unless the mark says
`optional=True` (the test reads keys that a set may leave out). Every test's id begins with its set's name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

Finder = Callable[[Path], Iterable[tuple[str, Any]]]


@dataclass(frozen=True)
class NoCases:
    """Stands in for the cases of a test whose set yields none."""

    reason: str
    skip: bool


def fixture_root() -> Path:
    """The folder that holds the sets."""
    default = Path(__file__).resolve().parent.parent / "fixtures"
    return Path(os.environ.get("PROBE_FIXTURES") or default).expanduser().resolve()


def find_cases(name: str, find: Finder, optional: bool = False) -> list[tuple[str, Any]]:
    """The cases of one set as `(id, case)`, or a single `NoCases`."""
    folder = fixture_root() / name
    if not folder.is_dir():
        return [(f"{name}-absent", NoCases(f"no fixture set {name} in {fixture_root()}", True))]
    found = [(f"{name}-{key}", case) for key, case in find(folder)]
    return found or [(f"{name}-empty", NoCases(f"{folder} is there but holds no case for this test", optional))]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cases(set, find, optional=False): run once per case found in a fixture set")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("cases")
    if marker is not None:
        found = find_cases(*marker.args, **marker.kwargs)
        metafunc.parametrize("case", [c for _, c in found], ids=[i for i, _ in found], indirect=True)


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Any:
    """One case of the set that the test's `cases` mark names."""
    value = request.param
    if isinstance(value, NoCases) and value.skip:
        pytest.skip(value.reason)
    return value


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> None:
    """Fail in the place of a test that has nothing to run on (in a fixture it would count as an error)."""
    value = pyfuncitem.funcargs.get("case")
    if isinstance(value, NoCases):
        pytest.fail(value.reason, pytrace=False)
