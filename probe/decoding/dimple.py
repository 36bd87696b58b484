"""Dimple's decoder: confident decoding over a time grid that follows the progress (Yu et al., arXiv 2505.16990)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from probe.decoding import schedule, scores
from probe.decoding.draw import Draw
from probe.decoding.policy import Ask, Decision, State, Unmasking
from probe.decoding.propose import truncate
from probe.decoding.rule import Rule
from probe.errors import ProbeError
from probe.registry import unmaskings

Algorithm = Literal["maskgit_plus", "topk_margin", "entropy", "origin", "origin-ratio", "autoregressive"]
AT_START = "dimple_masks_at_start"


class Picked(NamedTuple):
    """What a step makes of some masked slots, all `(n,)`: candidate int64, its score, whether it is committed."""

    candidate: Tensor
    score: Tensor
    commit: Tensor


@unmaskings.register(name="dimple")
@dataclass(frozen=True, kw_only=True)
class Dimple(Unmasking):
    """Dimple: every candidate whose score is above `threshold`; where there is none, the time grid's share of them.

    Pipeline `dim`: the share counts from the progress that was really made and is never nothing; the last step commits
    all; decoding ends when nothing is masked. Pipeline `dream` has no threshold, counts as Dream does, reads scores
    from the truncated distribution, and runs all of its steps. The share goes to the best scores (`maskgit_plus`: the
    candidate's probability, `topk_margin`, `entropy`: its negative, so that no threshold above 0 is ever met), to
    random slots (`origin`; `origin-ratio`: each by chance) or to the leftmost (`autoregressive`).

    `top_k` is 50 in the published code without being said there. `original_confidence` reads scores from the raw
    softmax instead of the truncated, tempered one. `alg_temp` draws the order from `softmax(score / alg_temp)`.
    `pooled` lets the samples of a batch share one count and one ranking, as published; else each has its own.
    """

    pipeline: Literal["dim", "dream"] = "dim"
    algorithm: Algorithm = "maskgit_plus"
    threshold: float | None = None
    top_p: float | None = None
    top_k: int | None = 50
    eps: float = 1e-3
    original_confidence: bool = True
    alg_temp: float | None = None
    pooled: bool = False

    def check(self, rule: Rule) -> None:
        """What only one of the pipelines has."""
        if self.pipeline == "dream" and self.threshold:
            raise ProbeError(f"threshold {self.threshold}: pipeline `dream` has none; use pipeline `dim`")
        if self.pipeline == "dream" and self.algorithm == "origin-ratio":
            raise ProbeError("algorithm `origin-ratio` belongs to pipeline `dim`; in `dream`, `origin` goes by chance")

    def passes(self, state: State) -> Iterator[Ask]:
        """Steps over the whole answer; `dim` ends early."""
        time = schedule.grid(state.rule.steps, self.eps)
        state.memory[AT_START] = state.masked.sum(1)
        for step in range(state.rule.steps):
            open_in = [bool(row.any()) for row in state.masked]
            if self.pipeline == "dim" and not any(open_in):
                return
            counts = [0] * state.batch
            for group in self._groups(state.batch):
                left, start = int(state.masked[group].sum()), int(state.memory[AT_START][group].sum())
                for b in group:
                    counts[b] = self._count(left, start, step, time)
            yield state.ask(
                state.masked,
                counts,
                step=step,
                step_in_block=step,
                window=(state.first, state.slots),
                active=[o or self.pipeline == "dream" for o in open_in],
            )

    def decide(self, state: State, ask: Ask, logits: Tensor) -> Decision:
        """Each sample by itself, or all masked slots of the batch as one list."""
        device = logits.device
        candidate = torch.zeros(ask.eligible.shape, dtype=torch.int64, device=device)
        score = torch.zeros(ask.eligible.shape, device=device)
        commit = torch.zeros(ask.eligible.shape, dtype=torch.bool, device=device)
        for group in self._groups(state.batch):
            sample, column = np.nonzero(ask.eligible[group])  # sample by sample, from left to right
            if not len(sample):
                continue
            leftmost = torch.from_numpy(np.diff(sample, prepend=-1) > 0).to(device)
            at = torch.from_numpy(sample + group[0]).to(device), torch.from_numpy(column).to(device)
            start = int(state.memory[AT_START][group].sum())
            picked = self.pick(logits[at], leftmost, state.draw[group[0]], ask.step, start, state.rule)
            candidate[at], score[at], commit[at] = picked.candidate, picked.score.float(), picked.commit
        sure = scores.confidence(logits.double().softmax(-1), candidate)
        return Decision(candidate, sure, score, commit)

    def pick(self, logits: Tensor, leftmost: Tensor, draw: Draw, step: int, at_start: int, rule: Rule) -> Picked:
        """One step for masked slots with `logits (n, vocabulary)`, `leftmost (n,)` those with no mask before them.

        `at_start` were masked before the first step. Where a token is drawn, draws come in the published order.
        """
        n, last = logits.shape[0], step == rule.steps - 1
        kept = truncate(logits, temperature=rule.temperature, top_p=self.top_p, top_k=self.top_k).softmax(-1)
        time = schedule.grid(rule.steps, self.eps)
        if self.pipeline == "dream" and self.algorithm in ("origin", "autoregressive"):
            commit = leftmost
            if self.algorithm == "origin":
                chance = torch.ones(()) if last else 1 - time[step + 1] / time[step]
                commit = (draw.uniform(n) < chance).to(logits.device)
            candidate = kept.argmax(-1)
            if rule.temperature > 0 and bool(commit.any()):
                candidate[commit] = draw.categorical(kept[commit]).to(logits.device)
            return Picked(candidate, scores.confidence(kept, candidate), commit)
        candidate = draw.categorical(kept).to(logits.device) if rule.temperature > 0 else kept.argmax(-1)
        raw = self.pipeline == "dim" and self.original_confidence
        score = self._score(logits.softmax(-1) if raw else kept, candidate)
        if self.threshold is not None and self.threshold > 0:
            sure = torch.ones_like(leftmost) if last else score > self.threshold
            if bool(sure.any()):
                return Picked(candidate, score, sure)
        return Picked(candidate, score, self._share(score, leftmost, draw, step, at_start, time))

    def _share(self, score: Tensor, leftmost: Tensor, draw: Draw, step: int, at_start: int, time: Tensor) -> Tensor:
        """The slots `(n,)` that the time grid grants."""
        n, device = score.shape[0], score.device
        if self.algorithm == "autoregressive":
            return leftmost
        if self.pipeline == "dream":
            count = schedule.dream_share(n, step, time)
        else:
            chance = schedule.dimple_chance(n, at_start, step, time)
            if self.algorithm == "origin-ratio":
                return (draw.uniform(n) < chance).to(device)
            count = int(n * chance)
        if self.algorithm == "origin":
            chosen = draw.permutation(n)[:count].to(device)
        elif self.alg_temp and count:
            chosen = draw.several((score / self.alg_temp).softmax(-1), count).to(device)
        else:
            chosen = score.sort(descending=True, stable=True).indices[:count]
        return torch.zeros_like(leftmost).index_fill_(0, chosen, True)

    def _score(self, probability: Tensor, candidate: Tensor) -> Tensor:
        if self.algorithm == "topk_margin":
            return scores.margin(probability)
        if self.algorithm == "entropy":
            return scores.negative_entropy(probability)
        return scores.confidence(probability, candidate)

    def _count(self, left: int, at_start: int, step: int, time: Tensor) -> int:
        """What the schedule asks for where no candidate passes the threshold."""
        if left == 0:
            return 0
        if self.algorithm == "autoregressive":
            return 1
        if self.pipeline == "dream":
            return schedule.dream_share(left, step, time)
        return schedule.dimple_share(left, at_start, step, time) if left / at_start > self.eps else left

    def _groups(self, batch: int) -> list[list[int]]:
        """Samples that share one count and one ranking."""
        return [list(range(batch))] if self.pooled else [[b] for b in range(batch)]
