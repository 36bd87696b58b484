"""dLLM-Cache (Liu et al., arXiv 2506.06295): when features are refreshed, and which answer rows in between."""

from __future__ import annotations

import torch
from torch import Tensor


def refreshes(step: int, prompt_interval: int, gen_interval: int) -> tuple[bool, bool]:
    """Whether step `step` (1-based) recomputes the prompt's rows, and all of the answer's."""
    return (step - 1) % prompt_interval == 0, (step - 1) % gen_interval == 0


def least_similar(old: Tensor, new: Tensor, ratio: float) -> Tensor:
    """The `int(ratio n)` of n answer rows whose value vector turned most: sorted `(batch, chosen)` indices.

    `old`, `new (batch, row, width)`: value projections cached and now; by cosine similarity, ties to the lowest row.
    """
    count = int(old.shape[1] * ratio)
    likeness = torch.nn.functional.cosine_similarity(old, new, dim=-1)
    return likeness.sort(dim=1, stable=True).indices[:, :count].sort(dim=1).values
