"""What is installed: pinned versions, few dependencies, and a wheel that works anywhere, with no network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = {
    re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower(): line.partition("==")[2].strip()
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if "==" in line
}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(wanted: list[Requirement]) -> set[str]:
    """Every package that is installed because of these, with the extras that they ask for."""
    found: set[str] = set()
    seen: set[tuple[str, str]] = set()
    queue = [(r, "") for r in wanted]
    while queue:
        requirement, parent_extra = queue.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": parent_extra}):
            continue
        name = canonical(requirement.name)
        for extra in ["", *requirement.extras]:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                own = requires(requirement.name) or []
            except ModuleNotFoundError:
                continue  # for another platform, or an extra that is not installed here
            found.add(name)
            queue += [(Requirement(text), extra) for text in own]
    return found - {"dmllm-probe"}


def test_everything_that_an_install_brings_is_pinned() -> None:
    needed = closure([Requirement(text) for text in PROJECT["dependencies"]])
    assert "torch" in needed and "click" in needed
    platform = re.compile(r"nvidia|cuda|triton|setuptools|pip$")  # torch's builds for GPUs bring what they need
    assert {n for n in needed if not platform.match(n)} <= PINS.keys()


def test_the_installed_versions_are_the_pinned_ones() -> None:
    if os.environ.get("CI") != "true":
        pytest.skip("elsewhere a developer may try other versions")
    installed = {canonical(d.metadata["Name"]): d.version for d in distributions()}
    wrong = {n: (installed[n], PINS[n]) for n in PINS if n in installed and installed[n].partition("+")[0] != PINS[n]}
    assert not wrong


def test_the_pins_satisfy_the_ranges_and_these_are_bounded_where_it_matters() -> None:
    for text in PROJECT["dependencies"]:
        requirement = Requirement(text)
        assert PINS[canonical(requirement.name)] in requirement.specifier, text
        assert any(s.operator in (">=", "==", "~=") for s in requirement.specifier), text
    assert len(PROJECT["dependencies"]) <= 16, "each one must earn its place: see docs/architecture.md"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    skip = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".*_cache", "tests", "shared")
    shutil.copytree(ROOT, source, ignore=skip)
    words = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(source)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode and re.search("hatchling|connection|resolve", done.stderr, re.IGNORECASE):
        pytest.skip(f"the build's own requirement cannot be had here: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr
    (found,) = folder.glob("*.whl")
    return found


QUICK = ["run", "quickstart", "--limit", "2", "--no-time", "--out", "out"]


def run_elsewhere(python: str, site: Path | None, folder: Path) -> None:
    """Run the installed command in a folder of its own, without a network where that can be had."""
    offline = (
        ["unshare", "-n"] if subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode == 0 else []
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PROBE"))}
    environment |= {"OMP_NUM_THREADS": "1", "COLUMNS": "300", "HF_HUB_OFFLINE": "1", "HOME": str(folder)}
    if site is not None:
        environment["PYTHONPATH"] = str(site)
    for words in (QUICK, ["verify", "out/quickstart.trace.h5"], ["check", "prune/fastv"], ["recipes"]):
        done = subprocess.run(
            [*offline, python, "-m", "probe", *words], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, (words, done.stderr)
    where = subprocess.run(
        [python, "-c", "import probe; print(probe.__file__)"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    ).stdout
    assert str(ROOT) not in where


@pytest.mark.slow
def test_the_wheel_works_from_another_folder_without_a_network(wheel: Path, tmp_path: Path) -> None:
    """Its files beside the packages of this environment, and the checkout out of sight."""
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(site)
        names = packed.namelist()
    assert "probe/_cli.py" in names and "probe/recipes/quickstart.yaml" in names
    assert any(n.endswith("model.safetensors") for n in names) and not any(
        n.startswith(("tests/", "cli")) for n in names
    )
    assert sum(f.file_size for f in zipfile.ZipFile(wheel).infolist()) < 30 << 20
    (tmp_path / "here").mkdir()
    run_elsewhere(sys.executable, site, tmp_path / "here")


@pytest.mark.slow
@pytest.mark.parametrize("variable", ["PROBE_PYTHON_311", "PROBE_PYTHON_312", "PROBE_PYTHON_313"])
def test_an_environment_of_another_python(wheel: Path, tmp_path: Path, variable: str) -> None:
    """PROBE_PYTHON_312 and so on name interpreters of environments with the dependencies; see docs/reliability.md."""
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"{variable} names no interpreter")
    version = subprocess.run([python, "-V"], capture_output=True, text=True).stdout
    assert version.replace(".", "").startswith(f"Python {variable[-3:]}")
    done = subprocess.run(
        [python, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", str(wheel)], capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run_elsewhere(python, None, tmp_path)
