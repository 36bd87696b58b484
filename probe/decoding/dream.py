"""Dream's decoder (Ye et al., arXiv 2508.15487) and what LaViDa-Dream and Fast-dLLM made of it.

Where row p predicts slot p + 1 is the backbone's and the loop's to know, not this file's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from probe.decoding import schedule, scores, select
from probe.decoding.blocks import check_steps, window
from probe.decoding.policy import Ask, Decision, State, Unmasking
from probe.decoding.propose import truncate
from probe.decoding.rule import Rule
from probe.errors import ProbeError
from probe.registry import unmaskings


@dataclass(frozen=True, kw_only=True)
class Tempered(Unmasking):
    """What decoders of Dream's kind share: temperature, nucleus and top-k before the score."""

    algorithm: scores.Algorithm = "entropy"
    top_p: float | None = None
    top_k: int | None = None
    eps: float = 1e-3

    def decide(self, state: State, ask: Ask, logits: Tensor) -> Decision:
        """Candidate and score of every column, then the choice."""
        candidate, score = self.score(state, ask, logits)
        confidence = scores.confidence(logits.double().softmax(-1), candidate)
        eligible = torch.from_numpy(ask.eligible).to(logits.device)
        return Decision(candidate, confidence, score, self.choose(state, ask, score, eligible))

    def score(self, state: State, ask: Ask, logits: Tensor, original: bool = False) -> tuple[Tensor, Tensor]:
        """`(candidate, score)`, both `(batch, c)`; drawn where the temperature is not 0."""
        temperature, drawn = state.rule.temperature, None
        if temperature > 0:
            kept = truncate(logits, temperature=temperature, top_p=self.top_p, top_k=self.top_k).softmax(-1)
            drawn = torch.stack([d.categorical(p) for d, p in zip(state.draw, kept, strict=True)]).to(logits.device)
        score, candidate = scores.dream(
            logits,
            self.algorithm,
            drawn,
            temperature=temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            original=original,
        )
        return candidate, score

    def choose(self, state: State, ask: Ask, score: Tensor, eligible: Tensor) -> Tensor:
        """The best, as many as the step asks for."""
        return select.top_k(score, eligible, ask.counts)


@unmaskings.register(name="dream")
@dataclass(frozen=True, kw_only=True)
class Dream(Tempered):
    """Dream: the whole answer at once, as many tokens per step as a time grid says, the surest first.

    `alg_temp` draws the order from `softmax(score / alg_temp)` instead; `algorithm: origin` reveals every slot with the
    grid's chance. The score is read from the truncated, tempered distribution. LaViDa-Dream adds `step_ratio` (fewer
    iterations on the same grid, the last takes all), a `schedule` with its `shift`, and `capped`: no more steps than
    slots.
    """

    alg_temp: float | None = None
    schedule: schedule.Curve | None = None
    shift: float = 3.0
    step_ratio: float | None = None
    capped: bool = False

    def check(self, rule: Rule) -> None:
        """At least one iteration, and no more than the time grid has."""
        check_iterations(self.nominal_steps(rule), self.grid_steps(rule))

    def grid_steps(self, rule: Rule) -> int:
        """Steps of the time grid."""
        return min(rule.steps, rule.gen_length) if self.capped else rule.steps

    def nominal_steps(self, rule: Rule) -> int:
        """Iterations."""
        return self.grid_steps(rule) if self.step_ratio is None else int(rule.gen_length * self.step_ratio)

    def passes(self, state: State) -> Iterator[Ask]:
        """Every iteration, whatever is left."""
        rule = state.rule
        iterations, time = self.nominal_steps(rule), schedule.grid(self.grid_steps(rule), self.eps)
        table = None
        if self.schedule is not None:
            table = schedule.lavida(int(state.masked[0].sum()), iterations, self.schedule, self.shift)
            if len(table) < iterations:
                raise ProbeError(f"{iterations} steps for a schedule of {len(table)} columns: use a smaller step_ratio")
        for i in range(iterations):
            left = state.masked.sum() / state.batch
            last = i == iterations - 1
            count = table[i] if table else int(left) if last else schedule.dream_share(float(left), i, time)
            state.memory["chance"] = 1.0 if last else float(1 - time[i + 1] / time[i]) if i + 1 < len(time) else 1.0
            yield state.ask(
                state.masked, [count] * state.batch, step=i, step_in_block=i, window=(state.first, state.slots)
            )

    def choose(self, state: State, ask: Ask, score: Tensor, eligible: Tensor) -> Tensor:
        """By score, by chance (`origin`), by place (`autoregressive`), or by score and chance (`alg_temp`)."""
        if self.algorithm == "origin":
            shown = [
                revealed(d.uniform(int(e.sum())) < state.memory["chance"], e)
                for d, e in zip(state.draw, ask.eligible, strict=True)
            ]
            return torch.from_numpy(np.stack(shown)).to(score.device)
        if self.algorithm == "autoregressive":
            return select.first(eligible)
        if self.alg_temp:
            noise = [-torch.log(-torch.log(d.uniform(score.shape[1]))) for d in state.draw]
            score = score / self.alg_temp + torch.stack(noise).to(score.device)
        return super().choose(state, ask, score, eligible)


