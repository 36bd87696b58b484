"""Canvases that are re-noised instead of masked: what a step accepts, what stands next, and when a canvas is done.

DiffusionGemma's sampler (Google, 2026; the entropy bound is that of Ben-Hamu et al., arXiv 2505.24857). A canvas begins
as uniform noise. Each pass samples every slot, accepts the surest samples, and fills the others with new noise; nothing
that is accepted stays accepted. What is handed out in the end is the arg-max of the last pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from probe.decoding import propose, stop, unmask
from probe.decoding.blocks import check_steps
from probe.decoding.policy import Ask, Decision, State, Unmasking
from probe.decoding.rule import Rule
from probe.errors import ProbeError
from probe.registry import unmaskings

CANVAS = "renoise_canvas"


def temperature(step: int, steps: int, low: float, high: float) -> float:
    """The temperature of step 0..steps-1: from `high` down, never quite to `low`. Rounded to float32, as published."""
    return float(low + (high - low) * (torch.tensor(steps - step, dtype=torch.int32) / steps))


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of the distribution of `logits (..., vocabulary)`; impossible tokens count as nothing.

    Computed as `torch.distributions.Categorical` does, to the last bit: slots are ranked by it.
    """
    likely = logits - logits.logsumexp(-1, keepdim=True)
    return -(likely.clamp(min=torch.finfo(likely.dtype).min) * likely.softmax(-1)).sum(-1)


def accept(uncertainty: Tensor, bound: float) -> Tensor:
    """Which slots are accepted, `(batch, slot)` bool, from their entropies.

    In the order of their entropies, slots are accepted as long as the entropies before them sum up to at most
    `bound`: then the accepted ones are nearly independent of each other. The surest slot always is.
    """
    ordered, order = uncertainty.sort(-1)
    few = ordered.cumsum(-1) - ordered <= bound
    return torch.zeros_like(few).scatter(-1, order, few)


def settled(history: Tensor, top: Tensor, uncertainty: Tensor, threshold: float) -> Tensor:
    """Which canvases are done, `(batch,)` bool: unchanged and sure.

    `top (batch, slot)` is this pass's arg-max and `history (passes, batch, slot)` those of the passes that it must
    equal (-1 where there was none); the mean of `uncertainty (batch, slot)` must be below `threshold`.
    """
    return (history == top).all(-1).all(0) & (uncertainty.mean(-1) < threshold)


@dataclass
class _Canvas:
    """The block that is being decoded: what stands there, all `(batch, slot)`, and what the last passes made of it.

    `show` int64 are the tokens of the next pass; `top` the arg-max of the last one, `history (passes, batch, slot)`
    those that it must equal; `previous (batch, slot, vocabulary)` its logits; `done (batch,)` whether nothing changes.
    """

    show: Tensor
    top: Tensor
    history: Tensor
    done: Tensor
    previous: Tensor | None = None


