"""What was committed before the cut, guessed, kept, harmed and lost: counted slot by slot, and on the miniature."""

from __future__ import annotations

import io
import json
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))

from comparison_traces import MASK, One, write

from probe import intervals
from probe.compare import compare, end_tokens
from probe.compare_committed import (
    Course,
    Final,
    Shares,
    content_of,
    counts_of,
    decompose,
    final_of,
    guessed_ends,
    shares_of,
)
from probe.compare_steps import Side
from probe.recipe import load_recipe
from probe.runner import run
from probe.trace import open_trace
from probe.views.comparison import render_comparison, to_json

M, END = MASK, 1
PARTS = ("committed", "agrees", "unlike", "guessed", "kept", "harmed", "lost", "saved", "gain", "seen", "context")


def side(tokens: list[list[int]], nominal: list[int] | None = None) -> Side:
    held = One(tokens, nominal=nominal).record(0).arrays
    return Side(held["token"], held["commit_step"], held["nominal_step"])


def values(shares: Shares) -> dict[str, float]:
    return {name: getattr(shares, name).value for name in PARTS}


# -------------------------------------------------------------------- by hand


def test_a_slot_is_committed_with_its_final_commit() -> None:
    plain = final_of(side([[5, M, M], [5, 6, M], [5, 6, 7]]))
    assert plain.last.tolist() == [0, 1, 2] and plain.filled.all()
    reopened = final_of(side([[5, M, M], [M, 6, M], [5, 6, M]]))
    assert reopened.last.tolist()[:2] == [2, 1], "opened at step 1 and filled again"
    assert reopened.filled.tolist() == [True, True, False]
    changed = final_of(side([[5, 9], [5, 6]], nominal=[0, 4]))
    assert changed.last.tolist() == [0, 4], "steps are the schedule's"
    again = Side(np.array([[5, M], [5, 6]]), np.array([1, 1]), np.array([0, 1]))
    assert final_of(again).last.tolist() == [1, 1], "a step that wrote the same token again wrote it"


def test_shares_counted_by_hand() -> None:
    #            before the cut | at stake: text tells, kept, harmed, lost, left open by the late run
    reference = [5, 6, 10, 11, 12, 13, 14]
    late = [5, 6, 10, 11, 90, 91, M]
    blind = [5, 6, 10, 92, 12, 93, 14]
    first = [5, 6, M, M, M, M, M]
    sides = tuple(final_of(side([first, first, end])) for end in (reference, late, blind))
    assert len(sides) == 3
    content = np.array([True] * 6 + [False])
    got = counts_of(sides[0], sides[1], sides[2], 1, content)
    # compared, committed, strayed, agrees, unlike, guessed, kept, harmed, lost, seen, early
    assert got[:, 9:].tolist() == [[0, 0]] * 3, "no early run"
    assert got[:, :9].tolist() == [
        [7, 2, 0, 2, 3, 1, 1, 2, 1], [6, 2, 0, 2, 2, 1, 1, 1, 1], [1, 0, 0, 0, 1, 0, 0, 1, 0],
    ]  # fmt: skip
    pair = counts_of(sides[0], sides[1], None, 1, content)
    assert pair[:, :5].tolist() == got[:, :5].tolist() and not pair[:, 5:].any()
    zero = final_of(side([[M] * 7, [90, 6, 90, 11, 12, 90, M]]))
    with_zero = counts_of(*sides, 1, content, zero)
    assert with_zero[:, :9].tolist() == got[:, :9].tolist()
    # at stake are 10 11 12 13 14; it has 11 and 12, of which the late run kept 11
    assert with_zero[:, 9:].tolist() == [[1, 2], [1, 2], [0, 0]]
    v = values(shares_of(with_zero[:1], blind=True, early=True))
    assert (v["gain"], v["seen"], v["context"]) == (0, pytest.approx(1 / 7), 0)
    assert counts_of(sides[0], sides[1], None, 0, content)[0, :2].tolist() == [7, 0], "cut before the first step"
    assert counts_of(sides[0], sides[1], None, None, content)[0, :3].tolist() == [7, 6, 2], "no cut: all settled"


