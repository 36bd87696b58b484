"""Several scores as one: a weighted sum, each brought to a common scale first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from probe.errors import ProbeError
from probe.registry import Nested, scores

Scorer = Annotated[Callable[[], Tensor], Nested("score")]
"""A score inside another part, one number per token: called, it gives its values."""

Vectors = Annotated[Callable[[], Tensor], Nested("score", gives="features")]
"""A score of vectors inside another part."""

Normalise = Literal["none", "l2", "mean"]


def _fits(params: Mapping[str, Any], parts: Mapping[str, tuple[Any, ...]]) -> tuple[str, str] | None:
    """Weights and ways to normalise must be as many as there are scores."""
    n = len(parts["of"])
    for name, given in (("weights", params["weights"]), ("normalise", params["normalise"])):
        if given and not isinstance(given, str) and len(given) != n:
            return name, f"there are {n} scores, but {len(given)} here; give one for each"
    return None


@scores.register(check=_fits)
def combine(
    group: Tensor,
    *,
    of: tuple[Scorer, ...],
    weights: tuple[float, ...] = (),
    normalise: Normalise | tuple[Normalise, ...] = "none",
) -> Tensor:
    """Weighted sum of scores: `sum_i w_i s_i / |s_i|`, `(n,)` float32.

    `normalise` says what `|s|` is, for all scores or for each: 1 (`none`), the Euclidean norm (`l2`; GlobalCom2) or the
    mean (`mean`) over the tokens of the same `group`. `weights` default to 1. HoloV: attention and the variance of
    similarity.
    """
    values = [score().float() for score in of]
    factors = weights or (1.0,) * len(values)
    ways = (normalise,) * len(values) if isinstance(normalise, str) else normalise
    if len(factors) != len(values) or len(ways) != len(values):
        raise ProbeError(
            f"`combine` has {len(values)} scores, but {len(factors)} weights and {len(ways)} ways to normalise"
        )
    scaled = [w * _scaled(v, group, way) for v, w, way in zip(values, factors, ways, strict=True)]
    return torch.stack(scaled).sum(0)


def _scaled(value: Tensor, group: Tensor, way: Normalise) -> Tensor:
    if way == "none" or value.numel() == 0:
        return value
    groups = int(group.max()) + 1
    total = value.new_zeros(groups).scatter_add_(0, group, value**2 if way == "l2" else value)
    if way == "l2":
        size = total.sqrt()
    else:
        size = total / value.new_zeros(groups).scatter_add_(0, group, torch.ones_like(value)).clamp_min(1)
    size = torch.where(size == 0, 1.0, size)
    return value / size[group]
