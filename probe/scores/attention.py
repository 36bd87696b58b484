"""Attention that visual tokens receive: FastV, SparseVLM, PyramidDrop, VisionZip, FasterVLM and their kin."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import PlainValidator
from torch import Tensor

from probe.registry import scores
from probe.site import Form, QuerySet


@dataclass(frozen=True)
class TopHeads:
    """The `top` heads that pay the visual tokens most attention."""

    top: int

    def __str__(self) -> str:
        return f"{{top: {self.top}}}"


def _heads(value: Any) -> str | TopHeads:
    if isinstance(value, TopHeads) or (isinstance(value, str) and value in ("mean", "max", "sum")):
        return value
    top = value.get("top") if isinstance(value, dict) and len(value) == 1 else None
    if isinstance(top, int) and not isinstance(top, bool) and top >= 1:
        return TopHeads(top)
    raise ValueError("heads must be mean, max, sum, or {top: 14}, the heads that attend most to the picture")


Heads = Annotated[str | TopHeads, PlainValidator(_heads)]
"""`mean`, `max`, `sum`, or `{top: n}`: the mean over the n heads with most attention on visual tokens."""


def _reads(params: Mapping[str, Any]) -> Collection[str]:
    names = {"received"}
    if params.get("correct") == "rotary":
        names.add("rotary_received")
    if params.get("reduce") == "sum":
        names.add("n_queries")
    return names


@scores.register(reads=_reads, quiet=("layers", "reduce", "correct", "projected"))
def attention(
    received: Tensor,
    n_queries: int | None = None,
    rotary_received: Tensor | None = None,
    *,
    queries: QuerySet = "last",
    layer: int = 0,
    layers: Literal["one", "so_far"] = "one",
    heads: Heads = "mean",
    reduce: Literal["mean", "sum"] = "mean",
    form: Form = "softmax",
    correct: Literal["none", "rotary"] = "none",
    projected: bool = False,
) -> Tensor:
    """Attention that each visual token receives, over the query rows, then over the heads.

    FastV (Chen et al., ECCV 2024): `queries: last, layer: -1, heads: mean`, the last row of the layer before. VisionZip
    (Yang et al., CVPR 2025): `queries: cls, heads: sum`. SparseVLM (Zhang et al., ICML 2025): `queries: raters`;
    SparseVLM+ also `heads: {top: 14}, correct: rotary`. Study (arXiv 2511.15098): `queries: all, reduce: sum,
    form: head_mean_logits`.

    `received (head, n)`: `layer` is relative to the probe's own: 0 is its own attention (known from
    `layer.after_attention` on), -1 the layer before; `layers: so_far` averages over that layer and all before it
    (RedVTP, 2025: at the last layer). Rows are reduced as they come, so `queries: all` forms no square map. `projected:
    true` (PyramidDrop, Xing et al., CVPR 2025) reads a layer that has not run yet at its input: its norm and
    projections are applied to the rows asked for. `correct: rotary` divides by what position alone would give
    (`rotary_received`); that the ratio is taken after averaging is our reading, SparseVLM+'s is not established.
    """
    if isinstance(heads, TopHeads):
        received = received[heads_with_most(received, heads.top)]
    score = received.amax(0) if heads == "max" else received.sum(0) if heads == "sum" else received.mean(0)
    if reduce == "sum":
        assert n_queries is not None
        score = score * n_queries
    if correct == "rotary":
        assert rotary_received is not None
        score = score / rotary_received.clamp_min(1e-12)
    return score


@scores.register(quiet=("layers", "form", "projected"))
def mass(
    received: Tensor,
    *,
    queries: QuerySet = "last",
    layer: int = 0,
    layers: Literal["one", "so_far"] = "one",
    form: Form = "softmax",
    projected: bool = False,
) -> Tensor:
    """One number for all visual tokens: the share of the rows' attention that goes to them together. `(n,)` float32.

    `received (head, n)`: summed over the tokens, mean over the heads; parameters as for `attention`. With `threshold`
    a layer decides for itself: withdraw for good where text hardly looks at the picture any more (ToDRE, Li et al.,
    2025, arXiv 2505.18757: "information migration"; its trigger is not established), or carry visual tokens around
    (the study's layer-skipping, arXiv 2511.15098, section 5.4: answer-to-visual attention).
    """
    return received.float().nan_to_num(nan=0.0).sum(1).mean().expand(received.shape[1])


def heads_with_most(received: Tensor, n: int) -> Tensor:
    """`(min(n, head),)` int64: the heads of `received (head, n)` with most attention on visual tokens, most first."""
    return received.sum(1).sort(descending=True, stable=True).indices[:n]