def test_a_slot_that_either_run_wrote_anew_was_at_stake() -> None:
    stays, moves = side([[5, 6, M], [5, 6, M], [5, 6, 7]]), side([[5, 6, M], [M, 6, M], [5, 6, 7]])
    for a, b in ((stays, moves), (moves, stays)):
        got = counts_of(final_of(a), final_of(b), None, 1, np.ones(3, bool))
        assert got[0, :5].tolist() == [3, 1, 0, 2, 0]


def test_the_end_of_an_answer() -> None:
    final = final_of(side([[8, 7, END, 9, END, END]]))
    assert content_of(final, [END]).tolist() == [True, True, False, False, False, False]
    assert content_of(final, []).all()
    moved = Final(final.token, final.filled, final.last, np.array([2, 0, 1, 3, 4, 5]))
    assert content_of(moved, [END]).tolist() == [False, True, False, False, False, False], "slot 1 stands first"


def test_the_padding_is_guessed_where_no_trace_says_it() -> None:
    def ends(*answers: list[int]) -> set[int]:
        return set(guessed_ends([final_of(side([answer])) for answer in answers]))

    assert ends([8, 1], [7, 1], [9, 9]) == {1}
    assert ends([8, 1, 1], [7, 4, 3]) == set(), "one answer is no evidence"
    assert ends([8, 3], [3, 8], [7, 3]) == set(), "another token follows it"
    assert ends() == set()


def test_the_interval_of_shares_is_a_bootstrap() -> None:
    (half,) = intervals.ratios([np.array([1, 1, 1])], np.array([2, 2, 2]))
    assert (half.value, half.low, half.high, half.n) == (0.5, 0.5, 0.5, 3)
    one, other = intervals.ratios([np.array([0, 2, 0]), np.array([2, 0, 0])], np.array([2, 2, 0]))
    assert (one.value, one.low, one.high, one.n) == (0.5, 0, 1, 2) and other.value == 0.5
    # a sum of 30 Bernoulli(1/2) draws of slots: the normal approximation's +- 1.96 sqrt(p (1 - p) / n)
    (many,) = intervals.ratios([np.tile([0, 1], 50)], np.ones(100))
    assert many.low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.011) and many.high == pytest.approx(0.598, abs=0.011)
    assert math.isnan(intervals.ratios([np.zeros(2)], np.zeros(2))[0].value)
    assert math.isnan(intervals.ratios([np.ones(1)], np.ones(1))[0].low)


# -------------------------------------------------------------------- any runs, counted one by one


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[Side], int, int]:
    """Three runs of one sample that go one way up to the cut: slots fill, and may be opened again behind it."""
    n, steps = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    cut = draw(st.integers(0, steps))
    word = st.sampled_from([M, 2, 3])
    rows = [draw(st.lists(word, min_size=n, max_size=n)) for _ in range(cut)]
    for i in range(1, len(rows)):
        rows[i] = [new if old == M else old for old, new in zip(rows[i - 1], rows[i], strict=True)]
    sides = []
    for _ in range(3):
        rest = [draw(st.lists(word, min_size=n, max_size=n)) for _ in range(steps - cut)]
        token = np.array(rows + rest).reshape(steps, n)
        commit = np.array(One(token.tolist()).record(0).arrays["commit_step"])
        sides.append(Side(token, commit, np.arange(steps)))
    return sides, cut, n


@settings(max_examples=200, deadline=None)
@given(runs(), st.integers(0, 6))
def test_every_slot_is_counted_once_and_where_it_belongs(given_runs: tuple[list[Side], int, int], until: int) -> None:
    sides, cut, n = given_runs
    finals = [final_of(s) for s in sides]
    got = counts_of(finals[0], finals[1], finals[2], cut, np.arange(n) < until)
    wanted: dict[str, Counter[str]] = {"all": Counter(), "content": Counter(), "end": Counter()}
    # which id stands for an open slot is read from a whole sample, so it is asked of the run, not of the test
    a, b, c = (np.where(f.filled, f.token, -f.token - 100 - i) for i, f in enumerate(finals))
    for p in range(n):
        if not finals[0].filled[p]:
            continue
        touched = any(
            step >= cut and (s.token[step, p] != (s.token[step - 1, p] if step else None) or s.commit_step[p] == step)
            for s in sides[:2]
            for step in range(len(s.token))
        )
        fate = (
            "committed" if not touched and finals[1].filled[p] else
            {(True, True): "guessed", (True, False): "kept", (False, True): "harmed", (False, False): "lost"}[
                bool(a[p] == b[p]), bool(a[p] == c[p])
            ]
        )  # fmt: skip
        for kind in ("all", "content" if p < until else "end"):
            wanted[kind][fate] += 1
    for row, kind in zip(got.tolist(), wanted, strict=True):
        slots, committed, strayed, agrees, unlike, guessed, kept, harmed, lost, *_ = row
        assert wanted[kind] == Counter(
            {k: v for k, v in zip(("committed", "guessed", "kept", "harmed", "lost"),
                                  (committed, guessed, kept, harmed, lost), strict=True) if v}
        )  # fmt: skip
        assert committed + agrees + unlike == slots and guessed + kept == agrees and harmed + lost == unlike
        assert strayed == 0, "all runs went one way before the cut"
    assert (got[1] + got[2]).tolist() == got[0].tolist()


