"""Comparisons of tiny traces whose answers were worked out by hand, and identities for any."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from comparison_traces import MASK, One, write

from probe import intervals
from probe.compare import compare
from probe.compare_steps import Side, filled_slots, first_intervened, steps_apart
from probe.errors import ProbeError
from probe.trace import SampleRecord, TraceHeader, TraceWriter, Variable

M, NAN = MASK, math.nan
FULL = [[5, M, M, M], [5, 6, M, M], [5, 6, 7, M], [5, 6, 7, 8]]


# -------------------------------------------------------------------- intervals


def test_quantiles_are_those_of_the_printed_tables() -> None:
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 30: 2.042, 120: 1.980}
    assert {k: round(intervals.quantile(k), 3) for k in table} == table
    assert intervals.quantile(10**7) == pytest.approx(1.95996, abs=1e-4)
    assert intervals.quantile(2000) == pytest.approx(intervals.quantile(2001), abs=1e-5)


def test_the_interval_of_a_mean() -> None:
    # 1, 2, 3: mean 2, s = 1, t(2) = 4.303, so 2 +- 4.303 / sqrt(3)
    got = intervals.mean([1, 2, NAN, 3])
    assert (got.value, got.n) == (2, 3) and got.high == pytest.approx(2 + 4.3027 / 3**0.5, abs=1e-3)
    assert intervals.mean([1, 2, 3], within=(0, 3)).high == 3
    assert math.isnan(intervals.mean([4]).low) and intervals.mean([4]).value == 4
    assert math.isnan(intervals.mean([]).value)


def test_the_interval_of_a_ratio() -> None:
    same = intervals.one_minus_ratio([1, 2, 3], [2, 4, 6])
    assert (same.value, same.low, same.high) == (0.5, 0.5, 0.5)
    mixed = intervals.one_minus_ratio([0, 2, NAN], [2, 2, 1])
    assert (mixed.value, mixed.low, mixed.high, mixed.n) == (0.5, 0, 1, 2)
    assert math.isnan(intervals.one_minus_ratio([0, 0], [0, 0]).value), "nothing lost, nothing to restore"


# -------------------------------------------------------------------- steps


def test_slots_are_filled_when_they_hold_no_mask() -> None:
    token = np.array([[7, M, M], [7, 8, M]])
    assert filled_slots(token, np.array([0, 1, -1])).tolist() == [[True, False, False], [True, True, False]]
    assert filled_slots(np.array([[7, 8]]), np.array([0, 0])).all(), "one step that fills everything"
    reopened = np.array([[7, M], [M, M], [9, 8]])
    assert filled_slots(reopened, np.array([2, 2])).tolist() == [[True, False], [False, False], [True, True]]


def test_the_first_step_with_a_token_missing() -> None:
    kept = np.ones((3, 2, 4), int)
    assert first_intervened(kept, None, 4) is None
    assert first_intervened(kept, np.array([[4, 4], [4, 4], [4, 3]]), 4) == 2
    kept[1, 0, 3] = 5
    assert first_intervened(kept, np.array([[4, 4], [4, 4], [4, 3]]), 4) == 1, "masked tokens are missing, too"
    assert first_intervened(None, None, 0) is None


def side(tokens: list[list[int]], nominal: list[int] | None = None, **more: list[list[float]]) -> Side:
    held = One(tokens, nominal=nominal).record(0).arrays
    arrays = {name: np.array(values) for name, values in more.items()}
    return Side(held["token"], held["commit_step"], held["nominal_step"], **arrays)


def test_steps_apart_counted_by_hand() -> None:
    other = side([[5, M, M, M], [5, 6, M, M], [5, 6, M, 9], [5, 6, 1, 9]])
    got = steps_apart(side(FULL), other, 2)
    # after step 2 slots 0 and 1 are filled in both and equal; in the end 2 of 4 differ
    assert {k: v[0] for k, v in got.at.items()} == {-2: 0, -1: 0, 0: 0, 1: 0.5}
    assert (got.both, got.changed, got.ever, got.back) == (4, 2, 2, 0)
    assert got.stake.tolist() == [False, False, True, True]
    assert got.differs.tolist() == [False, False, True, True]


def test_a_token_that_differed_and_came_back() -> None:
    other = side([[5, M, M, M], [4, 6, M, M], [4, 6, 7, 1], [5, 6, 7, 8]])
    got = steps_apart(side(FULL), other, 1)
    assert (got.changed, got.ever, got.back) == (0, 1, 1), "slot 3 was open in the reference while it was wrong"
    assert [got.at[k][0] for k in (-1, 0, 1, 2)] == [0, 0.5, 1 / 3, 0]


def test_runs_are_laid_beside_each_other_by_their_place_in_the_schedule() -> None:
    early_end = side([[5, M, M, M], [5, 6, 7, M], [5, 6, 7, 9]], nominal=[0, 2, 3])
    got = steps_apart(side(FULL), early_end, 0)
    assert sorted(got.at) == [0, 1, 2, 3]
    assert [got.at[k][0] for k in range(4)] == [0, 0, 0, 0.25], "at step 1 the other still is as after step 0"


def test_confidence_is_compared_where_both_are_open() -> None:
    a = side([[5, M], [5, 6]], confidence=[[0.9, 0.8], [NAN, 0.6]])
    b = side([[M, 6], [5, 6]], confidence=[[0.5, 0.6], [0.7, NAN]])
    got = steps_apart(a, b, 0)
    assert got.at[0][1] == pytest.approx(0.3) and math.isnan(got.at[1][1])


def test_loss_and_what_is_left_are_of_the_same_slots() -> None:
    kl = [[NAN] * 4, [NAN, 2.0, 4.0, NAN], [NAN, NAN, 1.0, 8.0], [NAN, NAN, NAN, 9.0]]
    got = steps_apart(side(FULL), side(FULL, logit_kl=kl), 1)
    # slots 1 and 2 are open at step 1: 2 and 4 there; last seen with 2 (its only step) and 1
    assert (got.kl_first, got.kl_last, got.kl_slots) == (3, 1.5, 2)
    assert [got.at[k][2] for k in (0, 1, 2)] == [3, 4.5, 9]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_run_beside_itself_is_no_step_apart(data: st.DataObject) -> None:
    n, steps = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 5))
    commit = data.draw(st.lists(st.integers(-1, steps - 1), min_size=n, max_size=n))
    final = data.draw(st.lists(st.integers(0, 9), min_size=n, max_size=n))
    token = np.array([[v if 0 <= c <= t else M for v, c in zip(final, commit, strict=True)] for t in range(steps)])
    own = Side(token, np.array(commit), np.arange(steps))
    got = steps_apart(own, own, data.draw(st.integers(0, steps - 1)))
    assert got.changed == got.ever == got.back == 0 and all(
        v[0] in (0, None) or math.isnan(v[0]) for v in got.at.values()
    )
    assert got.both == sum(c >= 0 for c in commit) or all(c <= 0 for c in commit)


# -------------------------------------------------------------------- whole comparisons


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path / "base.h5", {i: One(FULL) for i in range(3)}, name="r/baseline")


def test_everything_of_a_comparison_by_hand(base: Path, tmp_path: Path) -> None:
    changed = [[5, M, M, M], [5, 6, M, M], [5, 6, 7, M], [5, 6, 7, 9]]
    other = {
        0: One(FULL, 2, flops=50, seconds=1),
        1: One(changed, 2, "a c", 0.0, flops=50, seconds=1),
        2: One(FULL, None, flops=50, seconds=1),
    }
    got = compare([base, write(tmp_path / "r.h5", other)])
    run = got.runs[0]
    assert got.n == 3 and got.left_out == 0 and got.warnings == ()
    assert got.reference.score.value == 1 and run.score.value == pytest.approx(2 / 3)
    # differences 0, -1, 0: mean -1/3, s = 0.5774, t(2) = 4.3027
    assert run.score_difference.value == pytest.approx(-1 / 3)
    # so the interval is -1/3 +- 1.434, cut to what a difference of scores can be
    assert (run.score_difference.low, run.score_difference.high) == (-1, 1)
    assert run.agreement.value == pytest.approx((1 + 0.5 + 1) / 3), "`a c` agrees with `a b` in one of two words"
    assert (run.flops, run.flops_ratio, run.seconds_ratio) == (50, 0.5, 0.5)
    # 4 steps, two of them with half of the tokens: 3/4; untouched sample 1
    assert run.retention == pytest.approx((0.75 + 0.75 + 1) / 3) and run.retention_end == pytest.approx(2 / 3)
    assert run.divergence is not None and run.divergence.n == 2
    assert run.divergence.changed.value == pytest.approx((0 + 0.25) / 2)
    assert run.divergence.stake.value == pytest.approx((0 + 0.5) / 2), "two slots were open, one of them changed"
    assert [(s.step, s.n, s.tokens) for s in run.divergence.by_step] == [
        (-2, 2, 0),
        (-1, 2, 0),
        (0, 2, 0),
        (1, 2, 0.125),
    ]
    assert math.isnan(run.divergence.restored.value)
    per_sample = [(s.sample, s.run, s.slots, s.changed, s.first_step) for s in got.samples]
    assert per_sample == [(0, "B", 4, 0, 2), (1, "B", 4, 1, 2), (2, "B", 4, 0, -1)]


def test_loss_and_restoration(base: Path, tmp_path: Path) -> None:
    def kl(first: float, last: float) -> list[list[float]]:
        return [[NAN] * 4, [NAN, NAN, first, first], [NAN, NAN, last, first], [NAN, NAN, NAN, last]]

    other = {i: One(FULL, 1, kl=kl(1.0 + i, 0.5)) for i in range(3)}
    divergence = compare([base, write(tmp_path / "r.h5", other)]).runs[0].divergence
    assert divergence is not None
    assert (divergence.loss.value, divergence.left.value) == (2, 0.5)
    assert divergence.restored.value == 0.75
    # of three samples, the same one is drawn three times in 1/27 > 2.5 % of the draws
    assert divergence.restored.low == 1 - 0.5 / 1 and divergence.restored.high == pytest.approx(1 - 0.5 / 3)


def test_the_line_of_late_starts(base: Path, tmp_path: Path) -> None:
    half = [*FULL[:2], [5, 6, 7, M], [5, 6, 7, 1]]
    zero = [[1, M, M, M], [1, 1, M, M], [1, 1, 1, M], [1, 1, 1, 1]]
    early = write(tmp_path / "zero.h5", {i: One(zero, 0, score=0.2) for i in range(3)}, start="0%")
    late = write(tmp_path / "late.h5", {i: One(half, 2, score=0.7) for i in range(3)}, start="0.5")
    other = write(tmp_path / "other.h5", {i: One(half, 2, score=0.7) for i in range(3)}, start="0.5", keep="10%")
    got = compare([base, late, early, other])
    assert len(got.late) == 1, "another keep is another pruner"
    one = got.late[0]
    assert (one.label, one.zero, one.start) == ("B", "C", 0.5)
    assert one.line == one.line_reference == pytest.approx(0.5 + 0.5 * 0.2)
    assert one.surplus.value == pytest.approx(0.1)
    assert (one.stake.value, one.stake_zero.value) == (0.5, 1.0)
    assert "unequal budgets" in got.warnings[-1]


def test_the_reference_takes_its_score_into_the_line(tmp_path: Path) -> None:
    poor = write(tmp_path / "base.h5", {i: One(FULL, score=0.8) for i in range(3)}, name="r/baseline")
    early = write(tmp_path / "zero.h5", {i: One(FULL, 0, score=0.2) for i in range(3)}, start="0")
    late = write(tmp_path / "late.h5", {i: One(FULL, 1, score=0.65) for i in range(3)}, start="25%")
    one = compare([poor, early, late]).late[0]
    assert one.line == pytest.approx(0.25 + 0.75 * 0.2) and one.line_reference == pytest.approx(0.2 + 0.15)
    assert one.surplus.value == pytest.approx(0.3)


def test_equal_budgets_are_within_one_percent(base: Path, tmp_path: Path) -> None:
    def run(name: str, tokens: int) -> Path:
        return write(
            tmp_path / name, {i: One(FULL, 0, more={"visual_tokens": np.full((4, 2), tokens)}) for i in range(3)}
        )

    assert compare([base, run("a.h5", 2), run("b.h5", 2)]).warnings == ()
    assert "B keeps 50.0%" in compare([base, tmp_path / "a.h5", run("c.h5", 3)]).warnings[0]
    assert "it is no unpruned run" in compare([tmp_path / "a.h5", tmp_path / "b.h5"]).warnings[0]


def test_only_samples_of_all_traces_count(base: Path, tmp_path: Path) -> None:
    one = write(tmp_path / "a.h5", {0: One(FULL, 1), 2: One(FULL, 1), 7: One(FULL, 1, sample_id="s7")})
    two = write(tmp_path / "b.h5", {0: One([], failed="boom"), 1: One(FULL, 1), 2: One(FULL, 1)})
    got = compare([base, one, two])
    assert got.n == 1 and [s.sample for s in got.samples] == [2, 2] and got.left_out == 3
    said = "\n".join(got.warnings)
    assert (
        "1 of 3 samples failed in b.h5" in said and "samples are missing (1 in base.h5, 1 in a.h5, 1 in b.h5)" in said
    )


def test_other_data_is_an_error(base: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "o.h5", {i: One(FULL, sample_id=f"x{i}") for i in range(3)})
    with pytest.raises(ProbeError, match="different data: sample 0 is `s0` in base.h5 and `x0` in o.h5; run both"):
        compare([base, other])
    with pytest.raises(
        ProbeError, match=r"no sample finished in all traces .*o.h5 has sample 0, 1, 2; p.h5 has sample 8"
    ):
        compare([other, write(tmp_path / "p.h5", {8: One(FULL)})])
    with pytest.raises(ProbeError, match="two traces at least"):
        compare([base])
    with pytest.raises(ProbeError, match=r"nowhere.h5"):
        compare([base, tmp_path / "nowhere.h5"])


def test_another_backbone_is_said_and_its_tokens_are_not_compared(base: Path, tmp_path: Path) -> None:
    got = compare([base, write(tmp_path / "o.h5", {i: One(FULL, 1) for i in range(3)}, backbone="other", device="gpu")])
    assert got.runs[0].divergence is None and got.runs[0].agreement.value == 1
    assert "the backbones differ: toy in base.h5, other in o.h5" in got.warnings[0]
    assert "seconds say nothing" in got.warnings[1]


def test_times_of_runs_that_only_recorded_are_unknown(base: Path, tmp_path: Path) -> None:
    got = compare([base, write(tmp_path / "o.h5", {i: One(FULL, 1, seconds=NAN) for i in range(3)})])
    assert math.isnan(got.runs[0].seconds_ratio) and math.isnan(got.runs[0].seconds)
    assert json.loads(json.dumps(got.to_dict(), allow_nan=False))["runs"][0]["seconds_ratio"] is None


def test_one_sample_and_one_step(tmp_path: Path) -> None:
    a = write(tmp_path / "a.h5", {4: One([[5, 6]])})
    got = compare([a, write(tmp_path / "b.h5", {4: One([[5, 7]], 0)})])
    run = got.runs[0]
    assert math.isnan(run.score_difference.low) and run.divergence is not None
    assert run.divergence.changed.value == 0.5 and len(run.divergence.by_step) == 1


def test_a_trace_beside_itself(base: Path) -> None:
    got = compare([base, base])
    run = got.runs[0]
    assert run.score_difference.value == 0 and run.agreement.value == run.flops_ratio == run.seconds_ratio == 1
    assert run.divergence is not None and run.divergence.n == 0 and run.divergence.changed.value == 0


def test_a_partial_trace_that_holds_scores_alone(base: Path, tmp_path: Path) -> None:
    bare = SampleRecord(0, "s0", "task", "Why?", ("a b",), "a b", "exact_match", 1.0)
    header = TraceHeader("r", "", "", "toy", device="cpu")
    with TraceWriter(tmp_path / "p.h5", header, [Variable("x", (), "1", "x")]) as writer:
        writer.write(bare)
        got = compare([base, tmp_path / "p.h5.partial"])
    assert got.n == 1 and any("p.h5.partial is partial" in w for w in got.warnings)
    run = got.runs[0]
    assert math.isnan(run.retention) and math.isnan(run.flops_ratio) and run.divergence is None and run.dials == {}
