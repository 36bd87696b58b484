"""The table of late pruning: whose runs belong together, and that its numbers are those of the comparison."""

from __future__ import annotations

import csv
import io
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1]))

from comparison_traces import MASK, One, write

from probe.__main__ import load_cli
from probe.compare import compare
from probe.errors import ProbeError
from probe.recipe import load_recipe
from probe.study.restoration import restoration
from probe.sweep_run import sweep
from probe.views.restoration_table import HEAD, to_csv, to_markdown

M, END = MASK, 1
FULL = [[5, M, M, M], [5, 6, M, M], [5, 6, 7, M], [5, 6, 7, END]]
WRONG = [*FULL[:2], [5, 6, 4, M], [5, 6, 4, END]]
EARLY = [[3, M, M, M], [3, 6, M, M], [3, 6, 4, M], [3, 6, 4, END]]


def recipe(name: str, **dials: str) -> str:
    """A recipe as a trace holds it, with an intervention unless it is the unpruned one."""
    said = ", ".join(f"{k}: {v}" for k, v in dials.items())
    dial = f"dial: {{{said}}}\n" if dials else ""
    edit = (
        "score: random, select: {top_k: {keep: $keep}}, do: drop" if "keep" in dials else "select: none, do: withdraw"
    )
    probe = f"  - {{at: {{site: before_lm, steps: {{from: $start}}}}, {edit}}}\n" if dials else "  []\n"
    return f"schema: 1\nname: {name}\n{dial}probes:\n{probe}"


def trace(path: Path, name: str, samples: dict[int, One], dials: dict[str, str] | None = None, **head: object) -> Path:
    text = recipe(name, **(dials or {}))
    return write(path, samples, name=name, text=text, extra={"end_tokens": "1"}, **head)  # type: ignore[arg-type]


def blind_from(cut: int) -> dict[str, np.ndarray]:
    counts = np.full((4, 2), 4)
    counts[cut:] = 0
    return {"visual_tokens": counts}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    late, zero = {"keep": "25%", "start": "50%"}, {"keep": "25%", "start": "0%"}
    trace(tmp_path / "a.trace.h5", "unpruned", {i: One(FULL) for i in range(4)})
    trace(tmp_path / "b.trace.h5", "random", {i: One(FULL if i else WRONG, 2, score=0.8) for i in range(4)}, late)
    trace(tmp_path / "c.trace.h5", "random", {i: One(EARLY, 0, score=0.2) for i in range(4)}, zero)
    blind = {i: One(WRONG, 2, more=blind_from(2), score=0.1) for i in range(4)}
    trace(tmp_path / "d.trace.h5", "blind", blind, {"start": "50%"})
    return tmp_path


def test_a_line_is_the_comparison_s(folder: Path) -> None:
    blind, late = restoration(sorted(folder.glob("*.h5")))
    assert (late.backbone, late.data, late.settings, late.pruner, late.start, late.n) == (
        "toy", "world/mixed", "", "random keep 25%", 0.5, 4,
    )  # fmt: skip
    assert (late.unpruned.value, late.zero, late.score.value) == (1, pytest.approx(0.2), pytest.approx(0.8))
    assert late.line == pytest.approx(0.5 + 0.5 * 0.2) and late.surplus.value == pytest.approx(0.2)
    content = late.shares["content"]
    # slots 0 and 1 before the cut, slot 2 is kept in three samples of four
    assert (content.slots, content.committed.value, content.kept.value) == (12, pytest.approx(2 / 3), 0.25)
    assert (content.lost.value, content.gain.value, content.context.value) == (pytest.approx(1 / 12), 0.25, 0.25)
    # slot 1 alone is right in the run from the first step on; here all but one of the 12
    assert (late.alike_zero["content"], late.alike["content"]) == (pytest.approx(1 / 3), pytest.approx(11 / 12))
    assert late.blind and blind.pruner == "blind" and math.isnan(blind.zero) and math.isnan(blind.surplus.value)
    (same,) = [c for c in compare(sorted(folder.glob("*.h5"))).committed if c.label == "B"]
    assert same.shares == late.shares


