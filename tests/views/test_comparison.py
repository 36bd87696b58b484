"""What `probe compare` prints fits a terminal, explains itself, and says the right numbers."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))

from comparison_traces import MASK, One, write

from probe.__main__ import main
from probe.compare import Comparison, compare
from probe.views.comparison import render_comparison, to_csv, to_json

M = MASK
FULL = [[5, M, M, M], [5, 6, M, M], [5, 6, 7, M], [5, 6, 7, 8]]
WRONG = [[5, M, M, M], [5, 6, M, M], [5, 6, 7, M], [5, 6, 7, 1]]


def shown(comparison: Comparison, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), no_color=True)
    console.print(render_comparison(comparison))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert all(len(line) <= width for line in lines)
    return "\n".join(line.rstrip() for line in lines)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    folder = tmp_path_factory.mktemp("compare")
    kl = np.full((4, 4), 0.25)
    kl[2:, 2:] = 1.0
    kl[3, 3] = 0.5
    late = {i: One(WRONG, 2, "a c", 0.5, flops=50, kl=kl.tolist()) for i in range(4)}
    zero = {i: One([[1] * 4], 0, "x", 0.0, flops=30) for i in range(4)}
    return compare([
        write(folder / "base.trace.h5", {i: One(FULL) for i in range(4)}, name="r/baseline"),
        write(folder / "late.trace.h5", late, start="50%"),
        write(folder / "zero.trace.h5", zero, start="0%"),
    ])  # fmt: skip


def row(text: str, table: str, label: str) -> list[str]:
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(table))
    return next(line.split() for line in lines[start:] if line.startswith(label))


def test_the_tables_say_the_numbers(three: Comparison) -> None:
    text = shown(three)
    assert "2 runs against A, paired over 4 samples" in text
    assert row(text, "answers", "B") == [
        "B",
        "0.500",
        "-0.500",
        "-0.50",
        "to",
        "-0.50",
        "0.500",
        "0.50",
        "to",
        "0.50",
        "25.0%",
    ]
    assert row(text, "cost", "B") == ["B", "75.0%", "50.0%", "50", "0.50x", "2.000", "1.00x"]
    # every slot has a KL at step 2: .25, .25, 1, 1; last seen with .25, .25, 1, .5
    assert row(text, "information", "B")[:7] == ["B", "4", "0.625", "0.62", "to", "0.62", "0.500"]
    assert row(text, "answer slots", "B") == ["B", "4", "50.0%", "50%", "to", "50%", "0", "of", "4"]
    assert row(text, "late start", "B after C") == [
        "B", "after", "C", "50%", "0.500", "0.500", "0.500", "+0.000", "+0.00", "to", "+0.00", "50%", "100%"
    ]  # fmt: skip
    assert row(text, "B by step", "+1")[:4] == ["+1", "4", "25.0%", "-"]
    assert "! unequal budgets" in text


def test_every_column_is_explained_in_one_line(three: Comparison) -> None:
    text = shown(three)
    for name in ("score", "difference", "agreement", "changed", "visual kept", "at the end", "FLOPs", "seconds", "n",
                 "loss", "left", "restored", "at stake", "came back", "s", "line", "line (A)", "surplus", "late",
                 "early", "by step", "tokens differ", "less sure by", "KL", "bar"):  # fmt: skip
        lines = text.splitlines()
        said = [i for i, line in enumerate(lines) if line.startswith(f"{name}:")]
        assert said, name
        after = lines[said[0] + 1] if said[0] + 1 < len(lines) else ""
        assert not after.startswith("  "), f"{name} takes more than a line"


def test_colour_adds_nothing_that_is_not_there_without_it(three: Comparison) -> None:
    coloured = Console(width=80, file=io.StringIO(), force_terminal=True, color_system="truecolor", record=True)
    coloured.print(render_comparison(three))
    assert coloured.export_text(styles=False).split() == shown(three).split()


@pytest.mark.parametrize("width", [60, 80, 140])
def test_it_fits(three: Comparison, width: int) -> None:
    assert "…" not in shown(three, width) or width < 80


def test_what_is_not_known_is_a_dash(tmp_path: Path) -> None:
    base = write(tmp_path / "a.trace.h5", {0: One([[1, 2]], seconds=math.nan)})
    text = shown(compare([base, write(tmp_path / "b.trace.h5", {0: One([[1, 2]], seconds=math.nan)})]))
    assert row(text, "cost", "B")[-2:] == ["-", "-"] and row(text, "answers", "B")[3:5] == ["-", "1.000"]
    assert (
        "not timed without recording, so no speed is told" in text
        and re.search("none: +no sample lost any", text)
        and "they need `logit_kl`" in text
    )
    assert "1 run against A, paired over 1 sample\n" in text


def test_a_long_course_is_shown_at_chosen_steps_and_ends_at_the_last(tmp_path: Path) -> None:
    tokens = [[*range(t + 1), *[M] * (39 - t)] for t in range(40)]
    base = write(tmp_path / "a.trace.h5", {0: One(tokens)})
    text = shown(compare([base, write(tmp_path / "b.trace.h5", {0: One(tokens, 10)})]))
    assert row(text, "B by step", "+29") and row(text, "B by step", "-1") and row(text, "B by step", "0  first pruned")
    assert len([x for x in text.splitlines() if x.startswith(("+", "-1", "0 "))]) <= 12


def test_files_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    for folder in "ab":
        (tmp_path / folder).mkdir()
    paths = [write(tmp_path / f / "x.trace.h5", {0: One([[1, 2]])}) for f in "ab"]
    text = shown(compare(paths))
    assert " a/x\n" in text and " b/x\n" in text


def test_csv_and_json(three: Comparison) -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(three))))
    assert (
        len(rows) == 8 and rows[0]["run"] == "B" and rows[0]["score"] == "0.5" and rows[0]["score_reference"] == "1.0"
    )
    assert rows[4]["run"] == "C" and rows[4]["kl_first"] == "" and rows[0]["kl_first"] == "0.625"
    content = json.loads(to_json(three))
    assert content["runs"][0]["divergence"]["restored"]["n"] == 4 and content["late"][0]["start"] == 0.5


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of docs/compare.md run (on two samples), and its snippets print what they are about."""
    repo = Path(__file__).parents[2]
    page = (repo / "docs" / "compare.md").read_text()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(repo / "recipes")
    commands = re.search(r"```sh\n(.*?)```", page, flags=re.DOTALL)
    assert commands is not None
    for line in commands[1].splitlines():
        words = shlex.split(line.replace("--limit 6", "--limit 2 --set generate.gen_length=8 --set generate.steps=4"))
        monkeypatch.setattr(sys, "argv", words)
        with contextlib.suppress(SystemExit):
            main()
    snippets = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    printed = []
    for code in snippets:
        out = io.StringIO()
        # the page replays sample 3; two samples have no such
        with contextlib.redirect_stdout(out):
            exec(compile(code.replace("trace, 3)", "trace, 1)"), "compare.md", "exec"), {"__name__": "__snippet__"})
        printed.append(out.getvalue())
    assert len(printed) == 2
    assert "3 runs against A, paired over 2 samples" in printed[0] and "B divprune 25% 0.25\n" in printed[0]
    assert "late start" in printed[0] and "C after B" in printed[0]
    assert "C (D)" in printed[0] and "B: none of these runs is blind" in printed[0]
    assert printed[1].endswith("{'kept': 48, 'dropped': 144}\n") and Path("page.gif").stat().st_size > 1000
