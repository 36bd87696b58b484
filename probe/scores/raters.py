"""Which text tokens may judge the picture: SparseVLM's raters. The attention's `queries: raters` are chosen with it."""

from __future__ import annotations

from typing import Literal

from torch import Tensor


def relevance(embedding: Tensor, text: Tensor) -> Tensor:
    """How much each text token matters to the picture: `(t,)` float32, summing to 1.

    `embedding (n, width)`, the visual tokens as they entered the language model, `text (t, width)` likewise.
    `mean_v softmax_t(v . t)`, unscaled dot products (SparseVLM, Zhang et al., ICML 2025, arXiv 2410.04417).
    """
    return (embedding.float() @ text.float().T).softmax(1).mean(0)


def raters(embedding: Tensor, text: Tensor, threshold: float | Literal["mean"] = "mean") -> Tensor:
    """`(t,)` bool: the text tokens whose `relevance` is above a value, or above their mean.

    A single text token, or several that matter alike, has no rater: nothing is above its own mean.
    """
    score = relevance(embedding, text)
    return score > (score.mean() if threshold == "mean" else threshold)
