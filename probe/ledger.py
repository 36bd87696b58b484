"""Where every visual token went: exactly one fate for every original visual token at every (step, layer)."""

from __future__ import annotations

from collections.abc import Sequence

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
        self._counts: list[list[tuple[int, ...]]] = []

    def begin(self, alive: tuple[int, ...]) -> None:
        """A new step begins with `alive[b]` visual tokens."""
        self._steps.append([self._lasting] * self.layers)
        self._counts.append([alive] * self.layers)

    def note(self, before: Layout, plans: Sequence[Plan | None], first_layer: int, *, lasting: bool) -> None:
        """An edit on `before`, in force from `first_layer` on; `lasting` carries it to the following steps."""
        fates = self._steps[-1][first_layer] if first_layer < self.layers else self._steps[-1][-1]
        now = self._fates_after(fates, before, plans)
        counts = tuple(
            n if plan is None else plan.kept.shape[0] for n, plan in zip(before.n_visual, plans, strict=True)
        )
        for layer in range(first_layer, self.layers):
            self._steps[-1][layer] = now
            self._counts[-1][layer] = counts
        if lasting:
            self._lasting = self._fates_after(self._lasting, before, plans)

    @staticmethod
    def _fates_after(fates: Tensor, before: Layout, plans: Sequence[Plan | None]) -> Tensor:
        now = fates.clone()
        for b, plan in enumerate(plans):
            if plan is not None:
                alive = before.visual[b, before.visual_rows[b]]
                now[b].scatter_(0, alive, int(plan.fate))
                now[b].scatter_(0, alive[plan.kept], int(Fate.KEPT))
        return now

    def table(self, sample: int) -> tuple[Tensor, Tensor]:
        """`(step, layer, visual)` uint8 of `Fate` on the host, and `(step, layer)` int32 alive counts."""
        n = self.n_visual[sample]
        if not self._steps:
            return torch.zeros(0, self.layers, n, dtype=torch.uint8), torch.zeros(0, self.layers, dtype=torch.int32)
        fates = torch.stack([torch.stack([layer[sample, :n] for layer in step]) for step in self._steps])
        counts = torch.tensor([[c[sample] for c in step] for step in self._counts], dtype=torch.int32)
        return fates.cpu(), counts
