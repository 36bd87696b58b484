"""The harness: turns alternate, ratios are those of the times, outputs are compared first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from probe.bench.equality import same_tokens, same_values
from probe.bench.line import Line, Target, written
from probe.bench.turns import Spread, spread, take_turns
from probe.errors import ProbeError


class Clock:
    """Time that passes only when a side says so."""

    def __init__(self) -> None:
        self.now, self.order = 0.0, list[str]()

    def side(self, name: str, seconds: list[float]) -> Any:
        given = iter([0.0, *seconds])  # the first run is not timed

        def run() -> str:
            self.order.append(name)
            self.now += next(given)
            return name

        return run


def test_sides_take_turns_and_go_first_alternately() -> None:
    clock = Clock()
    sides = {"a": clock.side("a", [4.0, 9.0, 6.0]), "b": clock.side("b", [2.0, 3.0, 6.0])}
    checked: list[Mapping[str, Any]] = []

    def check(results: Mapping[str, Any]) -> str:
        assert clock.order == ["a", "b"]  # nothing was timed yet
        checked.append(dict(results))
        return "same"

    turns = take_turns(sides, 3, check, clock=lambda: clock.now, processor=lambda: clock.now / 2)
    assert clock.order == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert checked == [{"a": "a", "b": "b"}] and turns.equal == "same"
    assert turns.wall == {"a": [4.0, 9.0, 6.0], "b": [2.0, 3.0, 6.0]}
    assert turns.cpu["a"] == [2.0, 4.5, 3.0]
    assert turns.ratio("a", "b") == Spread(2.0, 1.5, 2.5, 3)  # of 2, 3 and 1
    assert turns.ratio("a", "b", scale=0.5).median == 1.0
    assert turns.seconds("a").median == 6.0


def test_a_check_that_fails_leaves_nothing_timed() -> None:
    clock = Clock()

    def check(results: Mapping[str, Any]) -> str:
        return same_tokens("row", "a", [[1, 2], [1, 3]], "b", [[1, 2], [1, 4]])

    with pytest.raises(ProbeError, match=r"row `row`.*\(1, 1\).*1 of 4 differ"):
        take_turns({"a": clock.side("a", [1.0]), "b": clock.side("b", [1.0])}, 1, check)
    assert clock.order == ["a", "b"]


def test_spread_is_numpys_quantiles() -> None:
    values = list(np.random.default_rng(0).random(9))
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    assert spread(values) == Spread(median, low, high, 9)


def test_values_are_compared_to_a_share_of_the_largest() -> None:
    ours = np.array([1.0, np.nan, 100.0])
    assert "within 0.01" in same_values("row", "mass", ours, ours + np.array([0.9, 0, 0]), 0.01)
    with pytest.raises(ProbeError, match="`mass` is 1.1 apart"):
        same_values("row", "mass", ours, ours + np.array([1.1, 0, 0]), 0.01)
    with pytest.raises(ProbeError, match="not there for the same places"):
        same_values("row", "mass", ours, np.array([1.0, 2.0, 100.0]), 0.01)
    with pytest.raises(ProbeError, match="shape"):
        same_values("row", "mass", ours, ours[:2], 0.01)
    with pytest.raises(ProbeError, match="shape"):
        same_tokens("row", "a", [[1]], "b", [[1], [2]])


@pytest.mark.parametrize(
    ("target", "value", "met"),
    [
        (Target("at most", 1.01), 1.01, True),
        (Target("at most", 1.01), 1.02, False),
        (Target("at least", 1.4), 1.39, False),
        (Target("at least", 1.4), 2.0, True),
        (Target("reported"), 2.0, None),
    ],
)
def test_a_target_is_met_on_its_side_of_the_bound(target: Target, value: float, met: bool | None) -> None:
    line = Line("row", "what", target, Spread(value, value, value, 1))
    assert line.met is met and line.record()["met"] is met
    assert Line("row", "what", target).met is None


def test_numbers_have_their_unit() -> None:
    assert (written(0.05, "%"), written(0.18, "%"), written(1.0049, "x"), written(1.234, "s")) == (
        "5.00%", "18.0%", "1.005x", "1.23 s",
    )  # fmt: skip
    assert str(Target("at most", 0.03, "%")) == "≤ 3.00%"
