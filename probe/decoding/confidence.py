"""LLaDA's decoder: blocks from left to right, a fixed schedule, the most confident candidates first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from probe.decoding import schedule, unmask
from probe.decoding.policy import Ask, Decision, State, Unmasking
from probe.decoding.rule import Rule
from probe.errors import ProbeError
from probe.registry import unmaskings


@unmaskings.register(name="confidence")
@dataclass(frozen=True, kw_only=True)
class Confidence(Unmasking):
    """LLaDA and LLaDA-V: blocks left to right, a fixed number of tokens per step, the most confident first.

    Within a block of `block_length` slots, `steps / blocks` passes each commit the candidates of highest softmax
    probability (float64, noise-free), or random ones (`remasking: random`). Masks left behind in earlier blocks stay
    eligible; after a stop string only slots before it are (Nie et al., arXiv 2502.09992; You et al., arXiv 2505.16933).
    """

    decodes_prompt = True

    def check(self, rule: Rule) -> None:
        """Blocks must divide the answer, and steps the blocks."""
        check_blocks(rule)

    def passes(self, state: State) -> Iterator[Ask]:
        """Every step of every block in which a sample still has masks."""
        rule = state.rule
        per_block = rule.steps // rule.n_blocks
        for block in range(rule.n_blocks):
            low, high = block * rule.block_length, (block + 1) * rule.block_length
            in_block = (state.numbers >= low) & (state.numbers < high)
            over = [s is not None and s <= low for s in state.stop_at]
            if all(over):
                return
            counts = [schedule.linear(int((masked & in_block).sum()), per_block) for masked in state.masked]
            for i in range(per_block):
                active = [not over[b] and still_decoding(state, b, in_block) for b in range(state.batch)]
                if not any(active):
                    break
                limit = np.array([high if s is None else s for s in state.stop_at])
                eligible = state.masked & (state.numbers[None] < limit[:, None]) & np.array(active)[:, None]
                yield state.ask(
                    eligible,
                    [counts[b][i] if active[b] else 0 for b in range(state.batch)],
                    active=active,
                    step=block * per_block + i,
                    window=(low + state.first, high + state.first),
                    block=block,
                    step_in_block=i,
                )

    def decide(self, state: State, ask: Ask, logits: Tensor) -> Decision:
        """The `counts[b]` candidates of highest score."""
        rule, device = state.rule, logits.device
        uniform = None
        if rule.temperature > 0:
            assert state.places is not None
            uniform = torch.stack(
                [
                    d.uniform_rows(n, at, logits.shape[-1])
                    for d, n, at in zip(state.draw, state.alive, state.places, strict=True)
                ]
            ).to(device)
        candidate = unmask.propose(logits, rule.temperature, uniform)
        sure = unmask.confidence(logits, candidate)
        score = sure
        if rule.remasking == "random":
            assert state.places is not None
            where = state.places.cpu()
            score = torch.stack([d.uniform(n)[at] for d, n, at in zip(state.draw, state.alive, where, strict=True)]).to(
                device
            )
        eligible = torch.from_numpy(ask.eligible).to(device)
        return Decision(candidate, sure, score, unmask.select(score, eligible, ask.counts))


def check_blocks(rule: Rule) -> None:
    """Blocks must divide the answer, and steps the blocks; raises `ProbeError` with a number that would do."""
    if rule.gen_length % rule.block_length:
        raise ProbeError(
            f"gen_length {rule.gen_length} is no multiple of block_length {rule.block_length}; "
            f"use e.g. block_length {rule.gen_length} (one block)"
        )
    if rule.steps % rule.n_blocks:
        raise ProbeError(
            f"steps {rule.steps} is no multiple of the {rule.n_blocks} blocks "
            f"(gen_length {rule.gen_length} / block_length {rule.block_length}); "
            f"use e.g. steps {max(1, rule.steps // rule.n_blocks) * rule.n_blocks}"
        )


def still_decoding(state: State, sample: int, in_block: np.ndarray) -> bool:
    """Whether a sample needs another step in this block: masks are left in it, and before its stop if it has one."""
    masked, stop_at = state.masked[sample], state.stop_at[sample]
    if stop_at is not None and not (masked & (state.numbers >= 0) & (state.numbers < stop_at)).any():
        return False
    return bool((masked & in_block).any())