@unmaskings.register(name="renoise")
@dataclass(frozen=True, kw_only=True)
class Renoise(Unmasking):
    """DiffusionGemma: canvas after canvas from noise; each pass keeps its surest samples, as far as `entropy_bound`.

    A block is a canvas of `block_length` slots, `steps / blocks` passes at most. The temperature falls from `t_max`
    towards `t_min`. A canvas is done when its arg-max was the same in the `stability_threshold` passes before and its
    mean entropy is below `confidence_threshold` nats; then all its slots are committed at once, as the arg-max. The
    end of an answer is looked for in finished canvases only.

    Noise and samples are drawn as transformers draws them on a CPU, with a number for every token of the vocabulary
    (`multinomial`). `sample: inversion` draws from the same distribution with one number per slot, on the device.
    """

    by_blocks = True

    entropy_bound: float = 0.1
    t_min: float = 0.4
    t_max: float = 0.8
    stability_threshold: int = 1
    confidence_threshold: float = 0.005
    sample: Literal["multinomial", "inversion"] = "multinomial"

    def check(self, rule: Rule) -> None:
        """Blocks must divide the answer, and steps the blocks; settings of other decoders have no meaning here."""
        check_steps(rule)
        if rule.vocabulary is None:
            raise ProbeError("`renoise` draws noise tokens: the rule must say the `vocabulary`")
        if not 0 <= self.t_min <= self.t_max or not self.t_max:
            raise ProbeError(f"t_min {self.t_min}, t_max {self.t_max}: 0 <= t_min <= t_max and t_max above 0 would do")
        if self.stability_threshold < 0:
            raise ProbeError(f"stability_threshold {self.stability_threshold}: a number of passes, 0 or more")
        if rule.temperature:
            raise ProbeError(
                f"temperature {rule.temperature}: `renoise` has a schedule of its own, from t_max to t_min"
            )
        if rule.remasking != "low_confidence":
            raise ProbeError(f"remasking `{rule.remasking}`: `renoise` keeps nothing that could be masked again")
        if rule.prior:
            raise ProbeError("`renoise` begins each canvas as noise: no part of the answer can be given")

    def passes(self, state: State) -> Iterator[Ask]:
        """Each canvas until it is done in every sample, or its steps are over."""
        rule = state.rule
        per_block = rule.steps // rule.n_blocks
        for block in range(rule.n_blocks):
            low = state.first + block * rule.block_length
            window = (low, low + rule.block_length)
            going = np.array([s is None for s in state.stop_at])
            if not going.any():
                return
            canvas = self._noise(state, going)
            state.memory[CANVAS] = canvas
            here = np.arange(state.slots)
            in_block = (here >= window[0]) & (here < window[1])
            for i in range(per_block):
                active = ~canvas.done.cpu().numpy()
                if not active.any():
                    break
                count = rule.block_length if i == per_block - 1 else 0
                yield state.ask(
                    active[:, None] & in_block,
                    [count if a else 0 for a in active],
                    active=active.tolist(),
                    step=block * per_block + i,
                    window=window,
                    columns=np.arange(*window),
                    block=block,
                    step_in_block=i,
                    absent=here >= window[1],
                    show=canvas.show,
                    previous=canvas.previous,
                )

    def decide(self, state: State, ask: Ask, logits: Tensor) -> Decision:
        """The next canvas of every sample that goes on; of one that is done now, the arg-max."""
        canvas, per_block = state.memory[CANVAS], state.rule.steps // state.rule.n_blocks
        logits_now = logits / temperature(ask.step_in_block, per_block, self.t_min, self.t_max)
        top, doubt = logits_now.argmax(-1), entropy(logits_now)
        active = ~canvas.done
        show = torch.where(accept(doubt, self.entropy_bound), *self._drawn(state, ask, logits_now))
        done = settled(canvas.history, top, doubt, self.confidence_threshold) | (ask.step_in_block == per_block - 1)
        commit = active & done
        canvas.top = torch.where(active[:, None], top, canvas.top)
        canvas.show = torch.where(commit[:, None], canvas.top, torch.where(active[:, None], show, canvas.show))
        canvas.history = torch.cat([canvas.history, top[None]])[1:]
        canvas.previous, canvas.done = logits_now, canvas.done | commit
        sure = unmask.confidence(logits, canvas.top)
        return Decision(canvas.top, sure, -doubt, commit[:, None].expand_as(top))

    def stop_at(self, ids: Sequence[int], patterns: Sequence[Sequence[int]], known: int | None) -> int | None:
        """The first place where any of the patterns begins."""
        places = [place for pattern in patterns if (place := stop.find(ids, pattern)) is not None]
        return min(places, default=None)

    def _noise(self, state: State, going: np.ndarray) -> _Canvas:
        """A fresh canvas; samples that are over draw nothing."""
        rule, size = state.rule, state.rule.block_length
        assert rule.vocabulary is not None
        nothing = torch.full((size,), rule.mask_id)
        drawn = [d.integers(rule.vocabulary, size) if g else nothing for d, g in zip(state.draw, going, strict=True)]
        show = torch.stack(drawn).to(state.device)
        history = torch.full((self.stability_threshold, *show.shape), -1, device=state.device)
        return _Canvas(show, show, history, torch.from_numpy(~going).to(state.device))

    def _drawn(self, state: State, ask: Ask, logits: Tensor) -> tuple[Tensor, Tensor]:
        """`(batch, slot)` a sample of each slot's distribution, then fresh noise: in the order of the native draws."""
        likely = logits.softmax(-1, dtype=torch.float32)
        samples = torch.zeros(likely.shape[:2], dtype=torch.int64, device=likely.device)
        noise, slots = torch.zeros_like(samples), likely.shape[1]
        for b, draw in enumerate(state.draw):
            if not ask.active[b]:
                continue
            if self.sample == "inversion":
                samples[b] = propose.draw(likely[b], draw.uniform(slots).to(likely.device))
            else:
                samples[b] = draw.categorical(likely[b]).to(likely.device)
            noise[b] = draw.integers(likely.shape[-1], slots).to(likely.device)
        return samples, noise
