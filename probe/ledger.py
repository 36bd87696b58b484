"""Where every visual token went: exactly one fate for every original visual token at every (step, layer)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from probe.site import Fate, Plan
from probe.surgery import Layout


class Ledger:
    """The fates of one batch. A token's fate at a layer is its state as a key of that layer's attention.

    Everything stays on the device until `table`; a step costs one small tensor per edit.
    """

    def __init__(
        self,
        n_visual: Sequence[int],
        layers: int,
        device: torch.device,
        before: Sequence[Tensor | None] = (),
    ) -> None:
        """`before[b] (n_visual[b],)` says what became of tokens before the language model; None: all are there."""
        self.n_visual = tuple(n_visual)
        self.layers = layers
        width = max(self.n_visual, default=0)
        fates = torch.zeros(len(self.n_visual), width, dtype=torch.uint8, device=device)
        for b, n in enumerate(self.n_visual):
            given = before[b] if before else None
            fates[b, :n] = int(Fate.KEPT) if given is None else given.to(fates)
        self._lasting = _State(fates, torch.zeros(len(self.n_visual), dtype=torch.int32, device=device))
        self._steps: list[list[_State]] = []
        self._columns: list[_State] | None = None
        self._gone: list[tuple[Layout, Sequence[Plan | None]]] = []
        self._passing: int | None = None

    def begin(self, *, cached: bool = False) -> None:
        """A pass begins: with what is left of the canvas, or a cached one with what the store's layers hold."""
        if not cached:
            self._columns = None
        self._steps.append([self._lasting] * self.layers if self._columns is None else list(self._columns))
        self._gone, self._passing = [], None

    def note(self, before: Layout, plans: Sequence[Plan | None], first_layer: int, *, lasting: bool) -> None:
        """An edit on `before`, in force from `first_layer` on; `lasting` carries it to the following steps."""
        self.note_layers(before, plans, range(first_layer, self.layers))
        if lasting:
            self._lasting = _after(self._lasting, before, plans, stays=first_layer == 0)
            self._gone.append((before, plans))

    def note_layers(self, before: Layout, plans: Sequence[Plan | None], layers: Iterable[int]) -> None:
        """An edit that is in force at these layers of this pass alone."""
        now, done = self._steps[-1], dict[int, _State]()
        for layer in layers:
            key = id(now[layer])
            if key not in done:
                done[key] = _after(now[layer], before, plans)
            now[layer] = done[key]

    def forget_appended(self, first_layer: int) -> None:
        """Tokens that are appended in this pass, from this layer on, are not stored."""
        self._passing = first_layer

    def keep_columns(self) -> None:
        """The pass stored its keys: what stands in each layer's columns from here on.

        A pass that computed every row leaves its layers as they were when they ran. One that read columns leaves them
        as they were before it, less what it removed for good. What is removed for good leaves every layer.
        """
        fates = self._steps[-1] if self._columns is None else self._columns
        for before, plans in self._gone:
            done: dict[int, _State] = {}
            for i, state in enumerate(fates := list(fates)):
                if id(state) not in done:
                    done[id(state)] = _after(state, before, plans, stays=False)
                fates[i] = done[id(state)]
        self._columns = list(fates)
        if self._passing is not None:
            for i in range(self._passing, self.layers):
                fates_then = self._columns[i]
                self._columns[i] = _State(fates_then.fates, torch.minimum(fates_then.appended, self._lasting.appended))

    def evict(self, layouts: Sequence[Layout | None]) -> None:
        """The cache itself left columns out, layer by layer: these are what the following cached passes read."""
        assert self._columns is not None
        for i, layout in enumerate(layouts):
            if layout is not None:
                self._columns[i] = _without_evicted(self._columns[i], layout)

    def table(self, sample: int) -> tuple[Tensor, Tensor]:
        """`(step, layer, visual)` uint8 of `Fate` on the host, and `(step, layer)` int32 alive counts."""
        n = self.n_visual[sample]
        if not self._steps:
            return torch.zeros(0, self.layers, n, dtype=torch.uint8), torch.zeros(0, self.layers, dtype=torch.int32)
        fates = torch.stack([torch.stack([layer.fates[sample, :n] for layer in step]) for step in self._steps]).cpu()
        extra = torch.stack([torch.stack([layer.appended[sample] for layer in step]) for step in self._steps]).cpu()
        return fates, (fates == int(Fate.KEPT)).sum(-1, dtype=torch.int32) + extra


@dataclass(frozen=True)
class _State:
    """One layer's tokens: `fates (batch, visual)` uint8, and how many alive ones have no original index `(batch,)`."""

    fates: Tensor
    appended: Tensor


def _after(state: _State, before: Layout, plans: Sequence[Plan | None], *, stays: bool = True) -> _State:
    """A layer's tokens after an edit; one that this layer lost before stays lost.

    Appended tokens live where the edit acts (`stays`), not in layers that only lose what it removed. What `before` had
    lost earlier is not kept either.
    """
    width = state.fates.shape[1]
    now = torch.cat([state.fates, state.fates.new_zeros(state.fates.shape[0], 1)], 1)  # spare: tokens without an index
    appended = state.appended.clone()
    for b, plan in enumerate(plans):
        if plan is None:
            continue
        ids = before.visual[b, before.visual_rows[b]]
        lost = torch.ones(width + 1, dtype=torch.bool, device=ids.device)
        lost.index_fill_(0, ids.where(ids >= 0, width), False)
        out_of_sight = Fate.DROPPED if plan.fate is Fate.MERGED else plan.fate
        now[b] = torch.where(lost & (now[b] == int(Fate.KEPT)), int(out_of_sight), now[b])
        fate = torch.full_like(ids, int(plan.fate), dtype=now.dtype)
        if plan.into is not None:
            fate[plan.into < 0] = int(Fate.DROPPED)
        fate[plan.kept] = int(Fate.KEPT)
        spot = ids.where(ids >= 0, width)
        was = now[b].gather(0, spot)
        now[b].scatter_(0, spot, torch.where(was == int(Fate.KEPT), fate, was))
        if stays:
            appended[b] = (ids[plan.kept] < 0).sum() + plan.appended
    return _State(now[:, :width], appended)


def _without_evicted(state: _State, layout: Layout) -> _State:
    """A layer's tokens where only those of `layout` are still among its columns."""
    width = state.fates.shape[1]
    fates, appended = state.fates.clone(), state.appended.clone()
    for b, rows in enumerate(layout.visual_rows):
        ids = layout.visual[b, rows]
        there = torch.zeros(width + 1, dtype=torch.bool, device=ids.device)
        there[ids.where(ids >= 0, width)] = True
        gone = (fates[b] == int(Fate.KEPT)) & ~there[:width]
        fates[b] = torch.where(gone, int(Fate.EVICTED), fates[b])
        appended[b] = (ids < 0).sum()
    return _State(fates, appended)
