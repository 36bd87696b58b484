"""Finding a dial's number: how, as pure functions on what was measured.

A recipe says which of its dials want it, and by which rule:

    calibrate: {layer: {withdraw_layer: {eta: 0.003}}}

A rule is a function in `calibrations`. Its positional parameters name the measurements that it is given, its
keyword-only parameters are what a recipe (or `--with`) may set:

- `layers`: how many the language model has
- `divergence (sample, candidate)` float32: for each layer of the model from `first` (a parameter of the rule) on, how
  far the predictions move when the dial is that layer, see `kl_to_full`
- `visual_mass`: per sample `(step, layer)` float32: the share of the answer's attention that goes to visual tokens
- `patches`, `merging_layers`: of a view before anything is merged; in how many layers of the encoder the recipe acts

It returns a `Finding`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import PlainValidator
from torch import Tensor

from probe.errors import ProbeError
from probe.layer_choice import earliest_layer
from probe.recipe_at import Layers
from probe.registry import calibrations
from probe.selections.counts import Count, Keep, token_count


@dataclass(frozen=True)
class Finding:
    """What a dial should be, and the sentences that say why."""

    value: Any
    evidence: tuple[str, ...]


def _one_layer(value: Any) -> Layers:
    return Layers.parse_one(value)


OneLayer = Annotated[Layers, PlainValidator(_one_layer)]
"""A layer as a recipe spells it: 5, -1, 50%."""

VTW_FIRST = Layers.parse_one(5 / 32)
"""VTW looks from layer 5 of 32 on."""


def first_candidate(first: Layers, layers: int) -> int:
    """The layer that a search begins with, on a model of so many."""
    return first.resolve(layers, "the model")[0]


@calibrations.register
def withdraw_layer(divergence: Tensor, layers: int, *, eta: float = 0.003, first: OneLayer = VTW_FIRST) -> Finding:
    """The earliest layer that can do without visual tokens (VTW, Lin et al., AAAI 2025, arXiv 2405.05803).

    The first one, from `first` on, at which the mean divergence `KL(withdrawn || full)` over the samples is at most
    `eta` nats. VTW takes 0.003 for LLaVA-1.5-7B, 0.0005 for 13B, 0.0001 for LLaVA-1.6-7B.
    """
    begin = first_candidate(first, layers)
    chosen = earliest_layer(divergence, eta, begin)
    means = divergence.mean(0).tolist()
    each = ", ".join(f"{begin + i}: {value:.2g}" for i, value in enumerate(means))
    return Finding(
        chosen,
        (
            f"Layer {chosen} is the first of {begin}..{layers - 1} at which withdrawing changes the predictions by at "
            f"most {eta:g} nats, KL(withdrawn || full), mean over {divergence.shape[0]} samples.",
            f"By layer: {each}.",
        ),
    )


@calibrations.register
def merges_for(patches: int, merging_layers: int, *, keep: Keep = 0.5) -> Finding:
    """How many tokens to merge per layer so that about `keep` of a view's patches are left (ToMe's r).

    Each layer merges r of its n tokens, at most half of those that are not protected. The r whose rest is nearest to
    `keep` (a share of the patches, or a number of tokens per view); of two that are equally near, the smaller.
    """
    if not patches:
        raise ProbeError("the image encoder has no fixed number of patches per view, so no r gives a wanted share")
    if not merging_layers:
        raise ProbeError("the recipe acts in no layer of the image encoder, so there is nothing to merge there")
    if isinstance(keep, Count) and keep.rule not in ("share", "number"):
        raise ProbeError(f"keep: a share of the patches or a number of them can be aimed at, not {keep}")
    wanted = token_count(keep, patches, "half_even")
    left = [tokens_left(patches, merging_layers, r) for r in range(patches // 2 + 1)]
    r = min(range(len(left)), key=lambda i: (abs(left[i] - wanted), i))
    near = [f"{i} leaves {left[i]}" for i in (r - 1, r + 1) if 0 <= i < len(left)]
    return Finding(
        r,
        (
            f"r = {r} in each of {merging_layers} layers leaves {left[r]} of a view's {patches} patches "
            f"({left[r] / patches:.1%}); {wanted} were wanted ({' and '.join(near)}).",
        ),
    )


def tokens_left(patches: int, layers: int, r: int) -> int:
    """Tokens of a view after `layers` layers that merge r each, a class token (which always stays) not counted.

    A layer merges at most `(tokens - protected) // 2`, as ToMe has it: half of the patches, with a class token or not.
    """
    n = patches
    for _ in range(layers):
        n -= min(r, n // 2)
    return n


@calibrations.register
def unseen_layers(visual_mass: Sequence[Tensor], *, low: float = 0.5, margin: int = 1) -> Finding:
    """The layers in which the answer persistently hardly looks at visual tokens (arXiv 2511.15098, section 5.4).

    A layer's attention is the greatest over the steps, averaged over the samples: one step that looks is enough to
    keep it. Layers below `low` times that of the greatest layer (the spike) can go; those within `margin` of the
    spike stay. No number is published; these are ours.
    """
    mass = by_layer(visual_mass)
    spike = int(mass.argmax())
    near = (torch.arange(mass.shape[0]) - spike).abs() <= margin
    unseen = ((mass < low * mass[spike]) & ~near).nonzero()[:, 0].tolist()
    each = ", ".join(f"{i}: {value:.1%}" for i, value in enumerate(mass.tolist()))
    said = (
        f"Share of the answer's attention on visual tokens, greatest over the steps, mean over {len(visual_mass)} "
        f"samples, by layer: {each}.",
        f"Layer {spike} is the spike; layers below {low:g} of it and not within {margin} of it are skipped.",
    )
    if not unseen:
        raise ProbeError(
            f"no layer can be skipped: all look at visual tokens with at least {low:g} of the attention of layer "
            f"{spike}, or are within {margin} of it. {said[0]}"
        )
    return Finding(unseen, said)


def by_layer(visual_mass: Sequence[Tensor]) -> Tensor:
    """`(layer,)`: per layer the greatest attention over the steps, mean over samples, of `(step, layer)` each."""
    if not visual_mass:
        raise ProbeError("no sample has attention from the answer to visual tokens; ask about pictures")
    return torch.stack([m.float().nan_to_num(0.0).amax(0) for m in visual_mass]).mean(0)
