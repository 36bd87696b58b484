"""Which rows a pass computes, and which it takes from stored keys and values.

Columns of the state number slots as they stand; an ask's window is the block being decoded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from probe.decoding import sparse_dllm
from probe.decoding.policy import Ask, Caching, State, Work
from probe.decoding.rule import Rule
from probe.errors import ProbeError
from probe.registry import cachings
from probe.site import Phase


def _from(state: State, column: int) -> tuple[Literal["all", "none", "last"], np.ndarray]:
    """Prompt rows and slots `(slots,)` of a window that begins at a column, which may be one before the first slot."""
    slots = np.arange(state.slots) >= max(column, state.first)
    return ("last" if column < state.first else "none"), slots


@cachings.register(name="fast_prefix")
@dataclass(frozen=True, kw_only=True)
class FastPrefix(Caching):
    """Fast-dLLM's prefix cache (Wu et al., arXiv 2505.22618): what stands before the block is stored.

    Refreshed by a full pass at the start of every block, and every `refresh` passes within it (LLaDA-V's hook: 32).
    Approximate within a block: stored rows do not see what was committed since. Where row p predicts slot p + 1,
    the row before the block is computed too (`boundary: row`), or the block's first slot is committed by the refresh
    pass whatever its score (`boundary: commit`, Fast-dLLM's Dream).
    """

    exact = False
    stores = True
    refresh: int | None = None
    boundary: Literal["row", "commit"] = "row"

    def check(self, rule: Rule, shift: int) -> None:
        """A refresh interval is at least 1."""
        if self.refresh is not None and self.refresh < 1:
            raise ProbeError(f"a cache refreshed every {self.refresh} passes: it takes at least 1")

    def due(self, ask: Ask) -> bool:
        """Whether this pass recomputes everything."""
        return ask.step_in_block == 0 or (self.refresh is not None and ask.step_in_block % self.refresh == 0)

    def plan(self, state: State, ask: Ask) -> Work:
        """Everything, or the rows from the block on."""
        if self.due(ask):
            return Work(cached=True, refresh=True, phase=Phase.REFRESH)
        prompt, slots = _from(state, ask.window[0] - self._before(state))
        return Work(prompt=prompt, slots=self._within(state, ask, slots), suffix=self._suffix(), cached=True)

    def refreshed(self, state: State, ask: Ask) -> Work | None:
        """Everything, and stored."""
        return Work(cached=True, refresh=True, phase=Phase.REFRESH)

    def _before(self, state: State) -> int:
        return state.shift if self.boundary == "row" else 0

    def _within(self, state: State, ask: Ask, slots: np.ndarray) -> np.ndarray:
        return slots

    def _suffix(self) -> bool:
        return True


@cachings.register(name="fast_dual")
@dataclass(frozen=True, kw_only=True)
class FastDual(FastPrefix):
    """Fast-dLLM's dual cache: only the block is computed, what stands before and behind it is stored."""

    def _within(self, state: State, ask: Ask, slots: np.ndarray) -> np.ndarray:
        return slots & (np.arange(state.slots) < ask.window[1])

    def _suffix(self) -> bool:
        return False


@cachings.register(name="dkv")
@dataclass(frozen=True, kw_only=True)
class Dkv(Caching):
    """dKV-Cache-Decode (Ma et al., arXiv 2505.15781): a slot is stored one pass after it was filled.

    Every `refresh` passes of a block, and in its first two, everything is computed. Approximate.
    """

    exact = False
    stores = True
    refresh: int = 8

    def check(self, rule: Rule, shift: int) -> None:
        """A refresh interval is at least 1."""
        if self.refresh < 1:
            raise ProbeError(f"a cache refreshed every {self.refresh} passes: it takes at least 1")

    def plan(self, state: State, ask: Ask) -> Work:
        """Everything, or all but the slots that were filled in the input of the pass before."""
        before = state.memory.get("dkv_filled")
        state.memory["dkv_filled"] = ~state.masked
        if before is None or ask.step_in_block < 2 or ask.step_in_block % self.refresh == 0:
            return Work(cached=True, refresh=True, phase=Phase.REFRESH)
        return Work(prompt="none", slots=~before, suffix=False, cached=True)

    def refreshed(self, state: State, ask: Ask) -> Work | None:
        """Everything, and stored."""
        return Work(cached=True, refresh=True, phase=Phase.REFRESH)


@cachings.register(name="sparse_dllm")
@dataclass(frozen=True, kw_only=True)
class SparseDllm(Caching):
    """Sparse-dLLM (Song et al., arXiv 2508.02558): of what stands outside the block only a share of columns is kept.

    Two full passes at the start of every block; in the second each layer keeps the most important of the columns that
    its attention reads outside the block (`probe.decoding.sparse_dllm`), a share `keep` of them, then only the block
    is computed. Evicted columns come back with the next block. Where row p predicts slot p + 1, the row before the
    block counts as part of it. Approximate.
    """

    exact = False
    stores = True
    keep: float = 0.5
    kernel: int | None = 3

    def check(self, rule: Rule, shift: int) -> None:
        """A share, and an odd kernel."""
        if not 0 <= self.keep <= 1:
            raise ProbeError(f"a cache that keeps a share of {self.keep} of its columns: it takes 0 to 1")
        if self.kernel is not None and (self.kernel < 1 or self.kernel % 2 == 0):
            raise ProbeError(f"pooling kernel {self.kernel}: it must be odd to stay centred (or null)")

    def plan(self, state: State, ask: Ask) -> Work:
        """Everything twice, then the block."""
        if ask.step_in_block < 2:
            return self._everything(evict=ask.step_in_block == 1)
        prompt, slots = _from(state, ask.window[0] - state.shift)
        slots = slots & (np.arange(state.slots) < ask.window[1])
        return Work(prompt=prompt, slots=slots, suffix=False, cached=True)

    def refreshed(self, state: State, ask: Ask) -> Work | None:
        """Everything, and evicted anew."""
        return self._everything(evict=ask.step_in_block > 0)

    def _everything(self, *, evict: bool) -> Work:
        return Work(cached=True, refresh=True, phase=Phase.REFRESH, evict=self.chosen if evict else None)

    def chosen(self, query: Tensor, key: Tensor) -> Tensor:
        """Which columns stay: `(1, kept)` of `key (1, key head, column, size)`."""
        return sparse_dllm.keep(sparse_dllm.importance(query, key, self.kernel), self.keep)
