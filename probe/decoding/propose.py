"""What each masked slot would become: truncation, temperature, noise.

Logits are `(..., vocabulary)`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from probe.errors import ProbeError


def gumbel(logits: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """Gumbel-max weights `exp(l) / (-ln u)^T` in float64, whose arg-max is the proposal; the logits at T = 0.

    `uniform` of the shape of `logits`, in (0, 1). Lower precision would sharpen the distribution (Zheng et al.,
    arXiv 2409.02908).
    """
    if temperature == 0:
        return logits
    return logits.double().exp() / (-uniform.double().log()) ** temperature


def truncate(
    logits: Tensor, *, temperature: float = 0.0, top_p: float | None = None, top_k: int | None = None
) -> Tensor:
    """Dream's order of things: divide by the temperature, then nucleus, then the `top_k` largest.

    Removed entries become the dtype's minimum. The nucleus keeps the smallest set whose probability exceeds `top_p`;
    ties with the k-th largest stay. `top_p` of 1 or more and None keep everything.
    """
    if temperature < 0:
        raise ProbeError(f"temperature {temperature} is negative; 0 means arg-max")
    if temperature > 0:
        logits = logits / temperature
    lowest = torch.finfo(logits.dtype).min
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        beyond = ordered.softmax(-1).cumsum(-1) > top_p
        beyond = torch.nn.functional.pad(beyond, (1, 0))[..., :-1]  # the one that crosses the line stays
        logits = logits.masked_fill(torch.empty_like(beyond).scatter_(-1, order, beyond), lowest)
    if top_k is not None and top_k > 0:
        least = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, lowest)
    return logits


def draw(probability: Tensor, uniform: Tensor) -> Tensor:
    """A token of each row by inverting the cumulative distribution: `uniform (...)` in [0, 1). Ids `(...)`."""
    edges = probability.double().cumsum(-1)
    edges = edges / edges[..., -1:]
    return torch.searchsorted(edges, uniform.double()[..., None], right=True)[..., 0].clamp_(max=edges.shape[-1] - 1)


def forbid(logits: Tensor, ids: Tensor | list[int]) -> Tensor:
    """`logits` with the given vocabulary entries at -inf (a copy)."""
    out = logits.clone()
    out[..., ids] = -torch.inf
    return out
