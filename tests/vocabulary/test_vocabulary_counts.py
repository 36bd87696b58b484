"""How many tokens `keep` means, in every spelling."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from probe.errors import ProbeError
from probe.selections.counts import Around, Count, Keep, attention_rank, how_many, outlier_share

KEEP = TypeAdapter(Keep)


def count(keep: Any, n: int, **told: Any) -> int:
    return how_many(KEEP.validate_python(keep), n, **({"original": n} | told))


@pytest.mark.parametrize(
    ("keep", "n", "told", "kept"),
    [
        (0.25, 64, {}, 16),
        ("25%", 64, {}, 16),
        (64, 100, {}, 64),
        (64, 10, {}, 10),
        (1, 10, {}, 1),
        (1.0, 10, {}, 10),
        (0.29, 100, {}, 29),
        (0.5, 10, {"original": 16}, 8),  # of the original number: a second time does not compound
        ({"share": 0.29, "round": "truncate"}, 100, {}, 28),  # int(0.29 * 100), as Python has it
        ({"share": 0.25}, 50, {}, 12),
        ({"share": 0.75, "round": "half_even"}, 50, {}, 38),  # 37.5 to the even 38
        ({"share": 0.25, "round": "half_even"}, 50, {}, 12),  # 12.5 to the even 12
        ({"share": 0.01, "min": 1}, 50, {}, 1),
        ({"share": 1.0, "spare": 1}, 50, {}, 49),
        ({"number": 300, "spare": 1}, 64, {}, 63),
        ({"number": 40, "spare": 1}, 64, {}, 40),
        ({"rank": {"scale": 9, "bias": 6}}, 64, {"rank": lambda: 6}, 60),
        ({"rank": {"scale": 9, "bias": 6}}, 64, {"rank": lambda: 20}, 63),  # never all of them ...
        ({"rank": {"scale": 0.8}}, 64, {"rank": lambda: 64}, 64),  # ... unless the rank is full
        ({"rank": {"scale": 0.8}}, 64, {"rank": lambda: 1}, 0),
        ({"cumulative": "one_minus_progress", "round": "half_even"}, 96, {"progress": 0.25}, 72),
        ({"cumulative": "one_minus_progress", "round": "half_even"}, 30, {"progress": 0.5, "original": 61}, 30),
        ({"budget": 0.5}, 40, {"around": Around(20, 15)}, 10),
        ({"budget": 0.9}, 40, {"around": Around(20, 15)}, 15),  # no more than is left
        ("rest", 40, {"around": Around(20, 15)}, 15),
        (0.5, 40, {"around": Around(20, 15)}, 15),
    ],
)
def test_every_spelling(keep: Any, n: int, told: dict[str, Any], kept: int) -> None:
    assert count(keep, n, **told) == kept


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        ("x", "a share like 0.25"),
        (True, "a share like 0.25"),
        (1.5, "between 0 and 1"),
        (-1, "cannot keep -1"),
        ({"share": 2}, "between 0 and 1"),
        ({"share": 0.5, "number": 3}, "names one of"),
        ({}, "names one of"),
        ({"share": 0.5, "least": 3}, "not with `least`"),
        ({"share": 0.5, "round": "up"}, "round must be one of floor"),
        ({"number": 0.5}, "whole number"),
        ({"number": 3, "spare": -1}, "spare must be a whole number"),
        ({"rank": 3}, "rank must be a mapping"),
        ({"rank": {"scale": "much"}}, "scale must be a number"),
        ({"cumulative": "progress"}, "one_minus_progress"),
        ({"iqr": "1.5"}, "iqr must be a number"),
    ],
)
def test_what_is_no_count_is_refused(keep: Any, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        KEEP.validate_python(keep)


def test_a_budget_needs_a_combination() -> None:
    with pytest.raises(ProbeError, match="there is none"):
        count("rest", 4)


shares = st.floats(0, 1)


@given(shares, st.integers(0, 4000), st.sampled_from(["floor", "half_even", "truncate"]))
def test_a_share_is_within_one_token(share: float, n: int, rounding: str) -> None:
    kept = count({"share": share, "round": rounding}, n)
    assert 0 <= kept <= n
    assert abs(kept - share * n) < 1
    assert (kept == n) or share < 1


@given(st.integers(1, 1000), st.data())
def test_cumulative_counts_shrink_to_nothing(n: int, data: st.DataObject) -> None:
    points = sorted(data.draw(st.lists(shares, min_size=1, max_size=5)))
    kept = [count({"cumulative": "one_minus_progress", "round": "half_even"}, n, progress=p) for p in points]
    assert kept == sorted(kept, reverse=True)
    assert count({"cumulative": "one_minus_progress"}, n, progress=0.0) == n
    assert count({"cumulative": "one_minus_progress"}, n, progress=1.0) == 0


@given(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=60), st.floats(0, 3))
def test_outliers_are_numpys(values: list[float], factor: float) -> None:
    x = np.array(values, dtype=np.float64)
    q1, q3 = np.percentile(x, [25, 75])
    fence = q3 + factor * (q3 - q1)
    near = np.isclose(x, fence, rtol=1e-12, atol=1e-12).sum()  # what lies on the fence may fall to either side
    share = outlier_share(torch.tensor(values, dtype=torch.float64), factor)
    assert abs(share * len(x) - (x > fence).sum()) <= near + 1e-9
    assert count({"iqr": factor}, len(x), score=lambda: torch.tensor(values)) <= len(x)


def test_nothing_has_no_outliers() -> None:
    assert outlier_share(torch.empty(0), 1.5) == 0
    assert count({"iqr": 1.5}, 5, score=lambda: torch.ones(5)) == 0


def test_the_rank_is_that_of_the_rows() -> None:
    rows = torch.tensor([[1.0, 0, 2], [2, 0, 4], [0, 1, 0]])
    assert attention_rank(rows) == 2


@given(st.floats(0.1, 30), st.floats(0, 20), st.integers(0, 64), st.integers(1, 64))
def test_rank_counts_never_keep_everything_unless_the_rank_is_full(
    scale: float, bias: float, rank: int, n: int
) -> None:
    kept = count({"rank": {"scale": scale, "bias": bias}}, n, rank=lambda: min(rank, n))
    assert kept == n if rank >= n else kept == max(min(math.floor(rank * scale + bias), n - 1), 0)


def test_a_count_says_how_it_was_spelled() -> None:
    spelled = {"rank": {"scale": 9, "bias": 6}}
    assert str(KEEP.validate_python(spelled)) == "{rank: {scale: 9, bias: 6}}"
    assert isinstance(KEEP.validate_python("rest"), Count)
    assert str(KEEP.validate_python("rest")) == "rest"