@settings(max_examples=60, deadline=None)
@given(runs())
def test_identities(given_runs: tuple[list[Side], int, int]) -> None:
    sides, cut, _ = given_runs
    a, b, c = (Course(name, [final_of(s)], [cut], [name == "C"]) for name, s in zip("ABC", sides, strict=True))
    found = {one.label: one for one in decompose(a, [b, c])}
    if not found["B"].shares["all"].slots:
        return
    assert found["B"].blind == found["C"].blind == "C"
    for one in found.values():
        for shares in one.shares.values():
            v = values(shares)
            if shares.slots:
                assert v["committed"] + v["agrees"] + v["unlike"] == pytest.approx(1)
                assert v["guessed"] + v["kept"] == pytest.approx(v["agrees"])
                assert v["harmed"] + v["lost"] == pytest.approx(v["unlike"])
    own = values(found["C"].shares["all"])
    assert own["kept"] == own["harmed"] == 0, "the blind run beside itself restores nothing"
    itself = values(decompose(a, [Course("A", a.final, [cut], [False])])[0].shares["all"])
    assert itself["unlike"] == 0 and itself["committed"] + itself["agrees"] == pytest.approx(1)


# -------------------------------------------------------------------- whole comparisons


FULL = [[5, M, M, M], [5, 6, M, M], [5, 6, 7, M], [5, 6, 7, END]]
LATE = [*FULL[:2], [5, 6, 7, M], [5, 6, 7, 2]]
EARLY = [*FULL[:2], [5, 6, 4, M], [5, 6, 4, 2]]
UNSEEN = [*FULL[:2], [5, 6, 3, M], [5, 6, 3, END]]


def no_tokens(cut: int) -> dict[str, np.ndarray]:
    counts = np.full((4, 2), 4)
    counts[cut:] = 0
    return {"visual_tokens": counts}


def shown(paths: list[Path]) -> str:
    console = Console(width=80, file=io.StringIO(), no_color=True)
    console.print(render_comparison(compare(paths)))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert all(len(line) <= 80 and "…" not in line for line in lines)
    return "\n".join(line.rstrip() for line in lines)


@pytest.fixture
def four(tmp_path: Path) -> list[Path]:
    return [
        write(tmp_path / "base.h5", {i: One(FULL) for i in range(3)}, name="r/baseline", extra={"end_tokens": "1"}),
        write(tmp_path / "late.h5", {i: One(LATE, 2) for i in range(3)}, start="50%"),
        write(tmp_path / "early.h5", {i: One(EARLY, 0) for i in range(3)}, start="0%"),
        write(tmp_path / "blind.h5", {i: One(UNSEEN, 2, more=no_tokens(2)) for i in range(3)}, start="50%"),
    ]


def test_the_blind_run_is_found_among_the_traces(four: list[Path]) -> None:
    late, early, blind = compare(four).committed
    assert (late.label, late.blind, late.early, late.cuts, late.strayed) == ("B", "D", "C", (2, 2), 0)
    assert values(late.shares["all"]) == {
        "committed": 0.5, "agrees": 0.25, "unlike": 0.25, "guessed": 0, "kept": 0.25, "harmed": 0.25, "lost": 0,
        "saved": 1, "gain": 0.25, "seen": 0, "context": 0.25,
    }  # fmt: skip
    assert values(late.shares["content"]) == pytest.approx({
        "committed": 2 / 3, "agrees": 1 / 3, "unlike": 0, "guessed": 0, "kept": 1 / 3, "harmed": 0, "lost": 0,
        "saved": 1, "gain": 1 / 3, "seen": 0, "context": 1 / 3,
    })  # fmt: skip
    assert late.shares["end"].slots == 3 and late.shares["end"].harmed.value == 1
    assert early.blind == early.early == "" and early.cuts == (0, 0) and math.isnan(early.shares["all"].kept.value)
    assert blind.label == blind.blind == "D"
    said = json.loads(to_json(compare(four)))["committed"]
    assert said[0]["shares"]["all"]["kept"]["value"] == 0.25 and said[1]["shares"]["all"]["kept"]["value"] is None


