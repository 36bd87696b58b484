"""Scores: how much each visual token of one sample is worth. Pure functions; higher means keep.

Positional parameters are the tensors that a score needs, of one sample with n alive visual tokens: `hidden (n, width)`
at the probe's site; `embedding (n, width)` as they entered the language model; `received (head, n)` float32, the
attention that each token receives in the layer that `layer` names, averaged over the query rows; `n` itself;
`generator`, seeded per sample, probe and step. They return `(n,)` float32, or `(n, n)` where the recipe asks for all
pairs. A score with matrix products of its own says what they cost: `@scores.register(flops=function of (n, width))`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from probe.attend import Form
from probe.cost import pairwise
from probe.registry import scores
from probe.site import QuerySet


@scores.register
def attention(
    received: Tensor,
    *,
    queries: QuerySet = "last",
    layer: int = 0,
    heads: Literal["mean", "max"] = "mean",
    form: Form = "softmax",
) -> Tensor:
    """Attention that each visual token receives, averaged over the query rows, then over the heads.

    FastV (Chen et al., ECCV 2024): `queries: last, layer: -1, heads: mean`, the last row of the layer before.
    `layer` is relative to the probe's own: 0 is its own attention (known from `layer.after_attention` on), -1 the
    layer before. Rows are reduced as they come, so `queries: all` forms no square map.
    """
    return received.mean(0) if heads == "mean" else received.amax(0)


@scores.register
def random(n: int, generator: torch.Generator) -> Tensor:
    """Uniform noise: with `top_k` a random subset, the baseline every pruner must beat."""
    return torch.rand(n, generator=generator)


def _similarity_kind(params: dict[str, Any]) -> str:
    return "pairwise" if params.get("stat", "pairwise") == "pairwise" else "per_token"


@scores.register(kind=_similarity_kind, flops=pairwise)
def similarity(
    hidden: Tensor,
    embedding: Tensor,
    *,
    space: Literal["hidden", "embedding"] = "hidden",
    stat: Literal["pairwise", "nearest", "mean"] = "pairwise",
    sign: Literal[1, -1] = 1,
) -> Tensor:
    """Cosine similarity between visual tokens: all pairs, or each token's nearest other / mean over the others.

    `cos(x_i, x_j)` in float32. With `stat: nearest, sign: -1` the tokens without a double score highest
    (progressive pruning of the study, arXiv 2511.15098).
    """
    unit = normalize((hidden if space == "hidden" else embedding).float(), dim=-1)
    pairs = unit @ unit.T
    if stat == "pairwise":
        return sign * pairs
    n = pairs.shape[0]
    if stat == "nearest":
        return sign * pairs.fill_diagonal_(-torch.inf).amax(1)
    return sign * (pairs.sum(1) - pairs.diagonal()) / max(n - 1, 1)


@scores.register
def norm(hidden: Tensor, *, p: float = 2.0, sign: Literal[1, -1] = 1) -> Tensor:
    """The p-norm of each token's hidden state."""
    return sign * hidden.float().norm(p, dim=-1)
