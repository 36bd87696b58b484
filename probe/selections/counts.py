"""How many tokens stay: everything that a recipe may write behind `keep:`.

| spelling | keeps |
|---|---|
| `0.25`, `25%` | that share of the sample's original visual tokens |
| `64` | that many |
| `{share: 0.25, round: half_even, min: 1, spare: 1}` | a share, rounded; at least `min`, all but `spare` at most |
| `{number: 64, spare: 1}` | a number, likewise (SparseVLM's lists: never all of them) |
| `{rank: {scale: 9, bias: 6}}` | `int(scale * rank + bias)` (SparseVLM); all where the rank is full |
| `{iqr: 1.5}` | `int(n * share of scores above Q3 + 1.5 IQR)` (TRIM, PruMerge) |
| `{cumulative: one_minus_progress, round: half_even}` | the original number less `round(progress * original)` |
| `{budget: 0.5, round: floor}`, `rest` | inside a combination: a share of its `keep`; what is left of it |

A share is always of the original number, so a selection that is applied again, deeper or later, does not compound.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import PlainValidator
from torch import Tensor

from probe.errors import ProbeError
from probe.registry import nearest

Rounding = Literal["floor", "half_even", "truncate"]
"""Of `share * number`: down, where a share written in decimals loses no token to binary (0.29 of 100 is 29); to the
nearest, half to even; or Python's `int` of the product, as most releases have it (0.29 of 100 is 28)."""

RULES = ("share", "number", "rank", "iqr", "cumulative", "budget", "rest")


@dataclass(frozen=True)
class Count:
    """A count that a recipe spells as a mapping. `rule` is one of `RULES`, `value` and `bias` are its numbers."""

    rule: str
    value: float = 0
    bias: float = 0
    round: Rounding | None = None
    min: int = 0
    spare: int = 0
    spelled: Any = field(default=None, compare=False)

    def __str__(self) -> str:
        return _flow(self.spelled)

    @property
    def reads(self) -> frozenset[str]:
        """What the count has to be told of the tokens: their `score`, the `rank` of their attention, or nothing."""
        return frozenset({"iqr": ("score",), "rank": ("rank",)}.get(self.rule, ()))


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_flow(v)}" for k, v in value.items()) + "}"
    return str(value)


def _share(value: Any) -> float:
    if isinstance(value, str) and value.strip().endswith("%"):
        value = float(value.strip()[:-1]) / 100
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"a share to keep lies between 0 and 1 (or 0% and 100%), not {_flow(value)}")
    return float(value)


