"""How alike visual tokens are: DivPrune, ToMe, FOLDER, HoloV and the study's progressive pruning."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from probe.registry import scores

Space = Literal["hidden", "embedding", "keys"]
"""What is compared: hidden states at the site, embeddings as they entered the language model, or attention keys."""


def vectors(
    hidden: Tensor | None, embedding: Tensor | None, keys: Tensor | None, space: Space, heads: Literal["mean", "full"]
) -> Tensor:
    """`(n, d)` float32: the vectors of a space; keys are averaged over the heads, or all heads laid side by side."""
    if space == "keys":
        assert keys is not None
        return keys.float().mean(0) if heads == "mean" else keys.float().transpose(0, 1).flatten(1)
    chosen = hidden if space == "hidden" else embedding
    assert chosen is not None
    return chosen.float()


def _space(params: Mapping[str, Any]) -> str:
    return str(params.get("space", "hidden"))


def _reads(params: Mapping[str, Any]) -> Collection[str]:
    return {_space(params), *(["group"] if params.get("stat", "pairwise") != "pairwise" else [])}


def _kind(params: Mapping[str, Any]) -> str:
    return "pairwise" if params.get("stat", "pairwise") == "pairwise" else "per_token"


def _pairs_flops(given: Mapping[str, Any]) -> int:
    """Two per multiply-add of all pairs, in the space that is compared."""
    found = next(x for x in (given.get("hidden"), given.get("embedding"), given.get("keys")) if x is not None)
    width = found.shape[-1]
    if given.get("keys") is not None and given.get("heads") == "full":
        width *= found.shape[0]
    return int(2 * given["n"] ** 2 * width)


@scores.register(kind=_kind, reads=_reads, flops=_pairs_flops, quiet=("heads", "layer"))
def similarity(
    hidden: Tensor | None,
    embedding: Tensor | None = None,
    keys: Tensor | None = None,
    group: Tensor | None = None,
    *,
    space: Space = "hidden",
    heads: Literal["mean", "full"] = "mean",
    layer: int = 0,
    stat: Literal["pairwise", "nearest", "mean", "variance"] = "pairwise",
    sign: Literal[1, -1] = 1,
) -> Tensor:
    """Cosine similarity between visual tokens: all pairs, or one statistic of each token's similarities to the others.

    `cos(x_i, x_j)` in float32. `stat: pairwise` is `(n, n)` (DivPrune, Alvar et al., CVPR 2025). `nearest`: the most
    similar other token; with `sign: -1` tokens without a double score highest (progressive pruning of the study, arXiv
    2511.15098). `mean`: over the others; `variance`: population variance over the others (HoloV, Zou et al., 2025). The
    three statistics look only at tokens of the same `group`; a token alone in its group gets 0 (`nearest`: -1).
    `space: keys` compares the keys of the layer that `layer` names, averaged over `heads` or all of them side by side.
    """
    unit = normalize(vectors(hidden, embedding, keys, space, heads), dim=-1)
    pairs = unit @ unit.T
    if stat == "pairwise":
        return sign * pairs
    n = pairs.shape[0]
    others = ~torch.eye(n, dtype=torch.bool, device=pairs.device)
    if group is not None:
        others &= group[:, None] == group
    if stat == "nearest":
        return sign * pairs.masked_fill(~others, -torch.inf).amax(1).clamp_min(-1.0)
    count = others.sum(1).clamp_min(1)
    mean = (pairs * others).sum(1) / count
    if stat == "mean":
        return sign * mean
    return sign * (((pairs - mean[:, None]) ** 2) * others).sum(1) / count


@scores.register(kind="features", reads=lambda params: {_space(params)}, quiet=("heads", "layer"))
def features(
    hidden: Tensor | None,
    embedding: Tensor | None = None,
    keys: Tensor | None = None,
    *,
    space: Space = "hidden",
    heads: Literal["mean", "full"] = "mean",
    layer: int = 0,
) -> Tensor:
    """No score yet: the vectors by which a selection such as `bipartite` compares tokens. `(n, d)` float32.

    ToMe (Bolya et al., ICLR 2023): `space: keys, heads: mean`. The study's release: `heads: full`.
    """
    return vectors(hidden, embedding, keys, space, heads)
