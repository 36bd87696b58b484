"""The only place that changes the length of a sequence.

A `Layout` says which row of the canvas stands where; hidden states, rotary tables, masks and the canvas itself are
narrowed through it together, so that all agree in length by construction. Knows no model and no probe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from probe.site import Plan, Role

Positions = Literal["keep", "compact"]
"""`keep`: survivors keep their rotary positions. `compact`: they are renumbered 0..n-1."""

Order = Literal["raster", "score"]
"""`raster`: survivors stand as they stood. `score`: in the order in which the selection named them."""


@dataclass(frozen=True)
class Layout:
    """What stands at each row of a (batched, right-padded) sequence.

    All `(batch, length)`: `row` int64, the row of the canvas at its start (-1 padding); `role` int8;
    `position` int64, the rotary position; `visual` int64, the original visual index or -1; `hidden_key` bool or
    None: rows whose keys no query may see. Per sample: `length` real rows; `visual_rows (n,)` int64 the rows of its
    alive visual tokens (newlines included) in the order in which they stand; `other_rows (m,)` int64 all others.
    `length_at_start` is the canvas's width when it was made (`row` values are below it); `pristine` says that
    nothing was removed since.
    """

    row: Tensor
    role: Tensor
    position: Tensor
    visual: Tensor
    visual_rows: tuple[Tensor, ...]
    other_rows: tuple[Tensor, ...]
    length: tuple[int, ...]
    length_at_start: int
    hidden_key: Tensor | None = None
    pristine: bool = True

    @property
    def batch(self) -> int:
        """Samples."""
        return self.row.shape[0]

    @property
    def width(self) -> int:
        """Rows, padding included."""
        return self.row.shape[1]

    @property
    def n_visual(self) -> tuple[int, ...]:
        """Alive visual tokens of each sample. Known on the host: no synchronisation."""
        return tuple(rows.shape[0] for rows in self.visual_rows)

    def key_mask(self) -> Tensor | None:
        """`(batch, length)` True at keys that may be seen; None when all may."""
        padded = any(n != self.width for n in self.length)
        if not padded and self.hidden_key is None:
            return None
        mask = self.row >= 0
        return mask if self.hidden_key is None else mask & ~self.hidden_key

    def locate(self, rows: Tensor) -> Tensor:
        """Where rows of the canvas stand now. `rows (batch, r)` of the canvas's start; all must be alive."""
        if self.pristine:
            return rows
        n = self.length_at_start
        now = torch.zeros(self.batch, n + 1, dtype=torch.int64, device=self.row.device)
        here = torch.arange(self.width, device=self.row.device).expand_as(self.row)
        # padding has row -1: it lands in the spare last column
        now.scatter_(1, self.row.where(self.row >= 0, n), here)
        return now.gather(1, rows)


def make_layout(roles: Sequence[Tensor], visuals: Sequence[Tensor], device: torch.device | str) -> Layout:
    """The layout of a fresh canvas from each sample's `role (P,)` and `visual (P,)`, padded on the right."""
    width = max(role.shape[0] for role in roles)
    batch = len(roles)
    row = torch.full((batch, width), -1, dtype=torch.int64)
    role = torch.full((batch, width), int(Role.PAD), dtype=torch.int8)
    visual = torch.full((batch, width), -1, dtype=torch.int64)
    position = torch.zeros((batch, width), dtype=torch.int64)
    visual_rows, other_rows, length = [], [], []
    for b, (r, v) in enumerate(zip(roles, visuals, strict=True)):
        n = r.shape[0]
        row[b, :n] = position[b, :n] = torch.arange(n)
        role[b, :n] = r.cpu()
        visual[b, :n] = v.cpu()
        visual_rows.append((visual[b, :n] >= 0).nonzero()[:, 0].to(device))
        other_rows.append((visual[b, :n] < 0).nonzero()[:, 0].to(device))
        length.append(n)
    return Layout(
        row=row.to(device),
        role=role.to(device),
        position=position.to(device),
        visual=visual.to(device),
        visual_rows=tuple(visual_rows),
        other_rows=tuple(other_rows),
        length=tuple(length),
        length_at_start=width,
    )


