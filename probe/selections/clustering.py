"""Density-peak clusters of tokens: what SparseVLM recycles, and a selection of their centres."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from probe.registry import selections
from probe.selections.counts import Keep, Rounding
from probe.selections.ranking import ranked
from probe.site import Choice


@dataclass(frozen=True)
class Clusters:
    """Density-peak clusters of m vectors: all float32 or int64.

    `density (m,)`; `peak (m,)`, density times distance to the nearest denser one; `centers (c,)` indices, highest peak
    first; `assignment (m,)` the cluster of each; `merged (c, width)` their means.
    """

    density: Tensor
    peak: Tensor
    centers: Tensor
    assignment: Tensor
    merged: Tensor


def clusters(x: Tensor, count: int, noise: Tensor) -> Clusters:
    """Density-peak clustering of `x (m, width)` into `count` clusters (DPC-KNN, as SparseVLM recycles tokens).

    Distances are Euclidean over `sqrt(width)`; density is `exp(-mean squared distance to the count nearest)`, itself
    among them, plus `1e-6 noise (m,)`, which breaks ties. Centres are the highest products of density and distance to
    the nearest denser point (the farthest point for the densest). Every point joins its nearest centre; means are over
    members plus 1e-6.
    """
    x = x.float()
    m = x.shape[0]
    distance = torch.cdist(x[None], x[None])[0] / x.shape[1] ** 0.5
    near = distance.topk(min(count, m), largest=False).values
    density = (-(near**2).mean(1)).exp() + noise * 1e-6
    denser = density[None] > density[:, None]
    apart = torch.where(denser, distance, distance.max()).amin(1)
    peak = apart * density
    centers = ranked(peak)[:count]
    assignment = distance[centers].argmin(0)
    assignment[centers] = torch.arange(centers.shape[0], device=x.device)
    members = torch.bincount(assignment, minlength=centers.shape[0])
    sums = x.new_zeros(centers.shape[0], x.shape[1]).index_add_(0, assignment, x)
    merged = sums / (members + 1e-6)[:, None]
    return Clusters(density, peak, centers, assignment, merged)


@selections.register(gives=("into",))
def cluster(
    features: Tensor, count: int, generator: torch.Generator, *, keep: Keep, round: Rounding = "floor"
) -> Choice:
    """Density-peak clusters: the centre of each stays, the others are matched to the centre that is nearest to them.

    The clustering by which SparseVLM (Zhang et al., ICML 2025, arXiv 2410.04417) recycles tokens (`recycle`), for all
    of them: with `merge`, every token goes into the mean of its cluster. `keep` says how many clusters there are, which
    is also the number of neighbours that density looks at. Centres stand in descending order of their peaks.
    """
    if count == 0:
        return Choice(torch.empty(0, dtype=torch.int64, device=features.device))
    found = clusters(features, count, torch.rand(features.shape[0], generator=generator).to(features.device))
    return Choice(found.centers, found.centers[found.assignment])
