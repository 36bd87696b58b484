"""What a layer's attention would say of hidden states that have not entered it yet."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from probe.attend import attention_rows
from probe.backbones.base import LayerModules
from probe.errors import ProbeError
from probe.parallel import whole
from probe.site import Form


def projected_attention(
    modules: LayerModules,
    hidden: Tensor,
    rows: Tensor,
    cos: Tensor,
    sin: Tensor,
    form: Form,
    mask: Tensor | None = None,
) -> tuple[Tensor, int]:
    """Attention `(head, query, row)` float32 of some rows over all, from `hidden (row, width)`, and its FLOPs.

    The layer's own norm, query and key projections (PyramidDrop, Xing et al., CVPR 2025); only the rows asked for are
    projected to queries. `cos`, `sin (row, size)` are the rotary tables; `mask (1, 1 or head, 1 or row, row)` says who
    may attend, as layers take it.
    """
    attention: Any = modules.attention
    if modules.pre_attention_norm is None or not hasattr(attention, "q_proj"):
        raise ProbeError("`projected` needs a layer with a norm, `q_proj` and `k_proj`; this backbone's have none")
    normed = modules.pre_attention_norm(hidden)
    size = cos.shape[-1]
    query = rotated(attention, "q", normed[rows], cos[rows], sin[rows], size)
    key = rotated(attention, "k", normed, cos, sin, size)
    at = torch.arange(rows.shape[0], device=rows.device)[None]
    scaling = getattr(attention, "scaling", size**-0.5)
    if mask is not None and mask.shape[2] > 1:
        mask = mask[:, :, rows]
    seen = attention_rows(query[None], key[None], at, mask, scaling, form, mask_is_of_rows=True)[0]
    heads, width = query.shape[0], hidden.shape[1]
    projections = 2 * width * size * (rows.shape[0] * heads + hidden.shape[0] * key.shape[0])
    scored = 2 * rows.shape[0] * hidden.shape[0] * size * (key.shape[0] if form == "head_mean_logits" else heads)
    return seen, projections + scored


def rotated(attention: Any, which: str, normed: Tensor, cos: Tensor, sin: Tensor, size: int) -> Tensor:
    """Queries (`q`) or keys (`k`) `(head, row, size)` of normed rows, after rotary in the halves convention."""
    heads = getattr(attention, f"{which}_proj")(normed).reshape(normed.shape[0], -1, size).transpose(0, 1)
    heads = whole(attention, heads, 0)
    norm = getattr(attention, f"{which}_norm", None)
    heads = heads if norm is None else norm(heads)
    turned = torch.cat([-heads[..., size // 2 :], heads[..., : size // 2]], -1)
    return heads * cos.to(heads.dtype) + turned * sin.to(heads.dtype)
