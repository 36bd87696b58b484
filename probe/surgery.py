"""The only place that changes the length of a sequence.

A `Layout` says which row of the canvas stands where; hidden states, rotary tables, masks and the canvas itself are
narrowed through it together, so that all agree in length by construction. Knows no model and no probe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from probe.site import Plan, Role
from probe.upload import upload

Positions = Literal["keep", "compact"]
"""`keep`: survivors keep their rotary positions. `compact`: they are renumbered 0..n-1."""


@dataclass(frozen=True)
class Layout:
    """What stands at each row of a (batched, right-padded) sequence.

    All `(batch, length)`: `row` int64, the row's number on the canvas (-1 padding); `role` int8; `position` int64, the
    rotary position, or `(batch, length, axes)`; `visual` int64, the original visual index or -1; `hidden_key` bool or
    None: rows whose keys no query may see; `size` float32 or None: original tokens behind each row, whose logarithm is
    added to the attention that its key receives. Per sample: `length` real rows; `visual_rows (n,)` int64 the rows of
    its alive visual tokens (newlines included) in the order in which they stand; `other_rows (m,)` int64 all others;
    `tail` rows behind the prompt (answer and suffix); `answer_start` the position of the first answer slot.
    `length_at_start` is above every row number; `pristine` says that row r stands at place r.
    """

    row: Tensor
    role: Tensor
    position: Tensor
    visual: Tensor
    visual_rows: tuple[Tensor, ...]
    other_rows: tuple[Tensor, ...]
    length: tuple[int, ...]
    length_at_start: int
    tail: tuple[int, ...]
    answer_start: tuple[int, ...]
    hidden_key: Tensor | None = None
    size: Tensor | None = None
    pristine: bool = True
    evicted: bool = False
    """Whether rows were left out by `keep_places`: two layouts with as many tokens then need not hold the same ones."""

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

    def locate_in(self, sample: int, rows: Tensor) -> Tensor:
        """Where these rows `(n,)` of one sample stand now; all must be alive."""
        if self.pristine:
            return rows
        now = torch.zeros(self.length_at_start + 1, dtype=torch.int64, device=self.row.device)
        own = self.row[sample]
        now.scatter_(0, own.where(own >= 0, self.length_at_start), torch.arange(self.width, device=own.device))
        return now[rows]


def make_layout(
    roles: Sequence[Tensor],
    visuals: Sequence[Tensor],
    device: torch.device | str,
    positions: Sequence[Tensor] | None = None,
    tail: int = 0,
) -> Layout:
    """The layout of a fresh canvas from each sample's `role (P,)`, `visual (P,)` and `position (P[, axes])`.

    Padded on the right. Positions are 0..P-1 where none are given; `tail` rows of each sample stand behind its prompt.
    """
    width = max(role.shape[0] for role in roles)
    batch = len(roles)
    row = torch.full((batch, width), -1, dtype=torch.int64)
    role = torch.full((batch, width), int(Role.PAD), dtype=torch.int8)
    visual = torch.full((batch, width), -1, dtype=torch.int64)
    axes = positions[0].shape[1:] if positions is not None else ()
    position = torch.zeros((batch, width, *axes), dtype=torch.int64)
    starts = []
    visual_rows, other_rows, length = [], [], []
    for b, (r, v) in enumerate(zip(roles, visuals, strict=True)):
        n = r.shape[0]
        row[b, :n] = torch.arange(n)
        position[b, :n] = row[b, :n] if positions is None else positions[b].cpu()
        starts.append(int(position[b, n - tail].max()) if tail else n)
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
        tail=(tail,) * batch,
        answer_start=tuple(starts),
    )


def narrow(layout: Layout, plans: Sequence[Plan | None], *, positions: Positions = "keep") -> tuple[Layout, Tensor]:
    """Carry out plans on a sequence: the visual tokens that they do not keep leave it, appended ones join it.

    `plans` has one entry per sample; None keeps all. Survivors stand in the order of `Plan.kept`, appended tokens right
    behind them, at the position of the last of them. Returns the new layout and the gather index `(batch, new length)`
    that takes hidden states, rotary tables and the canvas there (`take`); the rows of merged and appended tokens then
    get their values from `put_values`. Counts come from shapes, so nothing waits for the device.
    """
    device = layout.row.device
    kept_rows: list[Tensor] = []
    others: list[Tensor] = []
    gathers: list[Tensor] = []
    fresh: list[Tensor | None] = []
    for b, plan in enumerate(plans):
        visual = layout.visual_rows[b] if plan is None else layout.visual_rows[b][plan.kept]
        m = 0 if plan is None else plan.appended
        # sort keys: twice the old row; appended tokens come right behind the last survivor (or the first of all)
        anchor = visual.max() if visual.shape[0] else layout.visual_rows[b].min() if m else visual
        keys = torch.cat(
            [2 * layout.other_rows[b], 2 * visual.sort().values, *([(2 * anchor + 1).expand(m)] if m else [])]
        )
        source = torch.cat([layout.other_rows[b], visual, *([anchor.expand(m)] if m else [])])
        by_key = keys.sort(stable=True).indices
        # ranks in the new sequence, without nonzero()
        rank = torch.empty_like(by_key).scatter_(0, by_key, torch.arange(by_key.shape[0], device=device))
        n_other = layout.other_rows[b].shape[0]
        others.append(rank[:n_other])
        kept_rows.append(rank[n_other:])
        gathers.append(torch.empty_like(source).scatter_(0, rank, source))
        fresh.append(rank[rank.shape[0] - m :] if m else None)
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

    position = take(layout.position, index)
    starts = list(layout.answer_start)
    if positions == "compact":
        extra = (1,) * (position.dim() - 2)
        count = torch.arange(width, device=device).reshape(1, width, *extra).expand_as(position)
        cut = upload([plan is not None for plan in plans], device).reshape(-1, 1, *extra)
        position = torch.where(cut, count, position)  # a sample that lost nothing keeps what it had
        for b, plan in enumerate(plans):
            if plan is not None:
                starts[b] = gathers[b].shape[0] - layout.tail[b]
    row, visual_index = moved(layout.row, -1), moved(layout.visual, -1)
    most = max((plan.appended for plan in plans if plan is not None), default=0)
    for b, places in enumerate(fresh):
        if places is not None:
            row[b, places] = layout.length_at_start + torch.arange(places.shape[0], device=device)
            visual_index[b, places] = -1
    new = replace(
        layout,
        row=row,
        role=moved(layout.role, int(Role.PAD)),
        position=position,
        visual=visual_index,
        visual_rows=tuple(kept_rows),
        other_rows=tuple(others),
        length=tuple(g.shape[0] for g in gathers),
        length_at_start=layout.length_at_start + most,
        answer_start=tuple(starts),
        hidden_key=None if layout.hidden_key is None else layout.hidden_key.gather(1, index),
        size=_sizes(layout, plans, index, kept_rows),
        pristine=False,
    )
    for b, places in enumerate(fresh):
        if places is not None:
            new.role[b, places] = int(Role.VISUAL)
    return new, index


def _sizes(layout: Layout, plans: Sequence[Plan | None], index: Tensor, kept_rows: Sequence[Tensor]) -> Tensor | None:
    """How many original tokens stand behind each row; None where no plan carries that on and none did before."""
    carried = [b for b, plan in enumerate(plans) if plan is not None and plan.size is not None]
    if layout.size is None and not carried:
        return None
    old = torch.ones_like(layout.row, dtype=torch.float32) if layout.size is None else layout.size
    size = old.gather(1, index)
    for b in carried:
        plan = plans[b]
        assert plan is not None and plan.size is not None
        size[b, kept_rows[b]] = plan.size.to(size)
    return size


def put_values(hidden: Tensor, layout: Layout, plans: Sequence[Plan | None], streams: int = 1) -> Tensor:
    """Hidden states `(streams * batch, length, width)` after `take`, with the values that plans give their tokens.

    Under guidance the second stream, which must not see the picture, keeps its own.
    """
    if all(plan is None or plan.values is None for plan in plans):
        return hidden
    hidden = hidden.clone()
    for b, plan in enumerate(plans):
        if plan is not None and plan.values is not None:
            hidden[b, layout.visual_rows[b]] = plan.values.to(hidden)
    return hidden


def keep_places(layout: Layout, places: Sequence[Tensor]) -> tuple[Layout, Tensor]:
    """Each sample keeps what stands at its `places (n,)`, ascending; whatever it is, the rest leaves.

    Returns the new layout and the gather index `(batch, new length)`. How many of them are visual tokens only the
    device knows: this waits for it.
    """
    device = layout.row.device
    width = max(p.shape[0] for p in places)
    index = torch.zeros(layout.batch, width, dtype=torch.int64, device=device)
    real = torch.zeros(layout.batch, width, dtype=torch.bool, device=device)
    visual_rows: list[Tensor] = []
    other_rows: list[Tensor] = []
    tail: list[int] = []
    for b, place in enumerate(places):
        index[b, : place.shape[0]] = place
        real[b, : place.shape[0]] = True
        rank = torch.full((layout.width,), -1, dtype=torch.int64, device=device)
        rank[place] = torch.arange(place.shape[0], device=device)
        for rows, kept in ((layout.visual_rows[b], visual_rows), (layout.other_rows[b], other_rows)):
            now = rank[rows]
            kept.append(now[now >= 0])
        tail.append(int((place >= layout.length[b] - layout.tail[b]).sum()))

    def moved(x: Tensor, filler: int) -> Tensor:
        y = x.gather(1, index)
        return torch.where(real, y, torch.full_like(y, filler))

    new = replace(
        layout,
        row=moved(layout.row, -1),
        role=moved(layout.role, int(Role.PAD)),
        position=take(layout.position, index),
        visual=moved(layout.visual, -1),
        visual_rows=tuple(visual_rows),
        other_rows=tuple(other_rows),
        length=tuple(p.shape[0] for p in places),
        tail=tuple(tail),
        hidden_key=None if layout.hidden_key is None else layout.hidden_key.gather(1, index),
        size=None if layout.size is None else layout.size.gather(1, index),
        pristine=False,
        evicted=True,
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


def select(layout: Layout, prompt: Literal["all", "none", "last"], tail: np.ndarray) -> tuple[Layout, Tensor]:
    """The rows that a pass computes: of the prompt all, none or the last, behind it the places `tail (batch, t)`.

    Returns the layout of just these rows and the gather index `(batch, new length)`. Nothing waits for the device.
    """
    device = layout.row.device
    n_prompt = [n - t for n, t in zip(layout.length, layout.tail, strict=True)]
    kept = {"all": n_prompt, "none": [0] * layout.batch, "last": [1] * layout.batch}[prompt]
    width = max(kept) + tail.shape[1]
    place = np.zeros((layout.batch, width), np.int64)
    real = np.zeros((layout.batch, width), bool)
    for b, (n, k) in enumerate(zip(n_prompt, kept, strict=True)):
        place[b, :k] = np.arange(n - k, n)
        place[b, k : k + tail.shape[1]] = n + tail[b]
        real[b, : k + tail.shape[1]] = True
    index, alive = upload(place, device), upload(real, device)
    visual_rows, other_rows = [], []
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    for b, k in enumerate(kept):
        behind = torch.arange(k, k + tail.shape[1], device=device)
        if prompt == "all":
            n_other = n_prompt[b] - layout.visual_rows[b].shape[0]
            visual_rows.append(layout.visual_rows[b])
            other_rows.append(torch.cat([layout.other_rows[b].sort().values[:n_other], behind]))
        else:
            visual_rows.append(nothing)
            other_rows.append(torch.arange(k + tail.shape[1], device=device))

    def moved(x: Tensor, filler: int) -> Tensor:
        y = x.gather(1, index)
        return y if real.all() else torch.where(alive, y, torch.full_like(y, filler))

    new = replace(
        layout,
        row=moved(layout.row, -1),
        role=moved(layout.role, int(Role.PAD)),
        position=take(layout.position, index),
        visual=moved(layout.visual, -1),
        visual_rows=tuple(visual_rows),
        other_rows=tuple(other_rows),
        length=tuple(k + tail.shape[1] for k in kept),
        tail=(tail.shape[1],) * layout.batch,
        hidden_key=None if layout.hidden_key is None else layout.hidden_key.gather(1, index),
        size=None if layout.size is None else layout.size.gather(1, index),
        pristine=False,
    )
    return new, index


def extend(layout: Layout, more: Layout) -> Layout:
    """The rows of `layout`, then those of `more`, which must be none of them (padding may stand between)."""
    offset = layout.width
    hidden = None
    if layout.hidden_key is not None or more.hidden_key is not None:
        parts = [
            torch.zeros_like(x.row, dtype=torch.bool) if x.hidden_key is None else x.hidden_key for x in (layout, more)
        ]
        hidden = torch.cat(parts, 1)
    size = None
    if layout.size is not None or more.size is not None:
        sizes = [torch.ones_like(x.row, dtype=torch.float32) if x.size is None else x.size for x in (layout, more)]
        size = torch.cat(sizes, 1)
    return replace(
        layout,
        row=torch.cat([layout.row, more.row], 1),
        role=torch.cat([layout.role, more.role], 1),
        position=torch.cat([layout.position, more.position], 1),
        visual=torch.cat([layout.visual, more.visual], 1),
        visual_rows=tuple(
            torch.cat([a, b + offset]) for a, b in zip(layout.visual_rows, more.visual_rows, strict=True)
        ),
        other_rows=tuple(torch.cat([a, b + offset]) for a, b in zip(layout.other_rows, more.other_rows, strict=True)),
        length=tuple(a + b for a, b in zip(layout.length, more.length, strict=True)),
        length_at_start=max(layout.length_at_start, more.length_at_start),
        tail=tuple(a + b for a, b in zip(layout.tail, more.tail, strict=True)),
        hidden_key=hidden,
        size=size,
        pristine=False,
    )


def resize(layout: Layout, source: np.ndarray, fresh: np.ndarray) -> tuple[Layout, Tensor]:
    """Answer slots come and go (a batch of one): `source (new tail,)` places behind the prompt, -1 for a new slot.

    New slots get the row numbers `fresh`. Positions behind the prompt are counted anew. Returns the layout and the
    gather index `(1, new length)`; the rows of new slots point at row 0 and are the caller's to fill.
    """
    device = layout.row.device
    n_prompt = layout.length[0] - layout.tail[0]
    order = np.concatenate([np.arange(n_prompt), np.where(source < 0, 0, n_prompt + source)])
    index = upload(order, device)[None]
    new = upload(np.concatenate([np.zeros(n_prompt, bool), source < 0]), device)[None]
    row = layout.row.gather(1, index)
    row[new] = upload(fresh, device)
    role = layout.role.gather(1, index).masked_fill(new, int(Role.ANSWER))
    visual = layout.visual.gather(1, index).masked_fill(new, -1)
    position = take(layout.position, index)
    count = torch.arange(len(source), device=device) + layout.answer_start[0]
    position[0, n_prompt:] = count.reshape(-1, *[1] * (position.dim() - 2)).expand_as(position[0, n_prompt:])
    n_other = n_prompt - layout.visual_rows[0].shape[0]
    behind = torch.arange(n_prompt, len(order), device=device)
    changed = replace(
        layout,
        row=row,
        role=role,
        position=position,
        visual=visual,
        other_rows=(torch.cat([layout.other_rows[0].sort().values[:n_other], behind]),),
        length=(len(order),),
        length_at_start=layout.length_at_start + len(fresh),
        tail=(len(source),),
        hidden_key=None if layout.hidden_key is None else layout.hidden_key.gather(1, index).masked_fill(new, False),
        size=None if layout.size is None else layout.size.gather(1, index).masked_fill(new, 1.0),
        pristine=False,
    )
    return changed, index


def take(x: Tensor, index: Tensor, streams: int = 1) -> Tensor:
    """Gather rows of `x (streams * batch or 1, length, ...)` at `index (batch, new length)`."""
    index = index.to(x.device)
    rows = index.repeat(streams, 1) if streams > 1 else index
    if x.shape[0] == 1 and rows.shape[0] > 1:
        x = x.expand(rows.shape[0], *x.shape[1:])
    return x.gather(1, rows.reshape(*rows.shape, *[1] * (x.dim() - 2)).expand(*rows.shape, *x.shape[2:]))


def take_columns(x: Tensor, index: Tensor, streams: int = 1) -> Tensor:
    """Gather columns of stored keys or values `x (streams * batch, head, column, size)` at `index (batch, new)`."""
    at = index.to(x.device).repeat(streams, 1)[:, None, :, None]
    return x.gather(2, at.expand(x.shape[0], x.shape[1], at.shape[2], x.shape[3]))


def put_columns(x: Tensor, index: Tensor, fresh: Tensor, streams: int = 1) -> None:
    """In place: columns of `x` at `index (batch, n)` take `fresh (streams * batch, head, n, size)`."""
    at = index.to(x.device).repeat(streams, 1)[:, None, :, None]
    x.scatter_(2, at.expand_as(fresh), fresh)


def restore(full: Tensor, short: Tensor, index: Tensor, streams: int = 1) -> Tensor:
    """Put narrowed rows back: `full` with the rows at `index (batch, new length)` replaced by `short`.

    The inverse of `take` for every row that survived; rows that were removed keep their value in `full`.
    """
    index = index.to(full.device)
    rows = index.repeat(streams, 1) if streams > 1 else index
    where = rows.reshape(*rows.shape, *[1] * (full.dim() - 2)).expand(*rows.shape, *full.shape[2:])
    return full.scatter(1, where, short)


def replan(plan: Plan, source: Layout, target: Layout, sample: int) -> Plan:
    """A removal among the alive visual tokens of `source`, said over those of `target` (same canvas).

    Tokens that `target` still has but `source` lost earlier in the forward are not kept. What was merged or appended at
    the place of the plan stays there: only who is kept is carried over.
    """
    rows = source.row[sample, source.visual_rows[sample]][plan.kept]
    if source.length_at_start > target.length_at_start:  # tokens that were appended on the way stand in `source` alone
        rows = rows[rows < target.length_at_start]
    spot = torch.zeros(max(source.length_at_start, target.length_at_start), dtype=torch.int64, device=rows.device)
    target_rows = target.row[sample, target.visual_rows[sample]]
    spot.scatter_(0, target_rows, torch.arange(target_rows.shape[0], device=rows.device))
    return Plan(spot[rows], plan.fate)
