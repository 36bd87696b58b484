"""What happens once the model has said that its answer ends."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from probe.decoding.policy import Ask, Change, Decision, Length, State
from probe.registry import lengths


@lengths.register(name="eos_fill")
@dataclass(frozen=True, kw_only=True)
class EosFill(Length):
    """Once a finished block holds the end-of-sequence token, all behind it becomes that token; decoding ends there.

    Later files of Fast-dLLM, DPad and dInfer do so.
    """

    def fill(self, state: State, ask: Ask, decision: Decision) -> dict[tuple[int, int], int]:
        """The slots behind the block, in samples whose answer has ended."""
        (low, high), eos = ask.window, state.rule.eos
        if eos is None:
            return {}
        ended = ~state.masked[:, low:high].any(1) & (state.tokens[:, low:high] == eos).any(1)
        return {(int(b), column): eos for b in np.flatnonzero(ended) for column in range(high, state.slots)}

    def after(self, state: State, ask: Ask, logits: Tensor, decision: Decision) -> Change | None:
        """The run is over once nothing is masked."""
        return None if state.masked.any() else Change(finish=True)
