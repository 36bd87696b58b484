"""Operations that fold the other tokens into kept ones, or into a new one: ToMe, FOLDER, VisionZip, PruMerge, TRIM."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from probe.operations.options import QUIET, AnswerPositions, Lasts, OnCache, Ordering, Protect, reading
from probe.operations.plans import dropped, places, standing, sums
from probe.registry import operations
from probe.scores import Vectors
from probe.site import Fate, Plan
from probe.surgery import Positions

Assign = Literal["selection", "kept", "targets"]
Mode = Literal["mean", "size_mean", "add_mean", "add_weighted"]
Extra = Literal["none", "mean", "weighted"]


def _reads(params: Mapping[str, Any]) -> Collection[str]:
    names = {*reading("kept", "hidden", "size")(params)}
    if params.get("mode") == "add_weighted" or params.get("append") == "weighted":
        names.add("score")
    if params.get("mode") == "add_weighted" and params.get("neighbours") is not None:
        return names
    if params.get("assign", "selection") == "selection":
        names.add("into")
    return names | {"part", "parts"} if params.get("assign") == "targets" else names


def _flops(given: Mapping[str, Any]) -> int:
    """Similarities of tokens to those that they may join, sums over neighbours, weighted sums."""
    n, width = given["hidden"].shape
    k, by = given["kept"].shape[0], given.get("by")
    compared = width if by is None else by().shape[1]
    extra = 2 * (n - k) * width if given["append"] == "weighted" else 0
    if given["mode"] == "add_weighted" and given["neighbours"] is not None:
        return int(2 * k * n * (compared + width)) + extra
    if given["assign"] == "selection" or k == 0:
        return extra
    targets = k if given["assign"] == "kept" else _last(given["kept"], given["part"], given["parts"]).shape[0]
    return int(2 * (n - k) * targets * compared) + extra


@operations.register(reads=_reads, flops=_flops, quiet=QUIET)
def merge(
    kept: Tensor,
    into: Tensor | None,
    part: Tensor | None,
    parts: int,
    hidden: Tensor,
    size: Tensor,
    score: Tensor | None = None,
    *,
    assign: Assign = "selection",
    by: Vectors | None = None,
    mode: Mode = "size_mean",
    neighbours: int | None = None,
    append: Extra = "none",
    carry_size: bool = False,
    scale: Literal["none", "log_size"] = "none",
    positions: Positions = "keep",
    order: Ordering = "raster",
    lasts: Lasts = "forward",
    answer_positions: AnswerPositions = "original",
    on_cache: OnCache = "refresh",
    protect: Protect = (),
) -> Plan:
    """Fold the other tokens into kept ones.

    Into which: `assign: selection` as `bipartite` matched them (ToMe, FOLDER); `kept`, the most similar kept token;
    `targets`, the most similar token of the last part of a combination (VisionZip). Similarity is the cosine of `by`, a
    score of vectors (`{features: {space: keys}}`), else of hidden states.

    How: `size_mean` `sum s_i x_i / sum s_i` over a token and what joins it, s the original tokens behind each (ToMe);
    `mean` without s; `add_mean` the token plus the mean of what joins it (VisionZip); `add_weighted` the token plus the
    sum of score times hidden state of its `neighbours` most similar other tokens, kept ones too, not normalised
    (PruMerge, Shang et al., 2024); without `neighbours`, of what joins it.

    `append` makes one more token of all the others: their mean, or the sum of their scores times hidden states.
    `carry_size` hands on how many original tokens stand behind each, for a log-size attention bias; `scale: log_size`
    multiplies by `1 + ln size` (FOLDER).
    """
    n, stand = hidden.shape[0], standing(kept, order, part)
    k = stand.shape[0]
    vectors = hidden.float() if by is None else by().float()
    x, place = hidden.float(), places(stand, n)
    if mode == "add_weighted" and neighbours is not None:
        joined, values = _neighbours(x, vectors, _weights(score), stand, place, neighbours)
    else:
        targets = stand if assign == "kept" else _last(kept, part, parts) if assign == "targets" else None
        joined = _joined(place, into, targets, vectors)
        values = _pooled(x, joined, place, size, score, mode, k)
    gone = dropped(stand, n)
    if append != "none" and gone.numel() > 0:
        values = torch.cat([values, _extra(x[gone], append, None if score is None else score[gone])[None]])
        joined = torch.where(joined < 0, k, joined)
    sizes = sums(size.float(), joined, values.shape[0])
    if scale == "log_size":
        values = values * (1 + sizes.clamp_min(1).log())[:, None]
    return Plan(
        stand,
        Fate.MERGED,
        joined,
        values.to(hidden.dtype),
        sizes if carry_size else None,
        values.shape[0] - k,
    )


def _weights(score: Tensor | None) -> Tensor:
    assert score is not None
    return score.float()


def _last(kept: Tensor, part: Tensor | None, parts: int) -> Tensor:
    """The tokens that the last part of a combination chose."""
    assert part is not None
    return kept[part == parts - 1]


def _joined(place: Tensor, into: Tensor | None, targets: Tensor | None, vectors: Tensor) -> Tensor:
    """The place of every token: its own, or that of the kept token it joins, -1 for none. `(n,)` int64.

    Without `targets`, `into` says which token each one joins; with them, the most similar does.
    """
    if targets is None:
        assert into is not None
        return torch.where(place >= 0, place, torch.where(into >= 0, place[into.clamp_min(0)], -1))
    if targets.numel() == 0:
        return place
    gone = (place < 0).nonzero()[:, 0]
    unit = normalize(vectors, dim=-1)
    nearest = (unit[gone] @ unit[targets].T).argmax(1)
    return place.index_copy(0, gone, place[targets[nearest]])


def _pooled(x: Tensor, joined: Tensor, place: Tensor, size: Tensor, score: Tensor | None, mode: Mode, k: int) -> Tensor:
    """New hidden states `(k, width)` of the kept tokens, from themselves and what joined them."""
    if mode in ("size_mean", "mean"):
        weight = size.float() if mode == "size_mean" else torch.ones_like(size, dtype=torch.float32)
        return sums(x * weight[:, None], joined, k) / sums(weight, joined, k)[:, None]
    own = x.new_zeros(k + 1, x.shape[1]).index_copy(0, torch.where(place < 0, k, place), x)[:k]
    guests = torch.where(place >= 0, -1, joined)
    if mode == "add_weighted":
        return own + sums(x * _weights(score)[:, None], guests, k)
    count = sums(torch.ones_like(x[:, 0]), guests, k).clamp_min(1)
    return own + sums(x, guests, k) / count[:, None]


def _neighbours(
    x: Tensor, vectors: Tensor, weight: Tensor, stand: Tensor, place: Tensor, neighbours: int
) -> tuple[Tensor, Tensor]:
    """Kept tokens plus the weighted sum of their most similar other ones. A token may help several; it counts as merged
    into the most similar of those that it helps.
    """
    if stand.numel() == 0:
        return place, x[stand]
    unit = normalize(vectors, dim=-1)
    likeness = unit[stand] @ unit.T
    likeness = likeness.scatter(1, stand[:, None], -torch.inf)  # nobody is a neighbour of itself
    most = min(neighbours, x.shape[0] - 1)
    near = likeness.sort(dim=1, descending=True, stable=True).indices[:, :most]
    chosen = torch.zeros_like(likeness).scatter(1, near, 1.0)
    values = x[stand] + (chosen * weight) @ x
    helped = torch.where(chosen > 0, likeness, -torch.inf)
    best, helper = helped.max(0)
    return torch.where(place >= 0, place, torch.where(best > -torch.inf, helper, -1)), values


def _extra(x: Tensor, what: Extra, score: Tensor | None) -> Tensor:
    return x.mean(0) if what == "mean" else _weights(score) @ x


def _append_reads(params: Mapping[str, Any]) -> Collection[str]:
    names = reading("kept", "hidden", "size")(params)
    return {*names, "score"} if params.get("what") == "weighted" else names


def _append_flops(given: Mapping[str, Any]) -> int:
    n, width = given["hidden"].shape
    return 2 * (n - given["kept"].shape[0]) * width if given["what"] == "weighted" else 0


@operations.register(reads=_append_reads, flops=_append_flops, quiet=QUIET)
def append(
    kept: Tensor,
    part: Tensor | None,
    hidden: Tensor,
    size: Tensor,
    score: Tensor | None = None,
    *,
    what: Literal["mean", "weighted"] = "mean",
    carry_size: bool = False,
    positions: Positions = "keep",
    order: Ordering = "raster",
    lasts: Lasts = "forward",
    answer_positions: AnswerPositions = "original",
    on_cache: OnCache = "refresh",
    protect: Protect = (),
) -> Plan:
    """Take the other tokens out and put one in their place, behind the kept ones: their mean, or a weighted sum.

    TRIM (Song et al., COLING 2025): the mean. PruMerge: the sum of scores times hidden states (`what: weighted`).
    """
    n, stand = hidden.shape[0], standing(kept, order, part)
    k, gone = stand.shape[0], dropped(stand, n)
    place = places(stand, n)
    if gone.numel() == 0:
        return Plan(stand, Fate.MERGED, place, hidden[stand], size[stand].float() if carry_size else None)
    extra = _extra(hidden[gone].float(), what, None if score is None else score[gone])
    into = torch.where(place < 0, k, place)
    values = torch.cat([hidden[stand], extra.to(hidden.dtype)[None]])
    return Plan(stand, Fate.MERGED, into, values, sums(size.float(), into, k + 1) if carry_size else None, 1)
