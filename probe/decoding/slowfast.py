"""SlowFast sampling (Wei et al., arXiv 2506.10848): explore how far the model is sure, then fill that stretch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


def reach(sure: Sequence[int], start: int) -> int:
    """How many slots from `start` on to the farthest of the masked slots that are `sure`; 1 if there is none."""
    return max(sure) - start + 1 if len(sure) else 1


def settle(estimates: Sequence[int], stability: int, deviation: float) -> tuple[int | None, int]:
    """`(the settled length or None, the length if there is no more time)` of a cycle, from its estimates so far.

    Settled is the last once the standard deviation of the last `stability` estimates is below `deviation`.
    """
    recent = list(estimates)[-stability:]
    if len(recent) == stability and float(np.std(recent)) < deviation:
        return recent[-1], recent[-1]
    return None, int(np.mean(recent))


@unmaskings.register(name="slowfast")
@dataclass(frozen=True, kw_only=True)
class SlowFast(Unmasking):
    """SlowFast: cycles of `explore` slow passes that look for the end of the sure stretch, and fast ones that fill it.

    A pass commits all candidates of at least `tau` if there are two or more, else the best: slow ones in the rest of
    the block, fast ones in the cycle. From a cycle's second fast pass on, the slots behind it are left out of the
    sequence. Slow passes run in full number even when nothing is masked any more. One sample at a time.
    """

    explore: int = 6
    reach_confidence: float = 0.3
    stability: int = 2
    deviation: float = 1.0
    tau: float = 0.9

    def check(self, rule: Rule) -> None:
        """Blocks must divide the answer; exploring takes a pass."""
        check_blocks(rule)
        if self.explore < 1 or self.stability < 1:
            raise ProbeError(
                f"slowfast needs at least 1 pass to explore and 1 estimate, not {self.explore}, {self.stability}"
            )

    def passes(self, state: State) -> Iterator[Ask]:
        """Cycle by cycle."""
        step = 0
        for block in range(state.rule.n_blocks):
            low, high = window(state, block)
            start, i = low, 0
            while state.masked[:, low:high].any() and start < high:
                estimates: list[int] = []
                settled, end = None, high
                for _ in range(self.explore):
                    yield self._ask(state, step, i, block, (low, high), start, high)
                    step, i = step + 1, i + 1
                    if settled is None:
                        far = reach(state.memory["sure"], start)
                        estimates.append(min(start + far, high) - low)
                        settled, length = settle(estimates, self.stability, self.deviation)
                        end = low + length
                first = True
                while state.masked[:, start:end].any():
                    yield self._ask(state, step, i, block, (low, high), start, end, None if first else end)
                    step, i, first = step + 1, i + 1, False
                start = max(end, start + 1)

    def _ask(
        self,
        state: State,
        step: int,
        in_block: int,
        block: int,
        span: tuple[int, int],
        start: int,
        end: int,
        cut: int | None = None,
    ) -> Ask:
        eligible = state.masked.copy()
        eligible[:, :start] = False
        eligible[:, end:] = False
        absent = None if cut is None or cut >= state.slots else np.arange(state.slots) >= cut
        return state.ask(
            eligible,
            [1] * state.batch,
            step=step,
            block=block,
            step_in_block=in_block,
            window=span,
            absent=absent,
        )

    def decide(self, state: State, ask: Ask, logits: Tensor) -> Decision:
        """Fill, and remember which masked slots are sure enough to count as reached."""
        candidate = noisy_argmax(state, logits)
        score = scores.confidence(logits.double().softmax(-1), candidate)
        eligible = torch.from_numpy(ask.eligible).to(logits.device)
        state.memory["sure"] = ask.columns[((score >= self.reach_confidence) & eligible)[0].cpu().numpy()].tolist()
        return Decision(candidate, score, score, select.several_or_best(score, eligible, self.tau))
