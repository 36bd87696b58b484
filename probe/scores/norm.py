"""The size of a token's vector."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from probe.registry import scores
from probe.scores.similarity import vectors


@scores.register(reads=lambda params: {params.get("space", "hidden")}, quiet=("space", "layer"))
def norm(
    hidden: Tensor | None,
    keys: Tensor | None = None,
    *,
    space: Literal["hidden", "keys"] = "hidden",
    layer: int = 0,
    p: Annotated[float, Field(gt=0)] = 2.0,
    sign: Literal[1, -1] = 1,
) -> Tensor:
    """The p-norm of each token's hidden state, or of its keys, all heads side by side.

    DART (Wen et al., EMNLP 2025) chooses its pivots by `space: keys, p: 1`.
    """
    return sign * vectors(hidden, None, keys, space, "full").norm(p, dim=-1)
