"""Selections made of selections: one after the other, side by side, per group, spread to neighbours.

The selections inside (`of`) are functions `pick(candidates, budget=..., left=...)`: out of the tokens with these
indices `(m,)` they choose some, best first. `budget` is what the combination may keep in all, `left` what of it is
left; None where it sets no bound.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field, PlainValidator
from torch import Tensor

from probe.registry import Nested, selections
from probe.selections.counts import Keep, OptionalKeep, Rounding, rounded
from probe.site import Choice


class Picker(Protocol):
    """A selection inside another one."""

    def __call__(self, candidates: Tensor, *, budget: int | None, left: int | None) -> Tensor:
        """Out of the tokens `candidates (m,)` int64 those that are chosen, `(k,)`, best first."""
        ...


Pick = Annotated[Picker, Nested("selection")]
"""A parameter that takes a selection."""


def _without(tokens: Tensor, gone: Tensor) -> Tensor:
    return tokens[~torch.isin(tokens, gone)]


@selections.register(gives=("part",), quiet=("keep", "round"))
def union(n: int, count: int | None, *, of: tuple[Pick, ...], keep: OptionalKeep = None) -> Choice:
    """What any of several selections keeps, each choosing from all tokens; the first one's tokens stand first."""
    everyone = torch.arange(n)
    kept: list[Tensor] = []
    for pick in of:
        found = pick(everyone, budget=count, left=count)
        kept.append(_without(found, torch.cat(kept)) if kept else found)
    return _chosen(kept, count)


@selections.register(gives=("part",), quiet=("keep", "round"))
def then(
    n: int, count: int | None, *, of: tuple[Pick, ...], keep: OptionalKeep = None, round: Rounding = "floor"
) -> Choice:
    """Several selections one after the other, each choosing from what those before it left.

    With `keep`, that is what they may keep together: inside, `keep: {budget: 0.5}` is a share of it and `keep: rest`
    what is left of it. Without, each says its own. VisionZip (dominant tokens, then contextual ones), HiPrune,
    VisPruner.
    """
    rest, left = torch.arange(n), count
    kept: list[Tensor] = []
    for pick in of:
        found = pick(rest, budget=count, left=left)
        kept.append(found)
        rest = _without(rest, found)
        left = None if left is None else left - found.shape[0]
    return _chosen(kept, count)


def _chosen(kept: list[Tensor], count: int | None) -> Choice:
    part = torch.cat([torch.full_like(found, i) for i, found in enumerate(kept)])
    return Choice(torch.cat(kept)[:count], None, part[:count], len(kept))


@selections.register
def dilate(
    n: int,
    columns: int,
    count: int | None = None,
    budget: int | None = None,
    *,
    of: Pick,
    offsets: tuple[int, ...] = (-1, 1),
    rows: tuple[int, ...] = (-1, 1),
) -> Tensor:
    """What a selection keeps and its neighbours in raster order: so many tokens (`offsets`), so many `rows` away.

    HiPrune (Liu et al., 2025, arXiv 2508.00553): anchors, and buffers at -1, +1, one row up and one row down, by flat
    index (the end of one row is next to the start of the following one), held inside the picture. `columns` are the
    tokens per row. The chosen ones stand first.
    """
    core = of(torch.arange(n), budget=budget, left=count)
    around = [*offsets, *(r * columns for r in rows)]
    near = torch.cat([core, *((core + step).clamp(0, max(n - 1, 0)) for step in around)])
    return torch.cat([core, _without(near.unique(), core)])


@dataclass(frozen=True)
class Groups:
    """How tokens are divided: by `view`, into contiguous `crops`, or into square `window`s of the view's grid."""

    by: Literal["view", "crops", "window"]
    number: int = 0

    def __str__(self) -> str:
        return self.by if self.by == "view" else f"{{{self.by}: {self.number}}}"


def _groups(value: Any) -> Groups:
    if isinstance(value, Groups):
        return value
    if value == "view":
        return Groups("view")
    if isinstance(value, dict) and len(value) == 1:
        ((by, number),) = value.items()
        if by in ("crops", "window") and isinstance(number, int) and not isinstance(number, bool) and number >= 1:
            return Groups(by, number)
    raise ValueError("groups must be view, {crops: 16} or {window: 3}")


