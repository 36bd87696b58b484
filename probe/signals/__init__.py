"""Signals: what can be recorded. Pure reductions on the device; only their result leaves it.

A signal function's positional parameters name what it is given.

- At `layer.attention`: `received (batch, head, key)` float32, the attention each key receives, averaged over the query
  rows; `key_role (batch, key)` int8; `key_visual (batch, key)` int64 original visual index or -1; `n_visual` the
  largest number of visual tokens in the batch.
- At `before_lm`, `layer.input`, `layer.after_attention`, `layer.output` and `final`: `hidden (batch, row, width)`,
  `row_role`, `row_visual` and `n_visual` likewise.
- At `logits`: `logits (batch, row, vocabulary)` as the decision used them (guided and suppressed), `confidence (batch,
  row)`, and `reference`, the logits of the same slots at the same step of the unpruned run (rows that are open in both
  runs only; nothing is recorded where no baseline runs beside the recipe).

The result is `(batch, *dims)`, or `(batch, row)` for a signal over positions.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from probe.registry import signals
from probe.site import SEGMENTS, Form, QuerySet, Site

HIDDEN = (Site.BEFORE_LM, Site.LAYER_INPUT, Site.LAYER_AFTER_ATTENTION, Site.LAYER_OUTPUT, Site.FINAL)
"""Sites with hidden states of every row."""


def _mass_dims(params: dict[str, Any]) -> tuple[str, ...]:
    return ("head", "segment", "segment_key") if params.get("heads") == "each" else ("segment", "segment_key")


@signals.register(
    site=Site.LAYER_ATTENTION,
    dims=_mass_dims,
    units="1",
    long_name="attention mass from a segment's rows to each key segment (sums to 1)",
    formula="mean_i in queries sum_j in segment_key A_ij (arXiv 2511.15098, figure 2)",
)
def attention_mass(
    received: Tensor,
    key_role: Tensor,
    *,
    queries: QuerySet = "answer",
    form: Form = "softmax",
    heads: Literal["mean", "each"] = "mean",
) -> Tensor:
    """Share of the queries' attention that falls on system, visual, newline, question and answer positions.

    `(batch, segment_key)`, or `(batch, head, segment_key)` with `heads: each`. A segment's size counts: uniform
    attention gives it n_segment / n. `form: head_mean_logits` is the study's release; it has no head axis.
    """
    of_role = torch.nn.functional.one_hot(key_role.long(), len(SEGMENTS) + 1)[..., : len(SEGMENTS)].to(received.dtype)
    mass = received @ of_role
    return mass if heads == "each" else mass.mean(1)


@signals.register(
    site=Site.LAYER_ATTENTION,
    dims=("visual",),
    units="1",
    long_name="attention that each visual token receives from the query rows",
    formula="mean_h mean_i in queries A^h_ij",
)
def visual_importance(
    received: Tensor, key_visual: Tensor, n_visual: int, *, queries: QuerySet = "answer", form: Form = "softmax"
) -> Tensor:
    """`(batch, n_visual)`: NaN where the token is gone at this layer."""
    mean = received.mean(1)
    out = torch.full((mean.shape[0], n_visual + 1), torch.nan, dtype=mean.dtype, device=mean.device)
    return out.scatter_(1, key_visual.where(key_visual >= 0, n_visual), mean)[:, :n_visual]


def _mean_by_role(values: Tensor, role: Tensor) -> Tensor:
    """`(batch, row)` averaged over the rows of each segment; NaN where a segment is empty."""
    of_role = torch.nn.functional.one_hot(role.long(), len(SEGMENTS) + 1)[..., : len(SEGMENTS)].to(values.dtype)
    return (values[:, None] @ of_role)[:, 0] / of_role.sum(1)


@signals.register(
    site=HIDDEN,
    dims=("segment_key",),
    units="1",
    long_name="mean Euclidean norm of the hidden states of a segment's rows",
    formula="mean_i in segment_key ||x_i||_2",
)
def hidden_norm(hidden: Tensor, row_role: Tensor) -> Tensor:
    """`(batch, segment_key)` float32."""
    return _mean_by_role(hidden.float().norm(dim=-1), row_role)


@signals.register(
    site=HIDDEN,
    dims=("segment_key",),
    units="1",
    long_name="mean cosine similarity of a segment's hidden states to their own mean",
    formula="mean_i in segment_key cos(x_i, mean_j in segment_key x_j)",
)
def hidden_similarity(hidden: Tensor, row_role: Tensor) -> Tensor:
    """`(batch, segment_key)` float32: near 1, the rows of a segment say the same; a sign of redundancy."""
    unit = torch.nn.functional.normalize(hidden.float(), dim=-1)
    of_role = torch.nn.functional.one_hot(row_role.long(), len(SEGMENTS) + 1)[..., : len(SEGMENTS)].float()
    mean = (of_role.transpose(1, 2) @ hidden.float()) / of_role.sum(1)[..., None]
    mean = torch.nn.functional.normalize(mean, dim=-1)
    own = (unit @ mean.nan_to_num().transpose(1, 2) * of_role).sum(-1)
    return _mean_by_role(own, row_role)


@signals.register(
    site=Site.LOGITS,
    dims=("position",),
    units="1",
    long_name="probability of the candidate token of each slot that could be committed",
    formula="softmax64(logits)[candidate], noise-free",
    always=True,
)
def confidence(confidence: Tensor) -> Tensor:
    """`(batch, row)` float64, as the decoding rule computes it."""
    return confidence


@signals.register(
    site=Site.LOGITS,
    dims=("position",),
    units="nat",
    long_name="entropy of the token distribution of each slot that could be committed",
    formula="-sum_v p_v ln p_v",
)
def entropy(logits: Tensor) -> Tensor:
    """`(batch, row)` float32; suppressed tokens have probability 0 and add nothing."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p.where(log_p > -torch.inf, 0)).sum(-1)