def _whole(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{what} must be a whole number of at least 0, not {_flow(value)}")
    return value


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{what} must be a number, not {_flow(value)}")
    return float(value)


def _keep(value: Any) -> int | float | Count:
    if isinstance(value, Count):
        return value
    if value == "rest":
        return Count("rest", spelled="rest")
    if isinstance(value, dict):
        return _mapping(value)
    if isinstance(value, bool) or not (isinstance(value, int | float) or _is_percent(value)):
        raise ValueError(
            "keep must be a share like 0.25 or 25%, a number of tokens like 64, or a mapping such as {iqr: 1.5}"
        )
    if isinstance(value, float) and not 0 <= value <= 1:
        raise ValueError(
            f"a share to keep lies between 0 and 1, not {value}; a number of tokens is written as an integer"
        )
    if isinstance(value, int) and value < 0:
        raise ValueError(f"cannot keep {value} tokens; a number is at least 0, a share lies between 0% and 100%")
    return value if isinstance(value, int) else _share(value)


def _is_percent(value: Any) -> bool:
    return isinstance(value, str) and value.strip().endswith("%") and value.strip()[:-1].replace(".", "", 1).isdigit()


def _mapping(value: dict[str, Any]) -> Count:
    named = [rule for rule in RULES if rule in value and rule != "rest"]
    options = {"round", "min", "spare"}
    if len(named) != 1:
        known = list(RULES[:-1])
        wrong = [key for key in value if key not in options and key not in known]
        hint = f"; {nearest(wrong[0], known)}" if wrong and not named else ""
        raise ValueError(f"keep as a mapping names one of {', '.join(known)}; this one is {_flow(value)}{hint}")
    if unknown := [key for key in value if key not in options and key != named[0]]:
        raise ValueError(f"keep: {named[0]} goes with {', '.join(sorted(options))}, not with `{unknown[0]}`")
    rounding = value.get("round")
    if rounding is not None and rounding not in get_args(Rounding):
        raise ValueError(f"round must be one of {', '.join(get_args(Rounding))}, not {_flow(rounding)}")
    rule, given, bias = named[0], value[named[0]], 0.0
    if rule in ("share", "budget"):
        number = _share(given)
    elif rule == "number":
        number = float(_whole(given, "number"))
    elif rule == "iqr":
        number = _number(given, "iqr")
    elif rule == "cumulative":
        if given != "one_minus_progress":
            raise ValueError(f"cumulative must be one_minus_progress, not {_flow(given)}")
        number = 0.0
    else:
        if not isinstance(given, dict) or set(given) - {"scale", "bias"} or "scale" not in given:
            raise ValueError(f"rank must be a mapping such as {{scale: 9, bias: 6}}, not {_flow(given)}")
        number, bias = _number(given["scale"], "scale"), _number(given.get("bias", 0), "bias")
    least, spare = _whole(value.get("min", 0), "min"), _whole(value.get("spare", 0), "spare")
    return Count(rule, number, bias, rounding, least, spare, value)


Keep = Annotated[int | float | Count, PlainValidator(_keep)]
"""How many tokens stay, in any of the spellings above; validated to `int`, `float` (a share) or `Count`."""

OptionalKeep = Annotated[
    int | float | Count | None, PlainValidator(lambda value: None if value is None else _keep(value))
]
"""The same, or nothing."""


def rounded(share: float, number: int, rounding: Rounding) -> int:
    """`share * number` as a whole number."""
    exact = share * number
    if rounding == "truncate":
        return int(exact)
    # 0.29 * 100 is 28.999999999999996: a share written in decimals must not lose a token to binary
    nearest = round(exact)
    if abs(exact - nearest) < 1e-9:
        return nearest
    return int(exact) if rounding == "floor" else nearest


def token_count(keep: int | float | Count, original: int, rounding: Rounding) -> int:
    """How many tokens a number, or a share of the sample's `original` visual tokens, means; never more than those."""
    return how_many(keep, original, original=original, rounding=rounding)


@dataclass(frozen=True)
class Around:
    """What stands around a selection inside a combination: its whole `keep`, and what is left of it."""

    budget: int
    left: int


def how_many(
    keep: int | float | Count,
    n: int,
    *,
    original: int,
    rounding: Rounding = "floor",
    progress: float | None = None,
    around: Around | None = None,
    score: Callable[[], Tensor] | None = None,
    rank: Callable[[], int] | None = None,
) -> int:
    """How many of `n` tokens stay, of a sample that began with `original`.

    `progress` is the share of the steps that are done when the choice takes effect; `score` and `rank` are asked only
    by the rules that read them. The result lies between 0 and n, and inside a combination at what is left of its
    budget.
    """
    if isinstance(keep, Count):
        wanted = _counted(keep, n, original, keep.round or rounding, progress, around, score, rank)
    else:
        wanted = keep if isinstance(keep, int) else rounded(keep, original, rounding)
    limit = n if around is None else min(n, around.left)
    return max(min(wanted, limit), 0)


def _counted(
    count: Count,
    n: int,
    original: int,
    rounding: Rounding,
    progress: float | None,
    around: Around | None,
    score: Callable[[], Tensor] | None,
    rank: Callable[[], int] | None,
) -> int:
    if count.rule in ("budget", "rest") and around is None:
        raise ProbeError(f"`keep: {count}` speaks of the `keep` of a combination around it, and there is none")
    spare = count.spare
    if count.rule == "share":
        wanted = rounded(count.value, original, rounding)
    elif count.rule == "number":
        wanted = int(count.value)
    elif count.rule == "cumulative":
        assert progress is not None
        wanted = original - rounded(progress, original, rounding)
    elif count.rule == "iqr":
        assert score is not None
        wanted = int(n * outlier_share(score(), count.value))
    elif count.rule == "rank":
        assert rank is not None
        found = rank()
        wanted, spare = (n, 0) if found >= n else (int(found * count.value + count.bias), max(spare, 1))
    else:
        assert around is not None
        wanted = around.left if count.rule == "rest" else rounded(count.value, around.budget, rounding)
    return min(max(wanted, count.min), n - spare)


def upper_fence(score: Tensor, factor: float) -> Tensor:
    """`Q3 + factor * (Q3 - Q1)` of the scores, quartiles interpolated linearly; float64."""
    values = score.double()
    q1, q3 = torch.quantile(values, torch.tensor([0.25, 0.75], dtype=values.dtype, device=values.device))
    return q3 + factor * (q3 - q1)


def outlier_share(score: Tensor, factor: float) -> float:
    """The share of scores above the upper fence."""
    if score.numel() == 0:
        return 0.0
    return float((score.double() > upper_fence(score, factor)).sum()) / score.numel()


def attention_rank(attended: Tensor) -> int:
    """The numerical rank of attention rows `(query, n)`, in float32 with torch's default tolerance (SparseVLM)."""
    return int(torch.linalg.matrix_rank(attended.float()))
