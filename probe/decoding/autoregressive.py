"""One token after the other: the baseline that the diffusion decoders are compared with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from probe.decoding import unmask
from probe.decoding.policy import Ask, Decision, State, Unmasking
from probe.decoding.rule import Rule
from probe.registry import unmaskings


@unmaskings.register(name="autoregressive")
@dataclass(frozen=True, kw_only=True)
class Autoregressive(Unmasking):
    """Next-token decoding: each step commits the leftmost open slot; slots behind it are not in the sequence.

    Greedy at temperature 0, else categorical over the tempered softmax. A sample ends at its stop string.
    """

    needs_shift = "reads the next token off the last row"

    def nominal_steps(self, rule: Rule) -> int:
        """One per slot."""
        return rule.gen_length

    def passes(self, state: State) -> Iterator[Ask]:
        """One slot per pass."""
        for step, column in enumerate(range(state.first, state.slots)):
            active = [s is None for s in state.stop_at]
            if not any(active):
                return
            eligible = np.zeros_like(state.masked)
            eligible[:, column] = state.masked[:, column] & np.array(active)
            if not eligible.any():  # a given token stands here
                continue
            yield state.ask(
                eligible,
                [int(e) for e in eligible[:, column]],
                active=active,
                step=step,
                window=(column, column + 1),
                absent=np.arange(state.slots) >= column,
            )

    def decide(self, state: State, ask: Ask, logits: Tensor) -> Decision:
        """The best or a drawn token of each sample."""
        temperature = state.rule.temperature
        candidate = logits.argmax(-1)
        if temperature > 0:
            p = (logits.double() / temperature).softmax(-1)
            drawn = [d.categorical(row) for d, row in zip(state.draw, p, strict=True)]
            candidate = torch.stack(drawn).to(logits.device)
        sure = unmask.confidence(logits, candidate)
        return Decision(candidate, sure, sure, torch.from_numpy(ask.eligible).to(logits.device))
