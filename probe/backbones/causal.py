"""Masks of a causal decoder, for callers that hand its layers a cache of their own or hide some keys.

transformers leaves the mask out where a kernel knows that it is causal; so does `probe.attend`. Where there is more to
say, transformers would ask the cache for sizes that only its own caches know, so the mask is written out here.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from probe.attend import KERNELS


def causal_mask(queries: int, keys: int, real: Tensor | None, device: torch.device) -> Tensor:
    """`(batch or 1, 1, queries, keys)`, true where a query may attend: up to itself, and only to real keys.

    The queries are the last of the keys. `real (batch, keys)` is true at keys that are no padding, or None.
    """
    last = torch.arange(keys - queries, keys, device=device)
    allowed = (torch.arange(keys, device=device)[None] <= last[:, None])[None, None]
    return allowed if real is None else allowed & real.bool()[:, None, None, :]


class _Causal:
    """A native decoder that takes every mask and cache of the adapter contract; to be mixed in before its class."""

    def forward(
        self: Any, *args: Any, attention_mask: Tensor | None = None, past_key_values: Any = None, **kwargs: Any
    ) -> Any:
        """As the decoder's own; `attention_mask` and `past_key_values` as `Backbone.lm` has them.

        With kernels that are not ours (`flash_attention_2`, ...) the decoder's handling of masks stays as it is.
        """
        mask = attention_mask
        ours = self.config._attn_implementation in KERNELS.values()
        if ours and (mask is not None or past_key_values is not None) and (mask is None or mask.ndim == 2):
            embeds = kwargs["inputs_embeds"]
            queries, keys = embeds.shape[1], 1
            if mask is not None:
                keys = mask.shape[-1]
            elif queries > 1:  # one row sees everything, however many keys the cache has
                keys = queries + past_key_values.get_seq_length()
            mask = causal_mask(queries, keys, mask, embeds.device)
        return cast(Any, super()).forward(*args, attention_mask=mask, past_key_values=past_key_values, **kwargs)


def keep_causal(decoder: nn.Module) -> None:
    """Have a native decoder stay causal under any mask and cache. Its weights and modules are untouched."""
    kind = type(decoder)
    decoder.__class__ = type(f"Causal{kind.__name__}", (_Causal, kind), {})
