"""Selections: scores of one sample's visual tokens in, indices of the kept ones out. Pure functions.

Positional parameters are tensors: `score (n,)` or `similarity (n, n)`, float32, higher means keep; `count`, how many to
keep (worked out from `keep` and `round`); `generator`, seeded per sample, probe and step. They return `(k,)` int64
indices into the n alive visual tokens, in the order of preference.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator
from torch import Tensor

from probe.registry import selections

Rounding = Literal["floor", "half_even"]


def _keep(value: Any) -> Any:
    if isinstance(value, str) and value.strip().endswith("%"):
        value = float(value.strip()[:-1]) / 100
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("keep must be a share like 0.25 or 25%, or a number of tokens like 64")
    if isinstance(value, float) and not 0 <= value <= 1:
        raise ValueError(
            f"a share to keep lies between 0 and 1, not {value}; a number of tokens is written as an integer"
        )
    if isinstance(value, int) and value < 0:
        raise ValueError(f"cannot keep {value} tokens")
    return value


Keep = Annotated[int | float, BeforeValidator(_keep)]
"""A float in [0, 1] or "25%": a share of the sample's original visual tokens. An integer: a number of tokens."""


def token_count(keep: int | float, original: int, rounding: Rounding) -> int:
    """How many tokens `keep` means for a sample that began with `original` visual tokens.

    Always of the original number, so applying a selection again, deeper or later, does not compound.
    `half_even` is Python's `round`, `floor` is `int`; never more than `original`.
    """
    if isinstance(keep, int):
        return min(keep, original)
    exact = keep * original
    # 0.29 * 100 is 28.999999999999996: a share written in decimals must not lose a token to binary
    nearest = round(exact)
    if abs(exact - nearest) < 1e-9:
        return nearest
    return int(exact) if rounding == "floor" else nearest


def ranked(score: Tensor) -> Tensor:
    """Indices by descending score; ties stand in raster order, NaN last (it must never become a kept token)."""
    return torch.where(score.isnan(), -torch.inf, score).sort(descending=True, stable=True).indices


@selections.register
def top_k(score: Tensor, count: int, *, keep: Keep, round: Rounding = "floor") -> Tensor:
    """The `count` highest scores."""
    return ranked(score)[:count]


@selections.register(kind="pairwise")
def greedy_diverse(
    similarity: Tensor,
    count: int,
    generator: torch.Generator,
    *,
    keep: Keep,
    round: Rounding = "half_even",
    start: Literal["max_nearest", "random"] = "max_nearest",
) -> Tensor:
    """Farthest-point selection: repeatedly the token least similar to its nearest kept one (max-min diversity).

    DivPrune (Alvar et al., CVPR 2025): argmax_j min_{i in S} (1 - sim_ij). `max_nearest` starts at the token whose
    nearest other token is farthest; `random` at a token drawn from the generator.
    """
    n = similarity.shape[0]
    if count <= 0:
        return torch.empty(0, dtype=torch.int64, device=similarity.device)
    similarity = torch.where(similarity.isnan(), torch.inf, similarity)
    if start == "random":
        first = torch.randint(n, (1,), generator=generator).to(similarity.device)
    elif n == 1:
        first = torch.zeros(1, dtype=torch.int64, device=similarity.device)
    else:
        others = similarity.clone().fill_diagonal_(-torch.inf)
        first = others.max(0).values.argmin(0, keepdim=True)
    kept = [first]
    # nearest[j]: similarity of j to the most similar kept token; kept ones are pushed out of the running
    nearest = similarity.index_select(0, first)[0].scatter_(0, first, torch.inf)
    for _ in range(count - 1):
        pick = nearest.argmin(0, keepdim=True)
        kept.append(pick)
        nearest = torch.maximum(nearest, similarity.index_select(0, pick)[0]).scatter_(0, pick, torch.inf)
    return torch.cat(kept)


@selections.register(name="none")
def none_kept(n: int) -> Tensor:
    """Keep no visual token (what a withdrawal means)."""
    return torch.empty(0, dtype=torch.int64)
