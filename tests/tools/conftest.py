"""Registries as they were before, a backbone to run, and the command line in process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from probe.__main__ import load_cli
from probe.backbones import load
from probe.backbones.base import Backbone
from probe.errors import ProbeError

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))


@pytest.fixture(scope="session")
def miniature() -> Backbone:
    return load("miniature")


@pytest.fixture
def own_registries() -> Iterator[None]:
    """What a test registers is gone afterwards."""
    from pages import fresh_registries

    with fresh_registries():
        yield


@pytest.fixture
def probe_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_registries: None) -> Callable[..., str]:
    """`probe_command("run", "fastv")` in an empty folder: what was printed. Errors are raised."""
    monkeypatch.chdir(tmp_path)
    cli = load_cli()
    monkeypatch.setattr(cli.out, "_width", 100)

    def run(*words: Any) -> str:
        result = CliRunner().invoke(cli.app, [str(w) for w in words])
        if isinstance(result.exception, ProbeError):
            raise result.exception
        assert result.exit_code == 0, (result.output, result.exception)
        return result.output

    return run
