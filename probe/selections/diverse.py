"""Selections that keep what differs: DivPrune, ToDRE."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from probe.errors import ProbeError
from probe.registry import selections
from probe.selections.counts import Keep, Rounding
from probe.selections.ranking import ranked


def _reads(params: Mapping[str, Any]) -> Collection[str]:
    names = {"similarity", "count", "generator"}
    return names | {"score"} if params.get("start") == "top_score" else names


@selections.register(reads=_reads, quiet=("first", "objective"))
def greedy_diverse(
    similarity: Tensor,
    count: int,
    generator: torch.Generator,
    score: Tensor | None = None,
    *,
    keep: Keep,
    round: Rounding = "half_even",
    start: Literal["max_nearest", "random", "given", "top_score"] = "max_nearest",
    first: int | None = None,
    objective: Literal["max_min", "max_sum"] = "max_min",
) -> Tensor:
    """Diverse subset, greedily: repeatedly the token that is least like those already kept.

    `objective: max_min` (DivPrune, Alvar et al., CVPR 2025): argmax_j min_{i in S} (1 - sim_ij), farthest-point
    selection. `max_sum` (ToDRE, Li et al., 2025): argmax_j sum_{i in S} (1 - sim_ij). `start`: `max_nearest` the token
    whose nearest other token is farthest, `random` drawn from the generator (study's release), `given` the index
    `first`, `top_score` the best of the probe's score.
    """
    n = similarity.shape[0]
    if count <= 0 or n == 0:
        return torch.empty(0, dtype=torch.int64, device=similarity.device)
    similarity = torch.where(similarity.isnan(), torch.inf, similarity)
    pick = _first(similarity, generator, score, start, first)
    kept = [pick]
    # closeness[j]: how close j is to what is kept; kept tokens are pushed out of the running
    closeness = similarity.index_select(0, pick)[0].scatter(0, pick, torch.inf)
    for _ in range(min(count, n) - 1):
        pick = closeness.argmin(0, keepdim=True)
        kept.append(pick)
        more = similarity.index_select(0, pick)[0]
        closeness = torch.maximum(closeness, more) if objective == "max_min" else closeness + more
        closeness = closeness.scatter(0, pick, torch.inf)
    return torch.cat(kept)


def _first(
    similarity: Tensor, generator: torch.Generator, score: Tensor | None, start: str, first: int | None
) -> Tensor:
    n = similarity.shape[0]
    if start == "random":
        return torch.randint(n, (1,), generator=generator).to(similarity.device)
    if start == "given":
        if first is None or not 0 <= first < n:
            raise ProbeError(f"`greedy_diverse` with `start: given` needs `first`, the index of one of {n} tokens")
        return torch.tensor([first], device=similarity.device)
    if start == "top_score":
        assert score is not None
        return ranked(score)[:1]
    if n == 1:
        return torch.zeros(1, dtype=torch.int64, device=similarity.device)
    others = similarity.clone().fill_diagonal_(-torch.inf)
    return others.max(0).values.argmin(0, keepdim=True)
