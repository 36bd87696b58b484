"""Where every visual token went: exactly one fate for every original visual token at every (step, layer)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from probe.site import Fate, Plan
from probe.surgery import Layout


class Ledger:
    """The fates of one batch. A token's fate at a layer is its state as a key of that layer's attention.

    Everything stays on the device until `table`; a step costs one small tensor per edit.
    """

    def __init__(self, n_visual: Sequence[int], layers: int, device: torch.device) -> None:
        self.n_visual = tuple(n_visual)
        self.layers = layers
        width = max(self.n_visual, default=0)
        self._lasting = torch.zeros(len(self.n_visual), width, dtype=torch.uint8, device=device)
        for b, n in enumerate(self.n_visual):
            self._lasting[b, :n] = int(Fate.KEPT)
        self._steps: list[list[Tensor]] = []
        self._columns: list[Tensor] | None = None
        self._gone: list[tuple[Layout, Sequence[Plan | None]]] = []

    def begin(self, *, cached: bool = False) -> None:
        """A pass begins: with what is left of the canvas, or a cached one with what the store's layers hold."""
        if not cached:
            self._columns = None
        self._steps.append([self._lasting] * self.layers if self._columns is None else list(self._columns))
        self._gone = []

    def note(self, before: Layout, plans: Sequence[Plan | None], first_layer: int, *, lasting: bool) -> None:
        """An edit on `before`, in force from `first_layer` on; `lasting` carries it to the following steps."""
        now = self._steps[-1]
        now[first_layer:] = _once_each(now[first_layer:], partial(self._fates_after, before=before, plans=plans))
        if lasting:
            self._lasting = self._fates_after(self._lasting, before, plans)
            self._gone.append((before, plans))

    def keep_columns(self) -> None:
        """The pass stored its keys: what stands in each layer's columns from here on.

        A pass that computed every row leaves its layers as they were when they ran. One that read columns leaves them
        as they were before it, less what it removed for good. What is removed for good leaves every layer.
        """
        fates = self._steps[-1] if self._columns is None else self._columns
        for before, plans in self._gone:
            fates = _once_each(fates, partial(self._fates_after, before=before, plans=plans))
        self._columns = list(fates)

    @staticmethod
    def _fates_after(fates: Tensor, before: Layout, plans: Sequence[Plan | None]) -> Tensor:
        """A layer's fates after an edit; a token that this layer lost before stays lost."""
        now = fates.clone()
        for b, plan in enumerate(plans):
            if plan is not None:
                alive = before.visual[b, before.visual_rows[b]]
                fate = torch.full_like(alive, int(plan.fate), dtype=now.dtype)
                fate[plan.kept] = int(Fate.KEPT)
                was = now[b].gather(0, alive)
                now[b].scatter_(0, alive, torch.where(was == int(Fate.KEPT), fate, was))
        return now

    def table(self, sample: int) -> tuple[Tensor, Tensor]:
        """`(step, layer, visual)` uint8 of `Fate` on the host, and `(step, layer)` int32 alive counts."""
        n = self.n_visual[sample]
        if not self._steps:
            return torch.zeros(0, self.layers, n, dtype=torch.uint8), torch.zeros(0, self.layers, dtype=torch.int32)
        fates = torch.stack([torch.stack([layer[sample, :n] for layer in step]) for step in self._steps]).cpu()
        return fates, (fates == int(Fate.KEPT)).sum(-1, dtype=torch.int32)


def _once_each(tensors: list[Tensor], change: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """`change` applied to each different tensor once; layers mostly share theirs."""
    done: dict[int, Tensor] = {}
    for x in tensors:
        if id(x) not in done:
            done[id(x)] = change(x)
    return [done[id(x)] for x in tensors]
