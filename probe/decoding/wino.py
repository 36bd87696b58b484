"""WINO (Hong et al., arXiv 2507.18578): accept many tokens, and take back those that a second look does not confirm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from probe.decoding import scores, select
from probe.decoding.blocks import check_blocks, noisy_argmax, window
from probe.decoding.policy import Ask, Decision, State, Unmasking
from probe.decoding.rule import Rule
from probe.errors import ProbeError
from probe.registry import unmaskings


def most_accepted(masked: int) -> int:
    """How many tokens a pass may accept: seven tenths of the block's masks, at least 5 and at most 20."""
    return min(max(int(masked * 0.7), 5), 20)


@unmaskings.register(name="wino")
@dataclass(frozen=True, kw_only=True)
class Wino(Unmasking):
    """WINO: accept candidates surer than `accept` (the best if none), mask shown tokens less sure than `confirm` again.

    A shown token is judged by a shadow of its slot: a mask at the same position that sees everything but the slot
    itself and that no real row sees. Tokens are taken back only in passes that accept more than one, and always fewer
    than were accepted in the pass before. One sample at a time.
    """

    whole = "looks at a shadow of the block, which sees every row as it is in this pass"
    accept: float = 0.6
    confirm: float = 0.9

    def check(self, rule: Rule) -> None:
        """Blocks must divide the answer."""
        check_blocks(rule)

    def passes(self, state: State) -> Iterator[Ask]:
        """Until each block is done."""
        if state.batch != 1:
            raise ProbeError(f"`wino` decodes one sample at a time, not a batch of {state.batch}")
        step = 0
        for block in range(state.rule.n_blocks):
            low, high = window(state, block)
            state.memory["accepted"] = None
            i = 0
            while state.masked[:, low:high].any():
                eligible = state.masked.copy()
                eligible[:, :low] = False
                eligible[:, high:] = False
                yield state.ask(
                    eligible,
                    [0] * state.batch,
                    columns=np.arange(low, high),
                    step=step,
                    block=block,
                    step_in_block=i,
                    window=(low, high),
                    shadow=True,
                )
                step, i = step + 1, i + 1

    def decide(self, state: State, ask: Ask, logits: Tensor) -> Decision:
        """What is accepted, and what is taken back; the shadow's logits follow those of the block."""
        width = len(ask.columns)
        real, shadow = logits[:, :width], logits[:, width:]
        eligible = torch.from_numpy(ask.eligible).to(logits.device)
        candidate = noisy_argmax(state, real)
        sure = scores.confidence(real.double().softmax(-1), candidate)
        best = select.top_k(sure, eligible, [most_accepted(int(n)) for n in ask.eligible.sum(1)])
        accepted = select.above(sure, eligible, self.accept) & best
        accepted = torch.where(accepted.any(1, keepdim=True), accepted, select.top_k(sure, eligible, [1] * len(sure)))

        shown = torch.from_numpy(state.tokens[:, ask.columns]).to(logits.device)
        confirmed = scores.confidence(shadow.double().softmax(-1), shown)
        doubtful = ~eligible & (confirmed < self.confirm)
        number, before = int(accepted.sum()), state.memory["accepted"]
        most = state.slots if before is None else before - 1
        back = select.top_k(-confirmed, doubtful, [most if number > 1 else 0] * len(sure))
        state.memory["accepted"] = number
        return Decision(candidate, sure, sure, accepted, remask=back)
