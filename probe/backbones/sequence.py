"""From ids and visual tokens to a `Prompt`: roles, boxes and views of every position. Knows no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from probe.backbones.base import Prompt
from probe.backbones.layout import Cells, Layout
from probe.backbones.splice import splice
from probe.site import Role

Embed = Callable[[Tensor], Tensor]
"""Token ids `(...)` to embeddings `(..., width)`."""


def describe(layouts: Sequence[Layout]) -> Cells:
    """The cells of several pictures in order; views and pictures are counted on from one to the next."""
    cells, view, picture = [], 0, 0
    for layout in layouts:
        own = layout.cells()
        cells.append(Cells(own.newline, own.box, own.view + view, own.picture + picture))
        view, picture = view + layout.views, picture + layout.pictures
    parts = zip(*((c.newline, c.box, c.view, c.picture) for c in cells), strict=True)
    return Cells(*(torch.cat(part) for part in parts))


def lay_out(layouts: Sequence[Layout], projected: Tensor, newline: Tensor) -> list[Tensor]:
    """Features `(views, patches, width)` of all pictures to the visual tokens `(tokens, width)` of each."""
    views = projected.split([layout.views for layout in layouts])
    return [layout.tokens(own, newline) for layout, own in zip(layouts, views, strict=True)]


def with_pictures(
    ids: Sequence[int],
    tokens: Sequence[Tensor],
    cells: Cells,
    embed: Embed,
    position: Tensor | None = None,
    limit: int | None = None,
) -> Prompt:
    """A sequence from ids in which `splice.IMAGE` stands for each of `tokens`, one `(n, width)` per picture.

    What stands before the first visual token is `system`, all other text `question`. `position` are the rotary
    positions of the finished sequence, as in `Prompt`. The sequence is cut to `limit` positions.
    """
    device = tokens[0].device
    done = splice(torch.tensor([list(ids)], device=device), None, tokens, embed, limit=limit)
    used = done.visual[0]
    where = used >= 0
    seen = used[where].to("cpu")
    first = int(where.nonzero()[0]) if bool(where.any()) else used.shape[0]
    role = torch.full_like(used, Role.QUESTION, dtype=torch.int8)
    role[:first] = Role.SYSTEM
    newline = cells.newline[seen].to(device)
    role[where] = torch.where(newline, int(Role.NEWLINE), int(Role.VISUAL)).to(torch.int8)
    visual = torch.where(where, where.cumsum(0) - 1, -1)
    box, view, picture = (part[seen].to(device) for part in (cells.box, cells.view, cells.picture))
    return Prompt(done.embeds[0], done.ids[0], role, visual, box, view, picture, position)


def text_alone(ids: Sequence[int], system: int, embed: Embed, device: torch.device) -> Prompt:
    """A sequence without pictures, the first `system` positions of which belong to the template."""
    row = torch.tensor(list(ids), device=device)
    role = torch.full_like(row, Role.QUESTION, dtype=torch.int8)
    role[:system] = Role.SYSTEM
    none = torch.zeros(0, dtype=torch.int16, device=device)
    return Prompt(embed(row), row, role, torch.full_like(row, -1), torch.zeros(0, 4, device=device), none, none)
