"""The tokens of every view as the encoder shrinks them: the only place that changes the length of a view.

Views lie side by side in one batch, `(view, row, width)`: rows that are no patches first (a class token), then the
view's tokens, then padding where other views have more. A token keeps one number for life (see `Survivors`). Knows no
module and no probe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from probe.backbones.base import Survivors, Views
from probe.errors import ProbeError
from probe.site import Fate, Plan

Group = tuple[int, ...]
"""Views that one plan is made for, in the order in which their tokens are numbered in it."""


@dataclass(frozen=True)
class ViewState:
    """Which tokens every view has now.

    `alive[v] (n,)`, `holder (views * patches,)`, `view (T,)`, `size (T,)` and `fate (T,)` as in `Survivors`. `sized`
    says that sizes count in attention; `pristine` that nothing has changed yet; `compact` as in `Survivors`.
    """

    views: Views
    alive: tuple[Tensor, ...]
    holder: Tensor
    view: Tensor
    size: Tensor
    fate: Tensor
    sized: bool = False
    pristine: bool = True
    compact: bool = False

    @classmethod
    def fresh(cls, views: Views, device: torch.device | str) -> ViewState:
        """Every patch of every view."""
        count, patches = views.box.shape[:2]
        numbers = torch.arange(count * patches, device=device)
        return cls(
            views=views,
            alive=tuple(numbers.view(count, patches)),
            holder=numbers.clone(),
            view=numbers // patches,
            size=torch.ones(count * patches, device=device),
            fate=torch.full((count * patches,), int(Fate.KEPT), dtype=torch.uint8, device=device),
        )

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens of each view. Known on the host: no synchronisation."""
        return tuple(a.shape[0] for a in self.alive)

    @property
    def width(self) -> int:
        """Rows of the longest view, at least one: attention over nothing is no number."""
        return max(1, *self.counts)

    def numbers(self, group: Group) -> Tensor:
        """`(n,)` int64: the tokens of some views, one view after the other."""
        return torch.cat([self.alive[v] for v in group])

    def rows(self, hidden: Tensor, group: Group, lead: int) -> Tensor:
        """`(n, ...)`: their rows of `hidden (view, row, ...)`, in the same order."""
        return torch.cat([hidden[v, lead : lead + self.alive[v].shape[0]] for v in group])

    def by_number(self, rows: Tensor, lead: int) -> Tensor:
        """`(view, row, ...)` to `(T, ...)`: every token's row at its number, NaN at numbers that are gone."""
        out = rows.new_full((self.view.shape[0], *rows.shape[2:]), torch.nan)
        every = tuple(range(len(self.alive)))
        out[self.numbers(every)] = self.rows(rows, every, lead)
        return out

    def bias(self, lead: int, dtype: torch.dtype) -> Tensor | None:
        """`(view, 1, 1, row)`, added to attention's logits: log sizes, and nothing to be seen of padding.

        A token of size s then counts as s equal keys (proportional attention: ToMe, Bolya et al., ICLR 2023). None when
        there is neither.
        """
        padded = any(n != self.width for n in self.counts)
        if not padded and not self.sized:
            return None
        shape, device = (len(self.alive), lead + self.width), self.size.device
        out = torch.full(shape, torch.finfo(dtype).min, dtype=dtype, device=device)
        for v, alive in enumerate(self.alive):
            out[v, :lead] = 0
            out[v, lead : lead + alive.shape[0]] = self.size[alive].log() if self.sized else 0
        return out[:, None, None]

    def survivors(self) -> Survivors:
        """What is left. A patch that was merged into a token which was dropped later is dropped."""
        fate = self.fate.clone()
        patch = fate[: self.holder.shape[0]]
        patch[(patch == int(Fate.MERGED)) & (self.holder < 0)] = int(Fate.DROPPED)
        return Survivors(self.alive, self.holder, self.view, self.size, fate, self.views, self.compact)


def shorten(
    state: ViewState,
    hidden: Tensor,
    groups: Sequence[Group],
    plans: Sequence[Plan | None],
    *,
    lead: int = 0,
) -> tuple[ViewState, Tensor]:
    """Carry out one plan per group of views (None: nothing) on `hidden (view, row, width)`.

    Views that no group names keep what they have. Returns the new state and `(view, new row, width)`.
    """
    rows = {v: hidden[v, lead : lead + n] for v, n in enumerate(state.counts)}
    for group, plan in zip(groups, plans, strict=True):
        if plan is not None:
            state, changed = _one_group(state, hidden, group, plan, lead)
            rows |= changed
    width = state.width
    out = hidden.new_zeros(hidden.shape[0], lead + width, *hidden.shape[2:])
    out[:, :lead] = hidden[:, :lead]
    for v, own in rows.items():
        out[v, lead : lead + own.shape[0]] = own
    return state, out


def _one_group(
    state: ViewState, hidden: Tensor, group: Group, plan: Plan, lead: int
) -> tuple[ViewState, dict[int, Tensor]]:
    """The state after one plan, and the new rows of the group's views."""
    device = state.holder.device
    before, rows = state.numbers(group), state.rows(hidden, group, lead)
    kept, added = plan.kept.to(device), plan.appended
    if added and len(group) > 1:
        raise ProbeError("a token can be added to one view only, but this probe decides over whole pictures: `group`")
    if added and plan.values is None:
        raise ProbeError(f"a plan adds {added} tokens but does not say what they are (`values`)")
    fresh = state.view.shape[0] + torch.arange(added, device=device)
    target = torch.cat([before[kept], fresh])
    values = rows[kept] if plan.values is None else plan.values.to(hidden.dtype)

    total = state.view.shape[0] + added
    view = torch.cat([state.view, torch.full((added,), group[0], device=device)])
    size = torch.cat([state.size, torch.ones(added, device=device)])
    fate = torch.cat([state.fate, torch.zeros(added, dtype=torch.uint8, device=device)])
    goes = torch.full((total + 1,), -1, device=device)  # number -> number; the spare last place is for "gone"
    goes[:total] = torch.arange(total, device=device)
    if plan.into is None:
        goes[before] = -1
        goes[target] = target
        fate[before] = int(plan.fate)
    else:
        into = plan.into.to(device)
        goes[before] = torch.where(into >= 0, target[into.clamp(min=0)] if len(target) else into, -1)
        fate[before] = torch.where(into >= 0, int(plan.fate), int(Fate.DROPPED)).to(torch.uint8)
    fate[target] = int(Fate.KEPT)
    if plan.size is not None:
        size[target] = plan.size.to(device, size.dtype)
    holder = goes[state.holder.where(state.holder >= 0, total)]

    alive = list(state.alive)
    out: dict[int, Tensor] = {}
    for v in group:
        here = slice(None) if len(group) == 1 else view[target] == v
        alive[v], out[v] = target[here], values[here]
    new = replace(
        state,
        alive=tuple(alive),
        holder=holder,
        view=view,
        size=size,
        fate=fate,
        sized=state.sized or plan.size is not None,
        pristine=False,
    )
    return new, out
