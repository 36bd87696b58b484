"""The skeleton of decoders that go block by block: a subclass says only what differs.

What may differ is the budget of a block, which slots' logits are wanted, the score, and the choice among scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from probe.decoding import scores, select
from probe.decoding.policy import Ask, Decision, State, Unmasking
from probe.decoding.propose import gumbel
from probe.decoding.rule import Rule
from probe.errors import ProbeError
from probe.upload import upload


@dataclass(frozen=True, kw_only=True)
class Blockwise(Unmasking):
    """Blocks of `block_length` slots from left to right; the most confident candidates of each pass.

    Masks left behind in earlier blocks stay eligible, as in LLaDA and its descendants; a cache that does not compute
    their rows cuts them off. After a stop string only slots before it are eligible.
    """

    runs_dry: ClassVar[bool] = False
    """Whether the passes of a block go on once it holds no mask."""
    looks_ahead: ClassVar[bool] = False
    """Whether masks behind the block are eligible, too."""
    looks_back: ClassVar[bool] = True
    """Whether masks before the block are."""

    def budget(self, masked: int, rule: Rule) -> list[int] | None:
        """Tokens per pass of a block with this many masks; None: as many passes as it takes."""
        return None

    def wanted(self, state: State, eligible: np.ndarray, window: tuple[int, int]) -> np.ndarray:
        """Columns whose logits a pass over a block needs: `(c,)`, those of `eligible (batch, slots)` at least."""
        return np.flatnonzero(eligible.any(0))

    def score(self, state: State, ask: Ask, logits: Tensor, candidate: Tensor, confidence: Tensor) -> Tensor:
        """What ranks the candidates, `(batch, c)`."""
        return confidence

    def choose(self, state: State, ask: Ask, score: Tensor, eligible: Tensor) -> Tensor:
        """Which of the eligible candidates are committed, `(batch, c)` bool."""
        return select.top_k(score, eligible, ask.counts)

    def step(self, rule: Rule, block: int, step_in_block: int, ran: int) -> int:
        """The number of a step; `ran` steps were made before it."""
        return ran

    def passes(self, state: State) -> Iterator[Ask]:
        """The passes of every block."""
        rule, ran = state.rule, 0
        for block in range(rule.n_blocks):
            low, high = window(state, block)
            over = [s is not None and s <= block * rule.block_length for s in state.stop_at]
            if all(over):
                return
            budgets = [self.budget(int(masked[low:high].sum()), rule) for masked in state.masked]
            for i in range(max(len(b) for b in budgets if b is not None) if None not in budgets else 10**9):
                active = [not over[b] and self._goes_on(state, b, low, high) for b in range(state.batch)]
                if not any(active):
                    break
                eligible = state.masked & np.array(active)[:, None]
                if not self.looks_ahead:
                    eligible[:, high:] = False
                if not self.looks_back:
                    eligible[:, :low] = False
                for b, stop in enumerate(state.stop_at):
                    if stop is not None:
                        eligible[b] &= state.numbers < stop
                yield state.ask(
                    eligible,
                    [b[i] if b is not None and i < len(b) and on else 0 for b, on in zip(budgets, active, strict=True)],
                    active=active,
                    columns=self.wanted(state, eligible, (low, high)),
                    step=self.step(rule, block, i, ran),
                    window=(low, high),
                    block=block,
                    step_in_block=i,
                )
                ran += 1
                state.memory["stuck"] = nothing_new(state)

    def _goes_on(self, state: State, sample: int, low: int, high: int) -> bool:
        """Whether a sample needs another pass in this block."""
        masked, stop = state.masked[sample], state.stop_at[sample]
        if stop is not None and not (masked & (state.numbers >= 0) & (state.numbers < stop)).any():
            return False
        return self.runs_dry or bool(masked[low:high].any())

    def decide(self, state: State, ask: Ask, logits: Tensor) -> Decision:
        """Candidate, confidence in float64 from the noise-free logits, score and choice."""
        if state.memory.get("stuck") and None is self.budget(1, state.rule):
            # the mask token won everywhere: without a budget the same pass would repeat for ever
            logits = logits.clone()
            logits[..., state.rule.mask_id] = -torch.inf
        candidate = noisy_argmax(state, logits)
        confidence = scores.confidence(logits.double().softmax(-1), candidate)
        score = self.score(state, ask, logits, candidate, confidence)
        eligible = upload(ask.eligible, logits.device)
        return Decision(candidate, confidence, score, self.choose(state, ask, score, eligible))


def nothing_new(state: State) -> bool:
    """Whether the last pass wrote nothing."""
    return state.written is None or not state.written.any()


def window(state: State, block: int) -> tuple[int, int]:
    """The columns [low, high) of a block; the last may be shorter."""
    low = state.first + block * state.rule.block_length
    return low, min(low + state.rule.block_length, state.slots)


def noisy_argmax(state: State, logits: Tensor) -> Tensor:
    """The candidates `(batch, c)`: arg-max, or Gumbel-max with noise drawn over the whole sequence."""
    if state.rule.temperature == 0:
        return logits.argmax(-1)
    assert state.places is not None
    noise = [
        d.uniform_rows(n, at, logits.shape[-1]) for d, n, at in zip(state.draw, state.alive, state.places, strict=True)
    ]
    return gumbel(logits, state.rule.temperature, torch.stack(noise).to(logits.device)).argmax(-1)


def random_score(state: State, like: Tensor) -> Tensor:
    """Uniform numbers `(batch, c)`, drawn over the whole sequence of each sample."""
    assert state.places is not None
    drawn = [d.uniform(n)[at.cpu()] for d, n, at in zip(state.draw, state.alive, state.places, strict=True)]
    return torch.stack(drawn).to(like.device)


def check_blocks(rule: Rule) -> None:
    """Blocks must divide the answer; raises `ProbeError` with a number that would do."""
    if rule.gen_length % rule.block_length:
        raise ProbeError(
            f"gen_length {rule.gen_length} is no multiple of block_length {rule.block_length}; "
            f"use e.g. block_length {rule.gen_length} (one block)"
        )


def check_steps(rule: Rule) -> None:
    """Blocks must divide the answer, and steps the blocks."""
    check_blocks(rule)
    if rule.steps % rule.n_blocks:
        raise ProbeError(
            f"steps {rule.steps} is no multiple of the {rule.n_blocks} blocks "
            f"(gen_length {rule.gen_length} / block_length {rule.block_length}); "
            f"use e.g. steps {max(1, rule.steps // rule.n_blocks) * rule.n_blocks}"
        )
