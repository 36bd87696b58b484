"""How well each visual token fits the question, in the common space of an image and a text tower."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn.functional import normalize

from probe.registry import scores


@scores.register
def text_image(
    image_features: Tensor,
    text_features: Tensor,
    *,
    metric: Literal["dot", "cosine"] = "dot",
    sign: Literal[1, -1] = 1,
    softmax: bool = False,
) -> Tensor:
    """Similarity of every visual token to the question: `sign * x . t`, over all tokens through a softmax or not.

    TRIM (Song et al., COLING 2025, arXiv 2409.10994): `metric: dot, sign: -1, softmax: true` in its code; its paper
    speaks of cosine similarity. `image_features (n, p)` are the encoder's post-norm patches in the common space,
    `text_features (p,)` the text tower's embedding of the question.
    """
    x, t = image_features.float(), text_features.float()
    if metric == "cosine":
        x, t = normalize(x, dim=-1), normalize(t, dim=-1)
    score = sign * (x * t).sum(-1)
    return score.softmax(0) if softmax else score
