"""`probe new`: what it writes runs, and so does the test that it writes."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from probe.errors import ProbeError
from probe.trace import open_trace


def test_the_recipe_runs_as_it_is(probe_command: Callable[..., str]) -> None:
    assert "my-first.yaml" in probe_command("new", "my-first")
    assert Path("my-first.yaml").read_text().count("#") > 8
    assert "intervenes" in probe_command("check", "my-first.yaml")
    probe_command(
        "run", "my-first.yaml", "--limit", "1", "-o", "out", "-s", "generate.gen_length=4", "-s", "generate.steps=2"
    )
    with open_trace(Path("out/my-first.trace.h5")) as trace:
        assert trace.row("visual_tokens", 0)[:, 2:].max() == 48
        assert "attention_mass" in trace.variables


def test_the_plugin_is_used_and_its_test_passes(probe_command: Callable[..., str], tmp_path: Path) -> None:
    probe_command("new", "my-own", "--plugin", "-o", "there")
    names = {p.name for p in Path("there").iterdir()}
    assert names == {"my-own.yaml", "my_own.py", "test_my_own.py"}
    test = runpy.run_path("there/test_my_own.py")
    test["test_a_token_far_from_the_others_is_worth_most"]()
    test["test_the_recipe_keeps_as_many_tokens_as_it_says"](tmp_path / "out")


def test_the_written_test_can_fail(probe_command: Callable[..., str], tmp_path: Path) -> None:
    probe_command("new", "own", "--plugin")
    Path("own.py").write_text(Path("own.py").read_text().replace("return away", "return -away"))
    test = runpy.run_path("test_own.py")
    with pytest.raises(AssertionError):
        test["test_a_token_far_from_the_others_is_worth_most"]()


def test_names_that_do_not_fit_are_refused(probe_command: Callable[..., str]) -> None:
    probe_command("new", "mine")
    for words, said in (
        (("mine",), "there already"),
        (("a b",), "cannot name a recipe"),
        (("../up",), "cannot name a recipe"),
        (("attention", "--plugin"), "that name is taken"),
        (("class", "--plugin"), "cannot be called `class`"),
    ):
        with pytest.raises(ProbeError, match=said):
            probe_command("new", *words)
    assert {p.name for p in Path().iterdir()} == {"mine.yaml"}
