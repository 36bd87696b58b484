"""DreamOn (DreamLM, 2025): a token that becomes two masks, and an end token that can vanish.

Needs a checkpoint that was trained to say the expand token (DreamOn-7B: 151667).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from probe.decoding.dream import Tempered
from probe.decoding.policy import Ask, Change, Decision, Length, State
from probe.decoding.rule import Rule
from probe.errors import ProbeError
from probe.registry import lengths, unmaskings


@lengths.register(name="dreamon")
@dataclass(frozen=True, kw_only=True)
class DreamOnLength(Length):
    """DreamOn: an expand token becomes two masks; an end token may be deleted, or spread to the masks on its right.

    `max_length` slots, and as many expansions, at most; `expand` is the token's id.
    """

    expand: int = 151667
    max_length: int = 64
    delete_eos: bool = False
    eos_to_right: bool = False

    def after(self, state: State, ask: Ask, logits: Tensor, decision: Decision) -> Change | None:
        """Two masks for every expand token; new end tokens go if so set."""
        grown: list[int] = state.memory["expanded"]
        delete: tuple[int, ...] = ()
        state.memory["grown"] = state.memory.get("grown", 0) + len(grown)
        if self.delete_eos and state.written is not None:
            delete = tuple(int(c) for c in self._ends(state) if state.written[0, c])
        return Change(insert=tuple((c, 1) for c in grown), delete=delete) if grown or delete else None

    def fill(self, state: State, ask: Ask, decision: Decision) -> dict[tuple[int, int], int]:
        """What was masked on the right of the first end token, if so set."""
        ends, eos = self._ends(state), state.rule.eos
        if not self.eos_to_right or not len(ends) or eos is None:
            return {}
        behind = [int(c) for c in ask.columns[ask.eligible[0]] if c > ends[0]]
        state.memory["expanded"] = [c for c in state.memory["expanded"] if c < ends[0]]
        return {(0, c): eos for c in behind}

    def _ends(self, state: State) -> np.ndarray:
        return np.flatnonzero(state.tokens[0] == (-1 if state.rule.eos is None else state.rule.eos))


@unmaskings.register(name="dreamon")
@dataclass(frozen=True, kw_only=True)
class DreamOn(Tempered):
    """DreamOn's decoder: `per_pass` tokens a pass, the surest first, until nothing is masked or the steps are used up.

    Goes with `length: dreamon`. The expand token cannot be said while the answer has its full length.
    """

    per_pass: int = 1

    def check(self, rule: Rule) -> None:
        """The length policy."""
        if not isinstance(rule.length, DreamOnLength):
            raise ProbeError("unmask: dreamon goes with length: dreamon")

    def passes(self, state: State) -> Iterator[Ask]:
        """One ask per step."""
        for step in range(state.rule.steps):
            if not state.masked.any():
                return
            state.memory["expanded"] = []
            yield state.ask(
                state.masked,
                [self.per_pass] * state.batch,
                step=step,
                step_in_block=step,
                window=(state.first, state.slots),
            )

    def decide(self, state: State, ask: Ask, logits: Tensor) -> Decision:
        """The surest; expand tokens are noted for the length policy instead of being written."""
        length = state.rule.length
        assert isinstance(length, DreamOnLength)
        logits = logits.clone()
        full = state.slots - state.first >= length.max_length
        if full or state.memory.get("grown", 0) >= length.max_length:
            logits[..., length.expand] -= 1e9
        usual = super().decide(state, ask, logits)
        grow = usual.commit & (usual.candidate == length.expand)
        state.memory["expanded"] = ask.columns[grow[0].cpu().numpy()].tolist()
        return Decision(usual.candidate, usual.confidence, usual.score, usual.commit & ~grow)
