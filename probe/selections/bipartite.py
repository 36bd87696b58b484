"""Parity matching: ToMe, FOLDER, and VisPruner's removal of doubles."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from probe.registry import Nested, selections
from probe.selections.counts import Keep, OptionalKeep, Rounding
from probe.selections.ranking import ranked
from probe.site import Choice

Scorer = Annotated[Callable[[], Tensor], Nested("score")]
"""A score `(n,)` of the tokens to choose from, as a parameter."""


def _flops(given: Mapping[str, Any]) -> int:
    """Similarities of one half to the other."""
    n, width = given["features"].shape
    return int(2 * ((n + 1) // 2) * (n // 2) * width)


def _flops_of_rounds(given: Mapping[str, Any]) -> int:
    """The same for every round, each with what is left."""
    n, width = given["features"].shape
    left = n - (given["count"] or 0) if given["r"] is None else given["r"]
    total, free = 0, n - int(given["protected"].sum())
    while left > 0:
        total += 2 * ((n + 1) // 2) * (n // 2) * width
        merged = min(left, (n - 1) // 2, free // 2)
        if given["rounds"] == "one" or merged == 0:
            break
        n, free, left = n - merged, free - merged, left - merged
    return int(total)


@selections.register(
    flops=_flops_of_rounds,
    gives=("into",),
    one_of=("r", "keep"),
    quiet=("r", "keep", "round", "rounds", "strength"),
)
def bipartite(
    features: Tensor,
    count: int | None,
    protected: Tensor,
    size: Tensor,
    *,
    r: Annotated[int, Field(ge=0)] | None = None,
    keep: OptionalKeep = None,
    round: Rounding = "floor",
    rounds: Literal["one", "until"] = "one",
    spare: Scorer | None = None,
    strength: float = 1.0,
) -> Choice:
    """Match every other token with the most similar of the rest; the `r` best matches say who is merged into whom.

    ToMe (Bolya et al., ICLR 2023): A = even, B = odd tokens; each a in A has its best partner b(a) = argmax cos and
    weight w(a); the r heaviest a go into theirs, at most `(n - protected) // 2`. `protected` tokens are never merged
    and never merged into. Kept are the unmatched A, heaviest match first (raster order where A holds a protected one),
    then all of B, in that order. `keep` in place of `r` says how many remain.

    `rounds: until` repeats on the merged features (means weighted by `size`, back in raster order) until r are gone, at
    most `(n - 1) // 2` in a round (FOLDER, Wang et al., 2025, arXiv 2501.02430). `spare`, a score `(n,)`, lowers the
    weight w(a) by `strength` times that of a, so that tokens of a high score are rather not merged (FOLDER's turbo
    variant: the class token's attention, `strength` 30 alpha; that later rounds take the mean over what was merged,
    weighted by `size`, is our reading). Returns `kept` and `into`.
    """
    n = features.shape[0]
    left = n - (count or 0) if r is None else r
    spared = features.new_zeros(n, dtype=torch.float32) if spare is None else strength * spare().float()
    if rounds == "one":
        return _matched(features.float(), protected, left, spared)
    return _repeated(features.float(), protected, size.float(), left, spared)


def _matched(features: Tensor, protected: Tensor, r: int, spared: Tensor) -> Choice:
    n = features.shape[0]
    unit = normalize(features, dim=-1)
    edges = unit[0::2] @ unit[1::2].T
    edges = edges.masked_fill(protected[0::2, None], -torch.inf).masked_fill(protected[None, 1::2], -torch.inf)
    here = torch.arange(n, device=features.device)
    free_a, free_b = int((~protected[0::2]).sum()), int((~protected[1::2]).sum())
    r = max(min(r, (n - int(protected.sum())) // 2, free_a if free_b else 0), 0)
    if r == 0:
        return Choice(here, here)
    weight, partner = edges.max(1)
    order = ranked(weight - spared[0::2])
    source, rest = order[:r], order[r:]
    if protected[0::2].any():
        rest = rest.sort().values
    into = here.clone()
    into[2 * source] = 2 * partner[source] + 1
    return Choice(torch.cat([2 * rest, here[1::2]]), into)


def _repeated(features: Tensor, protected: Tensor, size: Tensor, r: int, spared: Tensor) -> Choice:
    """Rounds of matching on what is left, in raster order, each on the means of what was merged before."""
    into = torch.arange(features.shape[0], device=features.device)
    alive = into
    while r > 0:
        most = (alive.shape[0] - 1) // 2
        found = _matched(features, protected[alive], min(r, most), spared)
        assert found.into is not None
        kept = found.kept.sort().values
        merged = alive.shape[0] - kept.shape[0]
        if merged == 0:
            break
        into = alive[found.into][_place(into, alive)]
        weights = torch.zeros_like(size).scatter_add_(0, found.into, size)
        sums = torch.zeros_like(features).index_add_(0, found.into, features * size[:, None])
        spares = torch.zeros_like(spared).index_add_(0, found.into, spared * size)
        size = weights[kept]
        features, spared = sums[kept] / size[:, None], spares[kept] / size
        alive = alive[kept]
        r -= merged
    return Choice(alive, into)


def _place(tokens: Tensor, alive: Tensor) -> Tensor:
    """Where `tokens` stand among the ascending `alive` ones."""
    return torch.searchsorted(alive, tokens)


@selections.register(flops=_flops)
def deduplicate(
    features: Tensor, score: Tensor, count: int, *, keep: Keep, round: Rounding = "floor", step: int = 8
) -> Tensor:
    """Take doubles away until `count` tokens are left, at most `step` at a time.

    VisPruner (Zhang et al., ICCV 2025, arXiv 2412.01818): the tokens stand in descending score. Each one at an even
    place is as much a double as its highest cosine similarity to those at odd places; the `step` worst doubles go, the
    other even ones, most similar first, then stand before the odd ones, and it begins again. A single token that is
    left has nothing to be a double of (where the original fails) and stays.
    """
    unit = normalize(features.float(), dim=-1)
    order = ranked(score)
    while order.shape[0] > max(count, 1):
        even, odd = order[0::2], order[1::2]
        doubled = (unit[even] @ unit[odd].T).amax(1)
        gone = min(step, order.shape[0] - count, even.shape[0])
        order = torch.cat([even[ranked(doubled)[gone:]], odd])
    return order[:count]


def merges_per_layer(r: int | Sequence[int] | tuple[int, float], layers: int, *, inflection: bool = False) -> list[int]:
    """How many tokens ToMe merges in each layer, from its three spellings.

    A number: the same in every layer. A list: as it is, padded with 0. With `inflection`, `(r, f)`: a line from
    `int(r (1 - f))` in the first layer to `2 r` less that in the last, cut to whole numbers; f = -1 begins with 2 r and
    ends with 0, f = 0 is constant.
    """
    if isinstance(r, int):
        return [r] * layers
    if not inflection:
        return [int(x) for x in r] + [0] * max(layers - len(r), 0)
    mean, bend = r
    first = int(mean * (1.0 - bend))
    slope = (2 * mean - 2 * first) / max(layers - 1, 1)
    return [int(first + slope * i) for i in range(layers)]
