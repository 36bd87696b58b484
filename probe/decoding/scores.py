"""How sure a slot is of its candidate: the numbers that selections rank.

`probability (..., vocabulary)` is whatever distribution the policy reads (raw, or truncated and tempered: see
`propose.truncate`); results are `(...)`, in its dtype, higher is better.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from probe.decoding.propose import truncate
from probe.errors import ProbeError

Algorithm = Literal["maskgit_plus", "topk_margin", "entropy", "origin", "autoregressive"]


def confidence(probability: Tensor, candidate: Tensor) -> Tensor:
    """Probability of the candidate, `candidate (...)` ids."""
    return probability.gather(-1, candidate[..., None])[..., 0]


def margin(probability: Tensor) -> Tensor:
    """Best minus second best probability."""
    best = probability.topk(2, dim=-1).values
    return best[..., 0] - best[..., 1]


def negative_entropy(probability: Tensor, floor: float = 1e-10) -> Tensor:
    """`sum p ln(p + floor)` in nats: at most 0."""
    return (probability * (probability + floor).log()).sum(-1)


def dream(
    logits: Tensor,
    algorithm: Algorithm,
    candidate: Tensor | None = None,
    *,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    original: bool = False,
) -> tuple[Tensor, Tensor]:
    """Dream's and Dimple's `(score, candidate)` of logits `(..., vocabulary)`.

    The candidate is the arg-max of the truncated distribution unless one was drawn. The score is read from the same
    truncated, tempered distribution, or with `original` (Dimple's `use_original_confidence`) from the raw softmax.
    With a small `top_p` many rows keep one token, whose score is then exactly 1 (0 for entropy).
    """
    kept = truncate(logits, temperature=temperature, top_p=top_p, top_k=top_k).softmax(-1)
    if candidate is None:
        candidate = kept.argmax(-1)
    read = logits.softmax(-1) if original else kept
    if algorithm in ("maskgit_plus", "origin", "autoregressive"):
        return confidence(read, candidate), candidate
    if algorithm == "topk_margin":
        return margin(read), candidate
    if algorithm == "entropy":
        return negative_entropy(read), candidate
    raise ProbeError(
        f"no such score: {algorithm!r}; there are maskgit_plus, topk_margin, entropy, origin, autoregressive"
    )


def position_aware(
    probability: Tensor, frequency: Tensor, offset: Tensor, decay: float = 0.25, cap: float = 10.0
) -> Tensor:
    """PC-Sampler (Huang et al., arXiv 2508.13021): `exp(-decay j) min(cap, -p ln(f + 1e-9))`.

    `probability (...)` of the candidate, `frequency (...)` of the candidate in a corpus, `offset (...)` slots from the
    start of the block.
    """
    return torch.exp(-decay * offset) * surprise(probability, frequency, cap)


def position_mixed(
    probability: Tensor, frequency: Tensor, offset: Tensor, length: int, decay: float = 0.25, cap: float = 10.0
) -> Tensor:
    """PC-Sampler's linear variant: `(1 - decay) c + decay (1 - j / length)`, c the calibrated score scaled to 0..1.

    Scaled over the last axis, by its minimum and maximum; `offset` and `length` as above, of the block.
    """
    raw = surprise(probability, frequency, cap)
    low, high = raw.amin(-1, keepdim=True), raw.amax(-1, keepdim=True)
    scaled = (raw - low) / (high - low).clamp(min=torch.finfo(raw.dtype).tiny)
    return (1 - decay) * scaled + decay * (1 - offset / length)


def surprise(probability: Tensor, frequency: Tensor, cap: float) -> Tensor:
    """PC-Sampler's calibration against a corpus: `min(cap, -p ln(f + 1e-9))`."""
    return (-probability * (frequency + 1e-9).log()).clamp(max=cap)