@signals.register(
    site=Site.LOGITS,
    dims=("position",),
    units="1",
    long_name="probability of the best token less that of the second best",
    formula="p_(1) - p_(2)",
)
def margin(logits: Tensor) -> Tensor:
    """`(batch, row)` float32."""
    top = logits.softmax(-1).topk(2, dim=-1).values
    return top[..., 0] - top[..., 1]


@signals.register(
    site=Site.LOGITS,
    dims=("position",),
    units="nat",
    long_name="divergence of each open slot's distribution from the unpruned run's at the same step",
    formula="KL(p_unpruned || p) = sum_v p_unpruned,v (ln p_unpruned,v - ln p_v)",
)
def logit_kl(logits: Tensor, reference: Tensor) -> Tensor:
    """`(batch, row)` float32, for slots that are open in both runs; tokens suppressed in both add nothing.

    The unpruned run's logits wait on the device for it: steps x open slots x vocabulary x 4 bytes (LLaDA-V with 32
    tokens in 16 steps: at most 0.26 GB).
    """
    log_p, log_q = reference.log_softmax(-1), logits.log_softmax(-1)
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


@signals.register(
    site=Site.LOGITS,
    dims=("position",),
    units="nat",
    long_name="divergence of each open slot's distribution from the run without a cache at the same step",
    formula="KL(p_uncached || p) = sum_v p_uncached,v (ln p_uncached,v - ln p_v)",
)
def cache_kl(logits: Tensor, uncached: Tensor) -> Tensor:
    """`(batch, row)` float32: like `logit_kl`, but to the same run with `cache: none`, interventions included.

    0 for an exact cache, as long as both runs agree. Costs one more run of every sample that records it.
    """
    return logit_kl(logits, uncached)


@signals.register(
    site=Site.LOGITS,
    dims=("position",),
    units="1",
    long_name="whether each open slot's best token is that of the run without a cache at the same step",
    formula="1 if argmax_v logits_v = argmax_v uncached_v, else 0",
)
def cache_agreement(logits: Tensor, uncached: Tensor) -> Tensor:
    """`(batch, row)` float32, for slots that are open in both runs."""
    return (logits.argmax(-1) == uncached.argmax(-1)).float()