def test_the_tables_say_it_and_what_is_missing(four: list[Path]) -> None:
    text = shown(four)
    lines = [line.split() for line in text.splitlines()]
    assert ["B", "all", "2", "12", "50", "25", "25"] in lines and ["end", "3", "0", "0", "100"] in lines
    assert ["B", "(D)", "all", "0", "25", "25", "0", "100"] in lines
    assert ["B", "(C)", "all", "+25", "25", "0", "25"] in lines
    assert "C: none of these runs is blind" in text and "`prune/blind --set start=0%`" in " ".join(text.split())
    assert "prune/blind --set start=50%" in " ".join(shown(four[:2]).split())
    for name in ("slots", "content, end", "cut", "before cut", "after, as A", "(D)", "guessed", "kept", "harmed",
                 "lost", "saved", "(C)", "gain", "seen", "context"):  # fmt: skip
        assert any(line.startswith(f"{name}:") for line in text.splitlines()), name


def test_a_blind_run_of_another_cut_is_no_match(four: list[Path], tmp_path: Path) -> None:
    other = write(tmp_path / "x.h5", {i: One(UNSEEN, 1, more=no_tokens(1)) for i in range(3)})
    assert compare([*four[:2], other]).committed[0].blind == ""
    some = {i: One(UNSEEN, 2, more=no_tokens(2) if i else {}) for i in range(3)}
    assert compare([*four[:2], write(tmp_path / "y.h5", some)]).committed[0].blind == "", "one sample still sees"


def test_a_run_without_a_cut_has_no_decomposition_and_a_stray_one_is_said(four: list[Path], tmp_path: Path) -> None:
    assert compare([four[0], four[0]]).committed == ()
    stray = [[4, M, M, M], [4, 6, M, M], [4, 6, 7, M], [4, 6, 7, END]]
    got = compare([four[0], write(tmp_path / "s.h5", {i: One(stray, 2) for i in range(3)})])
    assert got.committed[0].strayed == 0.5 and any("50.0% of the slots that B committed" in w for w in got.warnings)


def test_samples_that_ended_before_the_cut_are_settled(four: list[Path], tmp_path: Path) -> None:
    mixed = write(tmp_path / "m.h5", {0: One(FULL), 1: One(LATE, 2), 2: One(LATE, 2)})
    shares = compare([four[0], mixed]).committed[0].shares["all"]
    assert shares.committed.value == pytest.approx((4 + 2 + 2) / 12) and shares.slots == 12


def test_on_the_miniature(tmp_path: Path) -> None:
    """Blind halfway through, on two answers of one word: what was committed before is the same in both runs."""
    sets = ["data.task=world/read_words", "generate.gen_length=8", "generate.steps=4", "trace.pictures=false"]
    made = run(load_recipe("prune/blind", sets), limit=2, out=tmp_path, timed=False)
    late = run(load_recipe("prune/random", [*sets, "keep=25%", "start=50%", "positions=keep"]), limit=2,
               out=tmp_path / "late", baseline=False, timed=False)  # fmt: skip
    assert made.baseline is not None
    with open_trace(made.baseline) as trace:
        ends, token, commit = end_tokens(trace), trace.array("token"), trace.array("commit_step")
    assert ends == [6, 1], "the miniature's end of turn, and its padding"
    found = compare([made.baseline, late.trace, made.trace]).committed
    assert [(one.label, one.blind, one.cuts, one.strayed) for one in found] == [
        ("B", "C", (2, 2), 0),
        ("C", "C", (2, 2), 0),
    ]
    filled = (commit >= 0) & (token[:, -1] >= 0)
    assert found[0].shares["all"].slots == filled.sum()
    assert found[0].shares["all"].committed.value == pytest.approx((filled & (commit < 2)).sum() / filled.sum())
    assert found[1].shares["all"].kept.value == 0
