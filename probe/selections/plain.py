"""Selections that look at one number per token, at its place, or at nothing."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import PlainValidator
from torch import Tensor

from probe.errors import ProbeError
from probe.registry import selections
from probe.selections.counts import Keep, OptionalKeep, Rounding, outlier_share, upper_fence
from probe.selections.ranking import ranked


@selections.register
def top_k(score: Tensor, count: int, *, keep: Keep, round: Rounding = "floor") -> Tensor:
    """The `count` highest scores."""
    return ranked(score)[:count]


@dataclass(frozen=True)
class Fence:
    """The upper fence of the scores: `Q3 + iqr * (Q3 - Q1)`."""

    iqr: float

    def __str__(self) -> str:
        return f"{{iqr: {self.iqr:g}}}"


def _value(value: Any) -> Any:
    if value == "mean" or isinstance(value, Fence):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, dict) and list(value) == ["iqr"] and isinstance(value["iqr"], int | float):
        return Fence(float(value["iqr"]))
    raise ValueError("value must be a number, mean, or {iqr: 1.5}")


@selections.register
def threshold(
    score: Tensor, *, value: Annotated[float | str | Fence, PlainValidator(_value)], inclusive: bool = False
) -> Tensor:
    """The tokens whose score is above a value: a number, the `mean`, or the fence `{iqr: 1.5}`; best first.

    `inclusive` keeps those that reach it, too. SparseVLM chooses its raters by the mean.
    """
    if isinstance(value, Fence):
        limit = upper_fence(score, value.iqr)
    else:
        limit = score[~score.isnan()].mean() if isinstance(value, str) else torch.tensor(value)
    above = score >= limit if inclusive else score > limit
    return ranked(score)[: int(above.sum())]


@dataclass(frozen=True)
class ByOutliers:
    """A step that is the wider the fewer outliers there are: `int(int(1 / share of outliers) / divisor)`."""

    iqr: float
    divisor: int

    def __str__(self) -> str:
        return f"{{iqr: {self.iqr:g}, divisor: {self.divisor}}}"


def _step(value: Any) -> Any:
    if value is None or isinstance(value, ByOutliers):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    if isinstance(value, dict) and set(value) == {"iqr", "divisor"}:
        iqr, divisor = value["iqr"], value["divisor"]
        if isinstance(iqr, int | float) and isinstance(divisor, int) and divisor >= 1:
            return ByOutliers(float(iqr), divisor)
    raise ValueError("step must be a whole number of at least 1, or {iqr: 1.5, divisor: 3}")


def _reads(params: Mapping[str, Any]) -> Collection[str]:
    names = {"n", "count", "alive", "candidate", "budget"}
    return names | {"score"} if isinstance(params.get("step"), ByOutliers) else names


@selections.register(reads=_reads, one_of=("keep", "step"), quiet=("keep", "round", "step", "over", "leave_last"))
def stride(
    n: int,
    count: int | None,
    alive: int,
    candidate: Tensor,
    budget: int | None = None,
    score: Tensor | None = None,
    *,
    keep: OptionalKeep = None,
    round: Rounding = "floor",
    step: Annotated[int | ByOutliers | None, PlainValidator(_step)] = None,
    over: Literal["rest", "all"] = "rest",
    leave_last: bool = False,
) -> Tensor:
    """Every so many-th token, in raster order.

    With `keep`, the step is `max(1, n // count)` and the first `count` samples are kept (VisionZip's targets). `over:
    all` lays the samples over all visual tokens, whoever chose them already, with the step of the whole `budget`, and
    keeps those that are left (PruMerge+ as EffiVLM-Bench has it). With `step` all samples are kept: a number, or `{iqr:
    1.5, divisor: 3}`, which is `int(int(1 / share of outliers of the score) / 3)` (PruMerge+, Shang et al., 2024, arXiv
    2403.15388); `leave_last` stops one before the end, as its fixed range 575 of 576 does.
    """
    length = alive if over == "all" else n
    wide = _width(step, score) if step is not None else max(1, length // max(_total(count, budget, over), 1))
    samples = torch.arange(0, length - leave_last, wide)
    if over == "all":
        place = torch.full((alive,), -1, dtype=torch.int64)
        place[candidate.cpu()] = torch.arange(n)
        samples = place[samples]
        samples = samples[samples >= 0]
    return samples if step is not None else samples[:count]


def _total(count: int | None, budget: int | None, over: str) -> int:
    return budget if over == "all" and budget is not None else count or 0


def _width(step: int | ByOutliers, score: Tensor | None) -> int:
    if isinstance(step, int):
        return step
    assert score is not None
    share = outlier_share(score, step.iqr)
    wide = int(int(1 / share) / step.divisor) if share > 0 else 0
    if wide < 1:
        raise ProbeError(
            f"`stride`: {share:.1%} of the scores are outliers, which gives no step of at least 1 (divisor "
            f"{step.divisor}); use a fixed `step` or `keep`"
        )
    return wide


@selections.register(name="none")
def none_kept(n: int) -> Tensor:
    """Keep no visual token (what a withdrawal means)."""
    return torch.empty(0, dtype=torch.int64)


@selections.register(name="all")
def all_kept(n: int) -> Tensor:
    """Keep every visual token, in raster order."""
    return torch.arange(n)
