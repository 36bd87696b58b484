"""Caches of the prompt and of finished blocks: which rows are computed once, which at every step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from probe.decoding.policy import Ask, Caching, State, Work
from probe.decoding.rule import Rule
from probe.errors import ProbeError
from probe.registry import cachings
from probe.site import Phase


@cachings.register(name="none")
@dataclass(frozen=True, kw_only=True)
class NoCache(Caching):
    """Every row is computed in every pass. Exact."""


@cachings.register(name="prefix")
@dataclass(frozen=True, kw_only=True)
class PrefixLM(Caching):
    """LaViDa's prefix-LM: the prompt is computed once and sees only itself (arXiv 2505.16839).

    Exact for that attention pattern, which is not the one without a cache: there the prompt sees the answer. Where
    logits are shifted, the prompt's last row predicts the first slot, which is committed by the prefill.
    """

    stores = True
    renews = False

    def prefill(self, state: State, shift: int) -> Ask | None:
        """The prompt alone; it commits the first slot where its last row predicts it."""
        first = state.first
        columns = np.array([first] if shift and state.masked[:, first].any() else [], np.int64)
        return Ask(
            columns=columns,
            eligible=state.masked[:, columns],
            counts=[len(columns)] * state.batch,
            active=[True] * state.batch,
            step=0,
            window=(first, state.slots),
            phase=Phase.PREFILL,
        )

    def plan(self, state: State, ask: Ask) -> Work:
        """The prompt in the prefill, the answer afterwards."""
        if ask.phase is Phase.PREFILL:
            nothing = np.zeros(state.slots, bool)
            return Work("all", nothing, suffix=False, cached=True, refresh=True, phase=Phase.PREFILL)
        return Work("none", cached=True)

    def refreshed(self, state: State, ask: Ask) -> Work | None:
        """The prompt is never computed again."""
        return None


@cachings.register(name="crop")
@dataclass(frozen=True, kw_only=True)
class Crop(Caching):
    """Dimple's prefilling: the first pass computes everything, later ones the last prompt row and the answer.

    Approximate: the prompt's keys and values were computed while the answer was all masks, and stay so (Yu et al.,
    arXiv 2505.16990). The last prompt row is computed again because it predicts the first slot.
    """

    exact = False
    stores = True

    def plan(self, state: State, ask: Ask) -> Work:
        """Everything once, then the end of the sequence."""
        if state.passes == 0:
            return Work("all", cached=True, refresh=True, phase=Phase.PREFILL)
        return Work("last", cached=True)

    def refreshed(self, state: State, ask: Ask) -> Work | None:
        """Everything once more, as the first pass did."""
        return Work("all", cached=True, refresh=True, phase=Phase.REFRESH)


@cachings.register(name="kv")
@dataclass(frozen=True, kw_only=True)
class KeyValue(Caching):
    """The cache of autoregressive models: every row is computed once, when its token is known. Exact if causal."""

    stores = True
    needs_causal = "computes every row once, before what follows it is known"

    def plan(self, state: State, ask: Ask) -> Work:
        """The prompt first, then the slots that were written since."""
        done = state.memory.get("stored")
        present = np.ones(state.slots, bool) if ask.absent is None else ~ask.absent
        if done is None or len(done) != state.slots:
            state.memory["stored"] = present
            return Work("all", cached=True, refresh=True, phase=Phase.PREFILL)
        state.memory["stored"] = present | done
        return Work("none", present & ~done, cached=True)

    def refreshed(self, state: State, ask: Ask) -> Work | None:
        """Everything again."""
        present = np.ones(state.slots, bool) if ask.absent is None else ~ask.absent
        state.memory["stored"] = present
        return Work("all", cached=True, refresh=True, phase=Phase.REFRESH)


@cachings.register(name="blocks")
@dataclass(frozen=True, kw_only=True)
class Blocks(Caching):
    """Prompt and finished blocks are computed once, when the block behind them begins; then the open block alone.

    For models whose finished rows do not see the open block (DiffusionGemma's prefix is causal). There it is exact.
    """

    def check(self, rule: Rule, shift: int) -> None:
        """Only decoders that go block by block."""
        if not rule.unmasking.by_blocks:
            raise ProbeError("cache `blocks` is for decoders that finish one block before the next begins (`renoise`)")

    def plan(self, state: State, ask: Ask) -> Work:
        """The open block; with it, in its first pass, what was finished last."""
        low, high = ask.window
        at = np.arange(state.slots)
        if ask.step_in_block:
            return Work("none", (at >= low) & (at < high), suffix=False, cached=True)
        if ask.block == 0:
            return Work("all", at < high, suffix=False, cached=True, refresh=True, phase=Phase.PREFILL)
        return Work("none", (at >= low - state.rule.block_length) & (at < high), suffix=False, cached=True)

    def refreshed(self, state: State, ask: Ask) -> Work | None:
        """Everything again."""
        return Work(
            "all", np.arange(state.slots) < ask.window[1], suffix=False, cached=True, refresh=True, phase=Phase.REFRESH
        )
