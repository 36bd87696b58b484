"""Signals of the image encoder: what happens to the patches before the language model meets them.

They are given all patches of all views of a sample, P in number, in the order of the views: `received (head, P)`
float32, the attention that each patch receives in the encoder layer, averaged over the query rows; `hidden (P, width)`
at the probe's site; `patch_view (P,)` int64; `alive (P,)` bool. What a patch that is gone would have is NaN. The result
is `(P,)`: there is no batch, since pictures are encoded sample by sample.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from probe.registry import signals
from probe.site import Form, Site

AFTER_LAYERS = (Site.ENCODER_LAYER_AFTER_ATTENTION, Site.ENCODER_OUTPUT, Site.PROJECTOR_OUTPUT)
"""Sites of the encoder with features of every patch."""


@signals.register(
    site=Site.ENCODER_LAYER_ATTENTION,
    dims=("patch",),
    units="1",
    long_name="attention that each patch receives from the query rows of its view",
    formula="mean_h mean_i in queries A^h_ij",
)
def patch_importance(
    received: Tensor, *, queries: Literal["cls", "visual", "all"] = "all", form: Form = "softmax"
) -> Tensor:
    """`(P,)`: the class token's view of the picture (`queries: cls`), or that of all patches."""
    return received.mean(0)


@signals.register(
    site=AFTER_LAYERS,
    dims=("patch",),
    units="1",
    long_name="cosine similarity of each patch to the nearest other patch of its view",
    formula="max_j != i cos(x_i, x_j)",
)
def patch_similarity(hidden: Tensor, patch_view: Tensor, alive: Tensor) -> Tensor:
    """`(P,)`: near 1, another patch of the view says the same; a sign of redundancy before the language model."""
    unit = torch.nn.functional.normalize(hidden.float(), dim=-1)
    out = torch.full_like(unit[:, 0], torch.nan)
    for view in patch_view.unique():
        here = ((patch_view == view) & alive).nonzero()[:, 0]
        if here.shape[0] > 1:
            pairs = unit[here] @ unit[here].T
            out[here] = pairs.fill_diagonal_(-torch.inf).amax(1)
    return out


@signals.register(
    site=AFTER_LAYERS,
    dims=("patch",),
    units="1",
    long_name="Euclidean norm of each patch's features",
    formula="||x_i||_2",
)
def patch_norm(hidden: Tensor) -> Tensor:
    """`(P,)` float32: single patches with huge norms hold what belongs to the whole view."""
    return hidden.float().norm(dim=-1)