def test_the_table_says_it(folder: Path) -> None:
    text = to_markdown(restoration(folder.glob("*.h5")))
    heads = [cell.strip() for cell in text.splitlines()[2].strip("|").split("|")]
    assert heads == [head for head in HEAD if head != "settings"]
    line = next(row for row in text.splitlines() if "random" in row)
    cells = dict(zip(heads, (cell.strip() for cell in line.strip("|").split("|")), strict=True))
    told = {
        "s": "50%", "n": "4", "from 0": "20.0", "from s": "80.0", "line": "60.0", "slots 0": "33.3", "slots s": "91.7",
        "before cut": "66.7", "kept": "25.0", "lost": "8.3", "saved": "75.0",
    }  # fmt: skip
    assert {name: cells[name] for name in told} == told
    assert cells["surplus"].startswith("+20.0 [") and cells["gain"].startswith("+25.0 [")
    assert "25.0 [8.3, 33.3]" in to_markdown(restoration(folder.glob("*.h5")), intervals=True)
    rows = [r for r in csv.DictReader(io.StringIO(to_csv(restoration(folder.glob("*.h5"))))) if "random" in r["pruner"]]
    assert [(r["slots"], r["number"], r["kept"]) for r in rows] == [
        ("all", "16", "0.1875"), ("content", "12", "0.25"), ("end", "4", "0"),
    ]  # fmt: skip


def test_only_runs_that_answer_alike_are_compared(folder: Path) -> None:
    (folder / "d.trace.h5").unlink()
    (bare,) = restoration(folder.glob("*.h5"))
    assert not bare.blind and math.isnan(bare.shares["all"].kept.value)
    assert "there is no blind run" in to_markdown([bare])
    other = {i: One(WRONG, 2, more=blind_from(2)) for i in range(4)}
    trace(folder / "e.trace.h5", "blind", other, {"start": "50%"}, backbone="another")
    trace(folder / "f.trace.h5", "blind", other, {"start": "50%"}, seed=3)
    assert restoration(folder.glob("*.h5")) == [bare], "other weights, another seed: nothing unpruned beside them"
    trace(folder / "g.trace.h5", "unpruned", {i: One(FULL) for i in range(4)}, seed=3)
    assert [one.settings for one in restoration(folder.glob("*.h5"))] == ["", "seed 3"]
    (folder / "shard").mkdir()
    late = {"keep": "25%", "start": "50%"}
    trace(folder / "shard" / "b.trace.h5", "random", {0: One(FULL, 2)}, late)
    assert restoration(sorted(folder.rglob("*.h5")))[0] == bare, "a shard of the same run adds nothing"
    with pytest.raises(ProbeError, match="study/restoration"):
        restoration([folder / "a.trace.h5", folder / "c.trace.h5"])


def test_the_sweep_gives_the_table(tmp_path: Path) -> None:
    sets = ["sweep.backbones=miniature", "sweep.data=world/read_words", "sweep.set={generate.steps: [4]}",
            "generate.gen_length=8"]  # fmt: skip
    result = sweep(load_recipe("study/restoration", sets), limit=2, out=tmp_path)
    assert not result.failures and result.open == 0
    done = CliRunner().invoke(load_cli().app, ["tables", str(tmp_path), "--restoration"], catch_exceptions=False)
    assert done.exit_code == 0 and done.output.startswith("**miniature**\n")
    rows = [line for line in done.output.splitlines() if line.startswith("| world/read_words")]
    assert [row.split("|")[3].strip() for row in rows] == ["blind", "divprune keep 25%", "random keep 25%"]
    for words in (["--restoration"], [str(tmp_path), "--restoration", "--latex"]):
        with pytest.raises(ProbeError, match="wants a folder"):
            CliRunner().invoke(load_cli().app, ["tables", *words], catch_exceptions=False)
