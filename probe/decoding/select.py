"""Which slots a step commits, out of their scores.

Every rule takes `score (batch, slot)` and `eligible (batch, slot)`, boolean, and returns the slots to commit,
`(batch, slot)`, boolean, never an ineligible one. Rows are samples and do not see each other. Ranks go from the
highest score down, ties to the lowest slot, NaN last; rank 1 is the best eligible slot.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from probe.upload import upload


def rank(score: Tensor, eligible: Tensor) -> Tensor:
    """The rank of every slot, 1 the best, `(batch, slot)` int64; ineligible slots come after all eligible ones."""
    clean = torch.where(score.isnan(), -torch.inf, score)
    order = clean.sort(dim=1, descending=True, stable=True).indices
    # A second stable sort puts the eligible first whatever their score, -inf included.
    eligible_first = (~eligible).gather(1, order).to(torch.uint8).sort(dim=1, stable=True).indices
    order = order.gather(1, eligible_first)
    places = torch.arange(1, score.shape[1] + 1, device=score.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def top_k(score: Tensor, eligible: Tensor, counts: Sequence[int]) -> Tensor:
    """The `counts[b]` best slots of sample b."""
    return (rank(score, eligible) <= upload(counts, score.device)[:, None]) & eligible


def first(eligible: Tensor) -> Tensor:
    """The leftmost slot: left-to-right decoding, one token a step."""
    return (eligible.cumsum(1) == 1) & eligible


def threshold(score: Tensor, eligible: Tensor, tau: float) -> Tensor:
    """Fast-dLLM (Wu et al., arXiv 2505.22618): the best slot, and every other one with a score of at least `tau`."""
    return ((rank(score, eligible) == 1) | (score >= tau)) & eligible


def factor(score: Tensor, eligible: Tensor, f: float, *, last_rank_free: bool = True) -> Tensor:
    """Fast-dLLM's factor rule: the longest run of ranks r with `score >= 1 - f / (r + 1)`; rank 1 is free.

    The reference code also commits the last rank when it is the first to fail (`last_rank_free`); the paper's
    rule does not.
    """
    place = rank(score, eligible)
    fails = (score < 1 - f / (place + 1)) & (place > 1) & eligible
    n = eligible.sum(1, keepdim=True)
    end = torch.where(fails, place, n + 1).amin(1, keepdim=True)  # the first rank that fails
    if last_rank_free:
        end = torch.where(end == n, n + 1, end)
    return (place < end) & eligible


def above(score: Tensor, eligible: Tensor, p: float) -> Tensor:
    """Dimple's confident decoding (Yu et al., arXiv 2505.16990): every score strictly above `p`, possibly none."""
    return (score > p) & eligible


def several_or_best(score: Tensor, eligible: Tensor, tau: float, several: int = 2) -> Tensor:
    """SlowFast (Wei et al., arXiv 2506.10848): all scores of at least `tau` if there are `several`, else the best."""
    sure = (score >= tau) & eligible
    best = (rank(score, eligible) == 1) & eligible
    return torch.where(sure.sum(1, keepdim=True) >= several, sure, best)


def threshold_or_best(score: Tensor, eligible: Tensor, tau: float) -> Tensor:
    """dInfer's threshold: every score of at least `min(tau, best - 1e-5)`, so that near-ties of the best go with it."""
    best = score.masked_fill(~eligible, -torch.inf).amax(1, keepdim=True)
    return (score >= (best - 1e-5).clamp(max=tau)) & eligible


def hierarchy(score: Tensor, eligible: Tensor, tau: float, low: float) -> Tensor:
    """dInfer's hierarchy: scores above `tau`, the best slot, and the best of every contiguous run if above `low`."""
    chosen = (score > tau) | (rank(score, eligible) == 1)
    starts = eligible & ~torch.nn.functional.pad(eligible, (1, 0))[:, :-1]
    run = starts.cumsum(1)
    for number in range(1, int(run.max()) + 1 if run.numel() else 1):
        here = eligible & (run == number)
        chosen = chosen | ((rank(score, here) == 1) & here & (score > low))
    return chosen & eligible


def entropy_bound(entropy: Tensor, eligible: Tensor, gamma: float) -> Tensor:
    """EB-Sampler (Ben-Hamu et al., arXiv 2505.24857): the longest run of lowest entropies with `sum - max <= gamma`.

    `entropy (batch, slot)` in nats. The lowest is always taken.
    """
    place = rank(-entropy, eligible)
    ordered = torch.zeros_like(entropy).scatter_(1, place - 1, entropy.masked_fill(~eligible, 0.0))
    spent = (ordered.cumsum(1) - ordered).gather(1, place - 1)
    return ((spent <= gamma) | (place == 1)) & eligible
