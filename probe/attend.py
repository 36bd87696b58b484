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
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

Form = Literal["softmax", "head_mean_logits", "full_width"]
"""`softmax`: one distribution per head. `head_mean_logits`: scaled logits averaged over heads, then one softmax.
`full_width`: as if there were one head over the full width, `softmax(q k^T / sqrt(heads * size))`."""

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
class KeyRequest:
    """The keys of one layer in the forward that is about to run, as attention meets them (after rotary).

    `receive(keys)` is called once with `(batch, kv head, key, size)`.
    """

    receive: Callable[[Tensor], None]


def ask(
    attention: nn.Module,
    requests: Sequence[RowRequest | KeyRequest],
    timed: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Have an attention module answer `requests` in every forward until `forget`, inside `timed()`."""
    attention.__dict__[_SLOT] = (tuple(requests), timed)


def forget(attention: nn.Module) -> None:
    """Drop the module's requests, if it has any."""
    attention.__dict__.pop(_SLOT, None)


def attention_rows(query: Tensor, key: Tensor, rows: Tensor, mask: Tensor | None, scaling: float, form: Form) -> Tensor:
    """Softmax weights of some query rows over all keys, in float32.

    `query (batch, head, length, size)`, `key (batch, kv head, key, size)` (grouped heads allowed),
    `rows (batch, row)`, `mask` None, boolean (True: may attend) or additive, broadcastable to
    `(batch, head, length, key)`. Returns `(batch, head or 1, row, key)`.
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
        if mask.shape[2] > 1:
            mask = mask.expand(batch, *mask.shape[1:])
            mask = mask.gather(2, rows[:, None, :, None].expand(batch, mask.shape[1], rows.shape[1], mask.shape[3]))
        if mask.dtype == torch.bool:
            logits = logits.masked_fill(~mask, torch.finfo(torch.float32).min)
        else:
            logits = logits + mask
    return logits.softmax(-1)


def _answer_requests(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None) -> None:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    requests, timed = module.__dict__[_SLOT]
    with timed():
        for request in requests:
            if isinstance(request, KeyRequest):
                request.receive(key)
                continue
            for first in range(0, request.rows.shape[1], CHUNK):
                rows = request.rows[:, first : first + CHUNK]
                request.receive(attention_rows(query, key, rows, mask, scale, request.form), first)


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
        if _SLOT in module.__dict__:
            _answer_requests(module, query, key, attention_mask, scaling)
        return kernel(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)

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
