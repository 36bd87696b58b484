"""The attention function of every backbone: a fast kernel for the output, and beside it only the rows asked for.

Registered in transformers' attention registry as `probe` (the SDPA kernel) and `probe_eager` (plain matrix products,
for counting FLOPs). A layer that nobody looks at pays one dictionary look-up. A layer that is looked at pays
O(rows x keys): a square attention map is never formed, whatever the queries asked for (they are taken in chunks).

It knows nothing of probes, steps or the loop: a request names rows and receives weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

from probe.parallel import own, whole
from probe.site import Form

CHUNK = 64
"""Rows per chunk. Bounds the extra memory of a request by heads x CHUNK x keys, however many rows it asks for."""

_SLOT = "_probe_row_requests"


@dataclass(frozen=True)
class RowRequest:
    """Attention rows wanted from one layer in the forward that is about to run.

    `rows (batch, query)` int64 are rows of that layer's sequence. `receive(weights, first)` is called once per chunk
    with float32 weights `(batch, head, query, key)` (`head` is 1 for `head_mean_logits`) and the chunk's offset.
    """

    rows: Tensor
    form: Form
    receive: Callable[[Tensor, int], None]


@dataclass(frozen=True)
class Reweighting:
    """Numbers added to the logits of some query rows: `rows (batch, query)` int64, `bias (batch, key)` float32.

    `log f` on a key multiplies the attention that it receives by f, before rows are normalised. Only these rows are
    computed a second time, so the cost is O(rows x keys).
    """

    rows: Tensor
    bias: Tensor


@dataclass(frozen=True)
class _Asked:
    requests: tuple[RowRequest, ...]
    timed: Callable[[], AbstractContextManager[None]]
    keys: Callable[[Tensor], None] | None
    queries: Callable[[Tensor], None] | None
    reweighting: tuple[Reweighting, ...]


def ask(
    attention: nn.Module,
    requests: Sequence[RowRequest],
    timed: Callable[[], AbstractContextManager[None]] = nullcontext,
    *,
    keys: Callable[[Tensor], None] | None = None,
    queries: Callable[[Tensor], None] | None = None,
    reweighting: Sequence[Reweighting] = (),
) -> None:
    """Have an attention module answer `requests` in every forward until `forget`, inside `timed()`.

    `keys` is handed the keys `(batch, kv head, key, size)` that the layer attends to, after rotary, `queries` the
    queries `(batch, head, row, size)` of the rows that it computes; `reweighting` changes what some of its rows attend
    to.
    """
    attention.__dict__[_SLOT] = _Asked(tuple(requests), timed, keys, queries, tuple(reweighting))


def forget(attention: nn.Module) -> None:
    """Drop the module's requests, if it has any."""
    attention.__dict__.pop(_SLOT, None)


def attention_rows(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    mask: Tensor | None,
    scaling: float,
    form: Form,
    *,
    mask_is_of_rows: bool = False,
) -> Tensor:
    """Softmax weights of some query rows over all keys, in float32.

    `query (batch, head, length, size)`, `key (batch, kv head, key, size)` (grouped heads allowed),
    `rows (batch, row)`, `mask` None, boolean (True: may attend) or additive, broadcastable to
    `(batch, head, length, key)`, or with `mask_is_of_rows` to `(batch, head, row, key)`.
    Returns `(batch, head or 1, row, key)`.
    """
    batch, heads, _, size = query.shape
    wanted = query.gather(2, rows[:, None, :, None].expand(batch, heads, rows.shape[1], size))
    wanted = rearrange(wanted, "b (kv group) row size -> b kv group row size", kv=key.shape[1])
    if form != "softmax":
        # sum_h q_h . k_h is one product over the concatenated heads; the group's queries add up first
        q = rearrange(wanted.sum(2), "b kv row size -> b row (kv size)")
        scaling /= heads if form == "head_mean_logits" else heads**0.5
        logits = (q @ rearrange(key, "b kv key size -> b (kv size) key"))[:, None] * scaling
    else:
        logits = rearrange(wanted, "b kv group row size -> b kv (group row) size") @ key.transpose(2, 3) * scaling
        logits = rearrange(logits, "b kv (group row) key -> b (kv group) row key", row=rows.shape[1])
    logits = logits.float()
    if mask is not None:
        if mask.shape[1] > logits.shape[1]:  # heads that differ in what they see, in a form that has none
            mask = mask.any(1, keepdim=True) if mask.dtype == torch.bool else mask.amax(1, keepdim=True)
        if mask.shape[2] > 1 and not mask_is_of_rows:
            mask = mask.expand(batch, *mask.shape[1:])
            mask = mask.gather(2, rows[:, None, :, None].expand(batch, mask.shape[1], rows.shape[1], mask.shape[3]))
        if mask.dtype == torch.bool:
            logits = logits.masked_fill(~mask, torch.finfo(torch.float32).min)
        else:
            logits = logits + mask.float()
    return logits.softmax(-1)


