"""Scores that look at where a token is, or at nothing: the baselines; and the base view's opinion on its tiles."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from probe.registry import scores
from probe.site import Form, QuerySet


@scores.register
def random(n: int, generator: torch.Generator) -> Tensor:
    """Uniform noise: with `top_k` a random subset, the baseline every pruner must beat."""
    return torch.rand(n, generator=generator)


@scores.register
def uniform(n: int) -> Tensor:
    """Evenly spread: the best k tokens stand at about equal distances, whatever k.

    Token i scores minus its bit-reversed index (the van der Corput sequence), so the best `2^m` of `2^b` tokens are
    every `2^(b-m)`-th one. Where the wanted number is known, the selection `stride` is exact.
    """
    bits = max(n - 1, 0).bit_length()
    index = torch.arange(n)
    reversed_ = torch.zeros_like(index)
    for bit in range(bits):
        reversed_ |= ((index >> bit) & 1) << (bits - 1 - bit)
    return -reversed_.float()


@scores.register
def center(box: Tensor) -> Tensor:
    """Minus the distance of a token from the middle of its picture, in picture widths and heights.

    `box (n, 4)`: (x0, y0, x1, y1) as fractions. Newlines, which see nothing, get NaN and rank last.
    """
    middle = (box[:, :2] + box[:, 2:]).float() / 2
    return -(middle - 0.5).norm(dim=-1)


@scores.register
def thumbnail(
    received: Tensor,
    box: Tensor,
    view: Tensor,
    *,
    queries: QuerySet = "cls",
    layer: int = 0,
    form: Form = "softmax",
    mode: Literal["bilinear", "area"] = "bilinear",
) -> Tensor:
    """What the base view thinks of the place that each token sees: its attention there, for tokens of the tiles.

    GlobalCom2 (Liu et al., AAAI 2026, arXiv 2501.05179): the base view's class attention is a square map. `bilinear`
    resizes it to the tiles: a sample at the middle of every token's box. `area` integrates it over the box, so that
    sums over a tile are the attention that the base view pays to that region. `received (head, n)` is averaged over the
    heads; `view (n,)` is 0 for the base view, whose tokens stand row by row first and keep their own attention.
    Newlines get 0.
    """
    base = view == 0
    own = received.float().mean(0)
    side = round(int(base.sum()) ** 0.5)
    grid = own[base][: side * side].reshape(side, side)
    edges = box.float().nan_to_num(0.0) * side  # in patches of the base view
    if mode == "bilinear":
        middle = (edges[:, :2] + edges[:, 2:]) / 2 - 0.5
        seen = _sampled(grid, middle[:, 0], middle[:, 1])
    else:
        until = grid.new_zeros(side + 1, side + 1)
        until[1:, 1:] = grid.cumsum(0).cumsum(1)
        x0, y0, x1, y1 = edges.T
        seen = _sampled(until, x1, y1) - _sampled(until, x0, y1) - _sampled(until, x1, y0) + _sampled(until, x0, y0)
    return torch.where(base, own, torch.where(box[:, 0].isnan(), 0.0, seen))


def _sampled(grid: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Bilinear samples of `grid (side, side)` at fractional columns and rows, edges clamped."""
    last = grid.shape[0] - 1
    x, y = x.clamp(0, last), y.clamp(0, last)
    left, up = x.floor().long().clamp(max=max(last - 1, 0)), y.floor().long().clamp(max=max(last - 1, 0))
    right, down = (left + 1).clamp(max=last), (up + 1).clamp(max=last)
    across, along = x - left, y - up
    top = grid[up, left] * (1 - across) + grid[up, right] * across
    bottom = grid[down, left] * (1 - across) + grid[down, right] * across
    return top * (1 - along) + bottom * along
