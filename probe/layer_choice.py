"""Which layer can do without visual tokens: VTW's criterion on logits. Pure functions."""

from __future__ import annotations

import torch
from torch import Tensor

from probe.errors import ProbeError


def kl_to_full(full: Tensor, withdrawn: Tensor) -> Tensor:
    """Divergence of the predictions without visual tokens from those with them, `(sample, candidate)` float32, nats.

    `full (sample, vocabulary)` are the logits of the compared position of the unpruned model, `withdrawn (sample,
    candidate, vocabulary)` those when the tokens are withdrawn at each candidate layer. `KL(withdrawn || full) = sum_v
    p_w (ln p_w - ln p_f)` (VTW, Lin et al., AAAI 2025, arXiv 2405.05803).
    """
    log_p = withdrawn.float().log_softmax(-1)
    log_q = full.float().log_softmax(-1)[:, None]
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def earliest_layer(kl: Tensor, eta: float, first: int = 5) -> int:
    """The first layer whose mean divergence is at most `eta`; `kl (sample, candidate)`, candidate 0 is layer `first`.

    VTW uses 0.003 for LLaVA-1.5-7B, 0.0005 for 13B, 0.0001 for LLaVA-1.6-7B. Raises `ProbeError` if no layer is near
    enough.
    """
    mean = kl.mean(0)
    near = (mean <= eta).nonzero()[:, 0]
    if near.numel() == 0:
        last, best = first + mean.numel() - 1, float(mean.min())
        raise ProbeError(
            f"no layer from {first} to {last} comes within {eta:g} nats of the full model (the nearest is {best:.3g} "
            "away); allow more, or use more samples"
        )
    return first + int(near[0])