def answer_beside(attention: nn.Module, queries: Callable[[Tensor], Tensor], key: Tensor, mask: Tensor | None) -> int:
    """Answer and drop the module's requests without its forward; returns how many rows of queries that took.

    `queries(rows)` gives `(batch, head, row, size)` of rows `(batch, row)`, after rotary; `key` as it is attended to.
    """
    asked: _Asked | None = attention.__dict__.pop(_SLOT, None)
    if asked is None:
        return 0
    n = 0
    with asked.timed():
        key = whole(attention, key)
        if asked.keys is not None:
            asked.keys(key)
        for request in asked.requests:
            for first in range(0, request.rows.shape[1], CHUNK):
                rows = request.rows[:, first : first + CHUNK].to(key.device)
                query = queries(rows)
                scale = getattr(attention, "scaling", query.shape[-1] ** -0.5)
                seen = mask
                if mask is not None and mask.shape[2] > 1:
                    full = mask.expand(rows.shape[0], *mask.shape[1:])
                    seen = full.gather(2, rows[:, None, :, None].expand(-1, full.shape[1], -1, full.shape[3]))
                at = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
                weights = attention_rows(query, key, at, seen, scale, request.form, mask_is_of_rows=True)
                request.receive(weights, first)
                n += rows.shape[1]
    return n


def _answer_requests(
    asked: _Asked, module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None
) -> None:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    with asked.timed():
        query, key = whole(module, query), whole(module, key)
        if asked.keys is not None:
            asked.keys(key)
        if asked.queries is not None:
            asked.queries(query)
        for request in asked.requests:
            for first in range(0, request.rows.shape[1], CHUNK):
                rows = request.rows[:, first : first + CHUNK].to(query.device)
                again = bool(asked.reweighting)
                seen = _with_bias(mask, rows, asked.reweighting) if again else mask
                weights = attention_rows(query, key, rows, seen, scale, request.form, mask_is_of_rows=again)
                request.receive(weights, first)


def _with_bias(mask: Tensor | None, rows: Tensor, reweighting: Sequence[Reweighting]) -> Tensor:
    """The mask of a chunk of rows `(batch, 1 or head, row, key)` as numbers to be added, reweighting included."""
    total: Tensor | float = 0.0
    for one in reweighting:
        hit = (rows[:, :, None] == one.rows.to(rows.device)[:, None]).any(-1)
        total = total + hit[:, None, :, None] * one.bias.to(rows.device)[:, None, None]
    assert isinstance(total, Tensor)
    if mask is None:
        return total
    if mask.shape[2] > 1:
        mask = mask.gather(2, rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    added = torch.zeros_like(mask, dtype=total.dtype).masked_fill(~mask, _LOWEST) if mask.dtype == torch.bool else mask
    return total + added


_LOWEST = torch.finfo(torch.float32).min / 2


def _reweight(
    again: Callable[[Tensor, Tensor], Tensor], output: Tensor, query: Tensor, mask: Tensor | None, asked: _Asked
) -> Tensor:
    """The attention output `(batch, query, head, size)` with the reweighted rows computed anew, chunk by chunk.

    `again(query, mask)` is the kernel over the same keys and values.
    """
    for rows in (chunk.to(query.device) for one in asked.reweighting for chunk in one.rows.split(CHUNK, 1)):
        chosen = query.gather(2, rows[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
        fresh = again(chosen, _with_bias(mask, rows, asked.reweighting).to(query.dtype))
        output = output.scatter(1, rows[:, :, None, None].expand_as(fresh), fresh)
    return output


def written_out(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask, and where there is none but the module is causal, the one that kernels take for granted then.

    `(batch, 1, length, key)` bool, a view of one square: a row sees no key behind its own place.
    """
    if mask is not None or query.shape[2] == 1 or not getattr(module, "is_causal", False):
        return mask
    square = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    return square.expand(query.shape[0], 1, *square.shape)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention as two matrix products with the square map between them: for counting and checking, not for speed.

    Shapes as in transformers: `query (batch, head, length, size)`; returns `(batch, length, head, size)` and the map.
    """
    attention_mask = written_out(module, query, key, attention_mask)
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    logits = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attention_mask, torch.finfo(logits.dtype).min)
        else:
            logits = logits + attention_mask
    weights = logits.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def _beside(kernel: Callable[..., tuple[Tensor, Tensor | None]]) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if attention_mask is not None and attention_mask.numel() == 1 == query.shape[2]:
            attention_mask = None  # one value for all keys hides none of them, and kernels are faster without a mask
        asked: _Asked | None = module.__dict__.get(_SLOT)
        of_all, attention_mask = attention_mask, own(module, attention_mask, query.shape[1])
        seen = of_all if asked is None else written_out(module, query, key, of_all)
        if asked is not None:
            _answer_requests(asked, module, query, key, seen, scaling)
        output, weights = kernel(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
        if asked is not None and asked.reweighting:

            def again(rows: Tensor, mask: Tensor) -> Tensor:
                return kernel(module, rows, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)[0]

            output = _reweight(again, output, query, own(module, seen, query.shape[1]), asked)
        return output, weights

    return attend


def key_padding_mask(attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
    """The mask of a bidirectional model: None when nothing is padded, else `(batch, 1, 1, key)` True at real keys.

    transformers' own mask functions would turn `None` causal, and gapped position ids into packed sequences.
    """
    if attention_mask is None:
        return None
    return attention_mask.bool()[:, None, None, :]


KERNELS: dict[str, str] = {"sdpa": "probe", "eager": "probe_eager"}
"""Kernel name as a user gives it -> name in transformers' attention registry."""

AttentionInterface.register("probe", _beside(sdpa_attention_forward))
AttentionInterface.register("probe_eager", _beside(eager_attention))
for _name in KERNELS.values():
    AttentionMaskInterface.register(_name, key_padding_mask)


def kernel_name(implementation: str) -> str:
    """The kernel as a user gives it, from the name in transformers' registry (others stay as they are)."""
    return {registered: kernel for kernel, registered in KERNELS.items()}.get(implementation, implementation)
