"""Operations that leave every token where it is and change what attention does."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from probe.operations.options import QUIET, Lasts, OnCache, Protect
from probe.registry import operations
from probe.selections.counts import Keep
from probe.site import Fate, Plan, QuerySet, Reweight, Site

Segment = Literal["system", "visual", "newline", "question", "answer", "masked", "filled"]
"""A role of positions, or the answer slots that are still masked, or filled."""

Segments = tuple[Segment, ...]


@operations.register(quiet=QUIET)
def mask(kept: Tensor, *, lasts: Lasts = "forward", on_cache: OnCache = "refresh", protect: Protect = ()) -> Plan:
    """Hide the keys of the other tokens, remove nothing: the logits of `drop` with positions kept, no saving."""
    return Plan(kept.sort().values, Fate.MASKED)


@operations.register(default_select="none", sites=(Site.LAYER_INPUT,), quiet=QUIET)
def skip_layers(kept: Tensor, *, as_keys: bool = False, protect: Protect = ()) -> Plan:
    """Carry the other tokens around the layers at whose input the probe stands, and have them back behind.

    Their hidden states pass unchanged, at their positions; in the skipped layers they are no queries and no keys, or,
    with `as_keys`, keys and values that are not updated. Needs no selection: all visual tokens then take the way
    around. The study (arXiv 2511.15098, section 5.4) suggests it for models that were adapted from autoregressive ones
    and gives no code; what exactly bypasses is not established.
    """
    return Plan(kept.sort().values, Fate.SKIPPED)


@operations.register(default_select="all", changes="attention", sites=(Site.LAYER_ATTENTION,))
def reweight_attention(
    *,
    from_: Annotated[Segments, Field(alias="from", min_length=1)],
    to: Annotated[Segments, Field(min_length=1)],
    factor: Annotated[float, Field(gt=0)],
) -> Reweight:
    """Multiply the attention that rows of some roles pay to keys of others by a factor, before rows are normalised.

    `log factor` is added to those logits, so every row still sums to 1 and what is freed goes to all other keys in
    proportion. AttnReal (2025) scales attention on sink-like output tokens down and gives the freed mass to visual
    tokens; its exact formula is not established.
    """
    return Reweight(from_, to, factor)


@operations.register(default_select="all", changes="attention", sites=(Site.LAYER_ATTENTION,))
def evict(*, keep: Keep, queries: QuerySet = "masked") -> None:
    """Hide visual keys head by head, from the next pass on: each group of heads keeps those that its rows look at most.

    MaskKV (2025, arXiv 2510.09309) evicts prompt keys and values by the votes of mask tokens, with budgets per layer (a
    list behind `keep`) and head. Here keys are hidden from the heads that voted against them, not moved, so the logits
    are those of eviction and no time is saved; only visual keys are voted on. Its code is not released, and how it
    shares the budget among heads is not established: every group keeps the same number. Needs no selection.
    """