def group_of(groups: Groups, n: int, view: Tensor | None = None, columns: int | None = None) -> Tensor:
    """The group of each of n tokens, `(n,)` int64 from 0.

    `view`: by `view (n,)`. `crops: c`: c runs of neighbouring tokens, the first `n % c` of them one longer. `window:
    s`: squares of s x s tokens of a grid with `columns` tokens per row, row by row.
    """
    here = torch.arange(n)
    if groups.by == "view":
        assert view is not None
        return view.long().unique(return_inverse=True)[1]
    if groups.by == "crops":
        base, longer = divmod(n, groups.number)
        sizes = torch.tensor([base + (i < longer) for i in range(groups.number)])
        return torch.arange(groups.number).repeat_interleave(sizes)
    assert columns is not None
    across = -(-columns // groups.number)
    return (here // columns // groups.number) * across + here % columns // groups.number


@selections.register(gives=("into",))
def window(n: int, columns: int, *, side: Annotated[int, Field(ge=1)] = 2) -> Choice:
    """Squares of a view's grid: the first token of each stays, the others are matched to it.

    With `merge` it is pooling: the mean of every `side` x `side` tokens, smaller squares at the edges. `columns` are
    the tokens per row; the grid must stand row by row without separators, as at the encoder's output.
    """
    group = group_of(Groups("window", side), n, columns=columns)
    count = int(group.max()) + 1 if n else 0
    first = torch.full((count,), n).scatter_reduce_(0, group, torch.arange(n), "amin")
    return Choice(first, first[group])


def _reads(params: Mapping[str, Any]) -> Collection[str]:
    return {"n", "count", "group", "score"}


@selections.register(reads=_reads)
def budget(
    n: int,
    count: int,
    group: Tensor,
    score: Tensor,
    *,
    keep: Keep,
    of: Pick,
    groups: Annotated[Groups, PlainValidator(_groups)] = Groups("view"),
    shares: Literal["proportional", "softmax"] = "proportional",
    temperature: float = 10.0,
    round: Rounding = "floor",
) -> Tensor:
    """A share of the budget for each group of tokens, by the group's score; `of` chooses inside each.

    `proportional` (HoloV, Zou et al., 2025): by the mean score, rounded down; what remains goes one each to the best
    groups; a group smaller than its share gives all it has. `softmax` (GlobalCom2, Liu et al., AAAI 2026, arXiv
    2501.05179): with R the share to keep, group i keeps `R (1 + p_i - mean p)` of itself, at most all, with p the
    softmax of `sum of its scores / temperature` over the groups, rounded by `round`; where the groups are views, the
    base view keeps R of itself. Inside, `keep: rest` is the group's share. Scores see which `group` a token is in.
    """
    group = group.cpu()
    members = [(group == g).nonzero()[:, 0] for g in range(int(group.max()) + 1 if n else 0)]
    sizes = [m.shape[0] for m in members]
    if shares == "proportional":
        counts = _proportional([float(score[m].double().mean()) if len(m) else 0.0 for m in members], sizes, count)
    else:
        totals = [float(score[m].double().sum()) for m in members]
        ratio = keep if isinstance(keep, float) else count / max(n, 1)
        counts = _softmax(totals, sizes, ratio, temperature, groups.by == "view", round)
    found = [of(m, budget=k, left=k) for m, k in zip(members, counts, strict=True)]
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64)


def _proportional(means: list[float], sizes: list[int], count: int) -> list[int]:
    total = sum(means)
    share = [m / total if total > 0 else 1 / len(means) for m in means]
    counts = [int(s * count) for s in share]
    best = sorted(range(len(share)), key=lambda i: -share[i])
    for i in best[: count - sum(counts)]:
        counts[i] += 1
    return [min(c, n) for c, n in zip(counts, sizes, strict=True)]


def _softmax(
    totals: list[float], sizes: list[int], ratio: float, temperature: float, base: bool, rounding: Rounding
) -> list[int]:
    first = int(base)
    p = (torch.tensor(totals[first:], dtype=torch.float64) / temperature).softmax(0)
    scale = (ratio * (1 + p - p.mean())).clamp(max=1.0).tolist() if len(p) else []
    return [rounded(s, n, rounding) for s, n in zip([ratio] * first + scale, sizes, strict=True)]
