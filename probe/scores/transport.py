"""Optimal transport from what entered a layer to what left it: TopV."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from probe.registry import scores


def _flops(given: Mapping[str, Any]) -> int:
    n, width = given["hidden"].shape
    return int(2 * n * n * width)


@scores.register(flops=_flops)
def transport(
    layer_input: Tensor,
    hidden: Tensor,
    box: Tensor,
    *,
    feature: float = 1.0,
    spatial: float = 1.0,
    central: float = 1.0,
    epsilon: float = 0.1,
    relax: float = 1.0,
    iterations: int = 20,
) -> Tensor:
    """How much each token contributes to the layer's output, by entropic optimal transport. `(n,)` float32, sum 1.

    TopV (Yang et al., CVPR 2025): sources are the visual tokens that enter the layer (`layer_input (n, width)`),
    targets its outputs (`hidden (n, width)`); the cost of moving i to j is `feature (1 - cos) + spatial |p_i - p_j| +
    central |p_i - middle|` with p the middle of a token's `box (n, 4)`. Sinkhorn's iterations give the plan, and its
    row sums are the contributions. The cost weights, epsilon, the iterations and how contributions are read off the
    plan are not established (the paper alone was read); here the targets' masses are exact and the sources' held to
    uniform by a KL penalty of weight `relax` (0: free), without which all contributions would be equal.
    """
    n = hidden.shape[0]
    if n == 0:
        return torch.zeros(0)
    alike = normalize(layer_input.float(), dim=-1) @ normalize(hidden.float(), dim=-1).T
    place = ((box[:, :2] + box[:, 2:]).float() / 2).nan_to_num(0.5)
    cost = feature * (1 - alike) + spatial * torch.cdist(place, place) + central * (place - 0.5).norm(dim=-1)[:, None]
    kernel = (-(cost - cost.min()) / epsilon).exp()
    row, column = torch.ones_like(cost[:, 0]), torch.ones_like(cost[0])
    power = relax / (relax + epsilon)
    for _ in range(iterations):
        row = (1 / n / (kernel @ column).clamp_min(1e-30)) ** power
        column = 1 / n / (kernel.T @ row).clamp_min(1e-30)
    return row * (kernel @ column)