def narrow(
    layout: Layout, plans: Sequence[Plan | None], *, positions: Positions = "keep", order: Order = "raster"
) -> tuple[Layout, Tensor]:
    """Remove the visual tokens that the plans do not keep.

    `plans` has one entry per sample; None keeps all. Returns the new layout and the gather index `(batch, new
    length)` that takes hidden states, rotary tables and the canvas there (`take`). Counts come from shapes, so
    nothing waits for the device.
    """
    device = layout.row.device
    kept_rows: list[Tensor] = []
    others: list[Tensor] = []
    gathers: list[Tensor] = []
    for b, plan in enumerate(plans):
        visual = layout.visual_rows[b] if plan is None else layout.visual_rows[b][plan.kept]
        survivors = torch.cat([layout.other_rows[b], visual])
        source, by_row = survivors.sort()
        # ranks of the visual survivors and of the others in the new sequence, without nonzero()
        rank = torch.empty_like(by_row).scatter_(0, by_row, torch.arange(by_row.shape[0], device=device))
        n_other = layout.other_rows[b].shape[0]
        others.append(rank[:n_other])
        places = rank[n_other:].sort().values
        if order == "score" and plan is not None:
            source = source.scatter(0, places, visual)
        kept_rows.append(places)
        gathers.append(source)
    width = max(g.shape[0] for g in gathers)
    index = torch.zeros(layout.batch, width, dtype=torch.int64, device=device)
    real = torch.zeros(layout.batch, width, dtype=torch.bool, device=device)
    for b, source in enumerate(gathers):
        index[b, : source.shape[0]] = source
        real[b, : source.shape[0]] = True
    padded = any(g.shape[0] != width for g in gathers)

    def moved(x: Tensor, filler: int) -> Tensor:
        y = x.gather(1, index)
        return torch.where(real, y, torch.full_like(y, filler)) if padded else y

    position = moved(layout.position, 0)
    if positions == "compact":
        fresh = torch.arange(width, device=device).expand_as(position)
        cut = torch.tensor([plan is not None for plan in plans], device=device)[:, None]
        position = torch.where(cut, fresh, position)  # a sample that lost nothing keeps what it had
    new = replace(
        layout,
        row=moved(layout.row, -1),
        role=moved(layout.role, int(Role.PAD)),
        position=position,
        visual=moved(layout.visual, -1),
        visual_rows=tuple(kept_rows),
        other_rows=tuple(others),
        length=tuple(g.shape[0] for g in gathers),
        hidden_key=None if layout.hidden_key is None else layout.hidden_key.gather(1, index),
        pristine=False,
    )
    return new, index


def hide(layout: Layout, plans: Sequence[Plan | None]) -> Layout:
    """Hide the keys of the visual tokens that the plans do not keep; nothing is removed.

    Hidden tokens are alive no more: they leave `visual_rows` and stay where they are as rows that nobody sees.
    """
    hidden = torch.zeros_like(layout.row, dtype=torch.bool) if layout.hidden_key is None else layout.hidden_key.clone()
    visual_rows, other_rows = list(layout.visual_rows), list(layout.other_rows)
    for b, plan in enumerate(plans):
        if plan is None:
            continue
        rows = layout.visual_rows[b]
        order = torch.ones_like(rows).scatter_(0, plan.kept, 0).sort(stable=True).indices
        n_kept = plan.kept.shape[0]
        visual_rows[b] = rows[order[:n_kept]]
        gone = rows[order[n_kept:]]
        hidden[b].scatter_(0, gone, True)
        other_rows[b] = torch.cat([layout.other_rows[b], gone])
    return replace(layout, hidden_key=hidden, visual_rows=tuple(visual_rows), other_rows=tuple(other_rows))


def take(x: Tensor, index: Tensor, streams: int = 1) -> Tensor:
    """Gather rows of `x (streams * batch or 1, length, ...)` at `index (batch, new length)`."""
    rows = index.repeat(streams, 1) if streams > 1 else index
    if x.shape[0] == 1 and rows.shape[0] > 1:
        x = x.expand(rows.shape[0], *x.shape[1:])
    return x.gather(1, rows.reshape(*rows.shape, *[1] * (x.dim() - 2)).expand(*rows.shape, *x.shape[2:]))


def restore(full: Tensor, short: Tensor, index: Tensor, streams: int = 1) -> Tensor:
    """Put narrowed rows back: `full` with the rows at `index (batch, new length)` replaced by `short`.

    The inverse of `take` for every row that survived; rows that were removed keep their value in `full`.
    """
    rows = index.repeat(streams, 1) if streams > 1 else index
    where = rows.reshape(*rows.shape, *[1] * (full.dim() - 2)).expand(*rows.shape, *full.shape[2:])
    return full.scatter(1, where, short)


def replan(plan: Plan, source: Layout, target: Layout, sample: int) -> Plan:
    """A plan over the alive visual tokens of `source`, said over those of `target` (same canvas).

    Tokens that `target` still has but `source` lost earlier in the forward are not kept.
    """
    ids = source.visual[sample, source.visual_rows[sample]][plan.kept]
    spot = torch.zeros(target.length_at_start, dtype=torch.int64, device=ids.device)
    target_ids = target.visual[sample, target.visual_rows[sample]]
    spot.scatter_(0, target_ids, torch.arange(target_ids.shape[0], device=ids.device))
    return Plan(spot[ids], plan.fate)
