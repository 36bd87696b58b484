"""Tokens unlike a few pivots: DART."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from probe.registry import selections
from probe.selections.counts import Keep, Rounding
from probe.selections.ranking import ranked


def _flops(given: dict[str, Tensor | int]) -> int:
    hidden = given["hidden"]
    assert isinstance(hidden, Tensor)
    pivots = int(given.get("image", 4)) + int(given.get("text", 4))  # type: ignore[arg-type]
    return 2 * pivots * hidden.shape[0] * hidden.shape[1]


@selections.register(flops=_flops)
def pivots(
    score: Tensor,
    text_score: Tensor,
    hidden: Tensor,
    text_hidden: Tensor,
    row: Tensor,
    text_row: Tensor,
    count: int,
    *,
    keep: Keep,
    round: Rounding = "floor",
    image: int = 4,
    text: int = 4,
    order: Literal["score", "raster", "hash"] = "score",
) -> Tensor:
    """The visual pivots, and for every pivot the tokens least like it: image + (image + text) * (count // pivots).

    DART (Wen et al., EMNLP 2025, arXiv 2502.11494): the `image` visual and `text` text tokens with the highest score
    are pivots. In turn each takes `count // (image + text)` of the visual tokens that are still there, those least
    cosine-similar to it by `hidden`. The turn matters: visual pivots before text pivots, best first (`score`); by their
    place in the sequence (`raster`); or as a set of their rows is iterated in CPython (`hash`, as LightCompress's port
    does).
    """
    chosen, spoken = ranked(score)[:image], ranked(text_score)[:text]
    each = count // max(image + text, 1)
    rows = torch.cat([row[chosen], text_row[spoken]])
    unit, text_unit = normalize(hidden.float(), dim=-1), normalize(text_hidden.float(), dim=-1)
    likeness = torch.cat([unit[chosen], text_unit[spoken]]) @ unit.T
    free = torch.ones(hidden.shape[0], dtype=torch.bool, device=hidden.device)
    free[chosen] = False
    kept = [chosen]
    for turn in pivot_turns(rows.tolist(), order):
        away = torch.where(free, -likeness[turn], -torch.inf)
        found = ranked(away)[: min(each, int(free.sum()))]
        free[found] = False
        kept.append(found)
    return torch.cat(kept)


def pivot_turns(rows: list[int], order: Literal["score", "raster", "hash"]) -> list[int]:
    """In which order pivots at these rows of the sequence take their turn, as indices into `rows`."""
    if order == "score":
        return list(range(len(rows)))
    turns = sorted(rows) if order == "raster" else list(set(rows))
    return [rows.index(r) for r in turns]