def check_iterations(iterations: int, most: int) -> None:
    """Raise `ProbeError` where a `step_ratio` asks for no step, or for more than there are."""
    if not 0 < iterations <= most:
        raise ProbeError(f"step_ratio asks for {iterations} steps; there must be 1..{most}")


def revealed(shown: Tensor, eligible: np.ndarray) -> np.ndarray:
    """What was said of the eligible slots in order, `(n,)` bool, at their places in `eligible (c,)`."""
    out = np.zeros_like(eligible)
    out[np.flatnonzero(eligible)[shown.numpy()]] = True
    return out


@unmaskings.register(name="dream_quota")
@dataclass(frozen=True, kw_only=True)
class DreamQuota(Tempered):
    """Fast-dLLM on Dream without a cache (Wu et al., arXiv 2505.22618): a quota per pass, of which the unsure go back.

    Of the `masks / steps` best, plus as many as went back last time, those below `tau` go back, except the best. After
    the last nominal step passes go on with what went back alone. One sample at a time.
    """

    algorithm: scores.Algorithm = "maskgit_plus"
    tau: float = 0.9

    def check(self, rule: Rule) -> None:
        """The quota is a whole number."""
        if rule.gen_length % rule.steps:
            raise ProbeError(
                f"gen_length {rule.gen_length} is no multiple of steps {rule.steps}, so there is no even quota; "
                f"use e.g. steps {rule.gen_length}"
            )

    def passes(self, state: State) -> Iterator[Ask]:
        """The nominal steps, then as long as something went back."""
        quota, carry, step = int(state.masked[0].sum()) // state.rule.steps, 0, 0
        while state.masked.any():
            count = (quota if step < state.rule.steps else 0) + carry
            if count == 0:
                return
            yield state.ask(
                state.masked, [count] * state.batch, step=step, step_in_block=step, window=(state.first, state.slots)
            )
            carry = state.memory["sent_back"]
            step += 1

    def choose(self, state: State, ask: Ask, score: Tensor, eligible: Tensor) -> Tensor:
        """The sure ones of the quota, and the best."""
        within = super().choose(state, ask, score, eligible)
        kept = within & select.threshold(score, eligible, self.tau)
        state.memory["sent_back"] = int((within & ~kept).sum())
        return kept


@unmaskings.register(name="dream_blocks")
@dataclass(frozen=True, kw_only=True)
class DreamBlocks(Tempered):
    """Fast-dLLM on Dream with a cache: blocks, whose first slot is committed by the refresh pass whatever its score.

    That pass commits nothing else, because the row before the block is not computed afterwards. Then, until the block
    is done, the candidates of at least `tau` and the best; without `tau` the time grid's share.
    """

    tau: float | None = 0.9

    def check(self, rule: Rule) -> None:
        """Blocks must divide the answer, and steps the blocks."""
        check_steps(rule)

    def passes(self, state: State) -> Iterator[Ask]:
        """One pass for the first slot, then the rest of the block."""
        rule, step = state.rule, 0
        time = schedule.grid(rule.steps // rule.n_blocks, self.eps)
        for block in range(rule.n_blocks):
            low, high = window(state, block)
            i = 0
            while i == 0 or state.masked[:, low:high].any():
                eligible = state.masked.copy()
                eligible[:, :low] = False
                eligible[:, (low + 1 if i == 0 else high) :] = False
                left = float(eligible.sum() / state.batch)
                count = 1 if i == 0 else schedule.dream_share(left, i, time)
                yield state.ask(
                    eligible,
                    [count] * state.batch,
                    step=step,
                    block=block,
                    step_in_block=i,
                    window=(low, high),
                )
                i, step = i + 1, step + 1

    def choose(self, state: State, ask: Ask, score: Tensor, eligible: Tensor) -> Tensor:
        """The first slot, or the sure ones."""
        if ask.step_in_block == 0 or self.tau is None:
            return super().choose(state, ask, score, eligible)
        return select.threshold(score, eligible, self.tau)
