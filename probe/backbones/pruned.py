"""Views that lost patches in the encoder: their tokens one after the other, and what becomes of all the others.

Once a patch is gone a view is no square of patches any more, so nothing that needs one can follow: no joining of tiles,
no trimming, no pooling, no newline per row. What is left stands as it stands in its view (raster order, unless a probe
ordered it otherwise; tokens that were added last), views one after the other, a picture's base view first.

The visual index of a token is then its patch's number over all views, so that a trace accounts for every patch; tokens
that were added count on from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from probe.backbones.base import Features, Prompt, Survivors, Views
from probe.backbones.layout import Layout
from probe.backbones.patches import patches_of
from probe.backbones.sequence import Embed
from probe.backbones.splice import IMAGE, splice
from probe.errors import ProbeError
from probe.site import Fate, Role


def views_of(layouts: Sequence[Layout]) -> Views:
    """The views of several pictures, in order, from each one's layout."""
    parts = [patches_of(layout) for layout in layouts]
    picture, start = [], 0
    for layout, part in zip(layouts, parts, strict=True):
        picture.append(part.picture + start)
        start += layout.pictures
    return Views(
        box=torch.cat([part.box for part in parts]),
        picture=torch.cat(picture).to(torch.int16),
        base=tuple(base for part in parts for base in part.base),
        place=tuple(i for i, layout in enumerate(layouts) for _ in range(layout.views)),
        token=torch.cat([part.token for part in parts]),
        tokens=tuple(layout.count for layout in layouts),
    )


@dataclass(frozen=True)
class Joined:
    """Surviving tokens in the order of the sequence.

    `tokens[p] (n, width)`: those that go to place p of the prompt; `index (sum of n,)` int64: the visual index of each.
    """

    tokens: list[Tensor]
    index: Tensor


def survivors_of(features: Features) -> Survivors:
    """The survivors of features that have some."""
    if features.survivors is None:
        raise ProbeError("these features have all their patches: nothing was removed in the encoder")
    return features.survivors


def join(features: Features) -> Joined:
    """The tokens of every view, one view after the other, for each place of the prompt."""
    left = survivors_of(features)
    places: list[list[Tensor]] = [[] for _ in range(max(left.views.place, default=-1) + 1)]
    for v, place in enumerate(left.views.place):
        places[place].append(features.projected[v, : left.alive[v].shape[0]])
    return Joined([torch.cat(views) for views in places], torch.cat(left.alive))


def token_boxes(left: Survivors) -> Tensor:
    """`(T, 4)` float32: what every token sees: the hull of the patches that are in it now.

    A token that no patch is in (it was dropped, or stands for dropped ones) sees what its patch sees, or its view.
    """
    box = left.views.box.to(left.holder.device)
    views, patches = box.shape[:2]
    count = left.view.shape[0]
    whole = torch.cat([box[..., :2].amin(1), box[..., 2:].amax(1)], -1)
    own = torch.cat([box.flatten(0, 1), whole[left.view[views * patches :]]])
    held = left.holder.where(left.holder >= 0, count)  # patches that are gone go to a spare last row
    at = held[:, None].expand(-1, 2)
    flat = box.flatten(0, 1)
    low = flat.new_full((count + 1, 2), torch.inf).scatter_reduce(0, at, flat[:, :2], "amin")[:-1]
    high = flat.new_full((count + 1, 2), -torch.inf).scatter_reduce(0, at, flat[:, 2:], "amax")[:-1]
    hull = torch.cat([low, high], -1)
    return torch.where(hull.isfinite().all(-1, keepdim=True), hull, own)


def prompt_of_survivors(
    ids: Sequence[int], left: Survivors, joined: Joined, embed: Embed, limit: int | None = None
) -> Prompt:
    """A sequence from ids in which `splice.IMAGE` stands for each place of `joined`.

    The sequence is cut to `limit` positions; tokens that are cut off are dropped ones.
    """
    device = left.holder.device
    joined = Joined([tokens.to(device) for tokens in joined.tokens], joined.index.to(device))
    done = splice(torch.tensor([list(ids)], device=device), None, joined.tokens, embed, limit=limit)
    used = done.visual[0]
    there = used >= 0
    visual = torch.where(there, joined.index[used.clamp(min=0)], -1) if joined.index.shape[0] else used
    role = torch.full_like(used, int(Role.QUESTION), dtype=torch.int8)
    role[: list(ids).index(IMAGE) if IMAGE in ids else None] = int(Role.SYSTEM)
    role[there] = int(Role.VISUAL)
    fate = left.fate.clone()
    cut = torch.ones_like(fate, dtype=torch.bool)
    cut[visual[there]] = False
    fate[cut & (fate == int(Fate.KEPT))] = int(Fate.DROPPED)
    return Prompt(
        embeds=done.embeds[0],
        ids=done.ids[0],
        role=role,
        visual=visual,
        box=token_boxes(left),
        view=left.view.to(torch.int16),
        picture=left.views.picture.to(device)[left.view],
        position=None if left.compact else _positions(ids, left, joined)[: used.shape[0]],
        fate=fate,
        unpruned=sum(left.views.tokens),
    )


def _positions(ids: Sequence[int], left: Survivors, joined: Joined) -> Tensor:
    """`(P,)` int64: where everything would stand in the unpruned sequence; tokens that were added, with their view's
    last patch.
    """
    token = left.views.token.to(left.holder.device)
    patches = token.numel()
    last = token[:, -1][left.view[patches:]]
    of_number = torch.cat([token.flatten(), last])
    parts: list[Tensor] = []
    start = place = used = 0
    for one in ids:
        if one != IMAGE:
            parts.append(of_number.new_tensor([start]))
            start += 1
            continue
        n = joined.tokens[place].shape[0]
        parts.append(start + of_number[joined.index[used : used + n]])
        start, used, place = start + left.views.tokens[place], used + n, place + 1
    return torch.cat(parts)
