"""The denoising loop: a generator of events that owns the clock.

It knows the rule (blocks, schedule, proposal, confidence, stop), nothing of the model, probes or traces: a `forward`
turns a canvas and the rows whose logits are needed into logits, and may hand back a canvas that lost visual tokens.

The rule is LLaDA-V's: within a block of `block_length` slots, `steps / blocks` passes each commit the most confident
candidates. Masked state is a boolean of its own: the mask token can win an arg-max, in which case the slot stays
masked and the budget is spent; and a prompt row that equals the mask embedding is decoded as a slot.

One host synchronisation per step: the tokens of the answer, which the stop rule and the next step's rows need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from probe.canvas import Canvas
from probe.decoding import schedule, stop, unmask
from probe.errors import ProbeError
from probe.site import Clock


@dataclass(frozen=True)
class Rule:
    """Settings of one generation, with everything resolved to ids.

    `gen_length` must be a multiple of `block_length`, and `steps` of the number of blocks; more steps than slots are
    allowed. `stop` and `suffix` are token ids. `cfg_scale` 0 means no guidance.
    """

    gen_length: int
    block_length: int
    steps: int
    mask_id: int
    suppressed: tuple[int, ...] = ()
    temperature: float = 0.0
    remasking: unmask.Remasking = "low_confidence"
    cfg_scale: float = 0.0
    stop: tuple[tuple[int, ...], ...] = ()
    suffix: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.gen_length < 1 or self.block_length < 1 or self.steps < 1:
            raise ProbeError(
                f"gen_length {self.gen_length}, block_length {self.block_length} and steps {self.steps} "
                "must be at least 1"
            )
        if self.gen_length % self.block_length:
            raise ProbeError(
                f"gen_length {self.gen_length} is no multiple of block_length {self.block_length}; "
                f"use e.g. block_length {self.gen_length} (one block)"
            )
        if self.steps % self.n_blocks:
            raise ProbeError(
                f"steps {self.steps} is no multiple of the {self.n_blocks} blocks "
                f"(gen_length {self.gen_length} / block_length {self.block_length}); "
                f"use e.g. steps {max(1, self.steps // self.n_blocks) * self.n_blocks}"
            )

    @property
    def n_blocks(self) -> int:
        """Blocks of the answer, decoded left to right."""
        return self.gen_length // self.block_length


@dataclass(frozen=True)
class Pass:
    """One forward pass that the loop asks for.

    `rows (batch, r)` int64 are the canvas rows (numbered at the start) whose logits are needed; `masked[b]` and
    `filled[b]` (host) are the answer rows that are still masked or already written. Under guidance (`guided`) a second
    stream runs on `canvas.unconditional(mask embedding)`; its logits follow the first stream's along the batch.
    """

    clock: Clock
    canvas: Canvas
    rows: Tensor
    masked: list[list[int]]
    filled: list[list[int]]
    guided: bool = False


@dataclass(frozen=True)
class PassResult:
    """`logits (streams * batch, r, vocabulary)` float32, and the canvas that the next step shall use."""

    logits: Tensor
    canvas: Canvas


class Forward(Protocol):
    """What the loop calls: model and probes behind one function."""

    def __call__(self, request: Pass, /) -> PassResult:
        """Run one forward pass."""
        ...


@dataclass(frozen=True)
class Step:
    """Event: one denoising step is done. Positions are slots: 0 is the first generated one, negative ones are prompt.

    `slots (r,)` (host) are the slots with fresh logits; `logits (batch, r, vocabulary)` as the decision used them
    (guided and suppressed); `candidate`, its `confidence` (float64), the `score` that ranked it (the same, unless
    remasking is random), `eligible`, `committed` all `(batch, r)`;
    `counts` what the schedule asked for; `active[b]` whether the sample was still decoding; `masked_before[b]` the
    slots masked before the step; `tokens (batch, gen_length)` the answer after it (host).
    """

    clock: Clock
    slots: list[int]
    logits: Tensor
    candidate: Tensor
    confidence: Tensor
    score: Tensor
    eligible: Tensor
    committed: Tensor
    counts: list[int]
    active: list[bool]
    masked_before: list[list[int]]
    tokens: np.ndarray
    canvas: Canvas


@dataclass(frozen=True)
class Finished:
    """Event: the generation ended. `output[b]` are the ids before the stop string (then the suffix)."""

    output: list[list[int]]
    stop_at: list[int | None]
    passes: int
    canvas: Canvas


Event = Step | Finished


def generators(seed: int, samples: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per sample, so that a sample's noise does not depend on its batch."""
    out = []
    for sample in samples:
        generator = torch.Generator()
        generator.manual_seed(seed + sample)
        out.append(generator)
    return out


def _uniform_rows(generator: torch.Generator, length: int, rows: Tensor, vocabulary: int) -> Tensor:
    """Rows of `torch.rand(length, vocabulary, float64)` without holding it: the stream is drawn in chunks."""
    out = torch.empty(rows.shape[0], vocabulary, dtype=torch.float64)
    chunk = max(1, 2**22 // vocabulary)
    host = rows.cpu()
    for first in range(0, length, chunk):
        drawn = torch.rand(min(chunk, length - first), vocabulary, dtype=torch.float64, generator=generator)
        here = (host >= first) & (host < first + drawn.shape[0])
        out[here] = drawn[host[here] - first]
    return out


def denoise(
    canvas: Canvas,
    forward: Forward,
    rule: Rule,
    embed: Callable[[Tensor], Tensor],
    noise: Sequence[torch.Generator],
) -> Iterator[Event]:
    """Run the rule to its end, one event per step and a last `Finished`.

    `embed` maps ids `(...)` to embeddings `(..., width)`; `noise` has one generator per sample (used when
    `temperature > 0` or `remasking: random`).
    """
    device = canvas.embeds.device
    batch, gen = canvas.layout.batch, rule.gen_length
    mask_embed = embed(torch.tensor(rule.mask_id, device=device))

    # Slots: masked-looking prompt rows (negative numbers) first, then the answer.
    stray = _stray_prompt_slots(canvas, mask_embed)
    slot_numbers = sorted({s for per_sample in stray for s in per_sample}) + list(range(gen))
    start = torch.tensor(canvas.prompt_length, device=device)[:, None]
    slot_rows = (start + torch.tensor(slot_numbers, device=device)).clamp_(min=0)
    first_answer = len(slot_numbers) - gen
    masked = np.ones((batch, len(slot_numbers)), dtype=bool)
    for b in range(batch):
        masked[b, :first_answer] = [s in stray[b] for s in slot_numbers[:first_answer]]
    tokens = torch.full((batch, len(slot_numbers)), rule.mask_id, dtype=torch.int64, device=device)
    host_tokens = tokens.cpu().numpy()
    numbers = np.array(slot_numbers)

    stop_at: list[int | None] = [None] * batch
    steps_per_block = rule.steps // rule.n_blocks
    passes = 0

    for block in range(rule.n_blocks):
        low, high = block * rule.block_length, (block + 1) * rule.block_length
        in_block = (numbers >= low) & (numbers < high)
        over = [s is not None and s <= low for s in stop_at]
        if all(over):
            break
        counts = [schedule.linear(int((masked[b] & in_block).sum()), steps_per_block) for b in range(batch)]
        for step_in_block in range(steps_per_block):
            active = [not over[b] and _still_decoding(masked[b], in_block, numbers, stop_at[b]) for b in range(batch)]
            if not any(active):
                break
            limit = np.array([high if s is None else s for s in stop_at])
            eligible_host = masked & (numbers[None] < limit[:, None]) & np.array(active)[:, None]
            columns = np.flatnonzero(eligible_host.any(0))
            at = torch.from_numpy(columns).to(device)
            rows = slot_rows[:, at]
            clock = Clock(
                pass_index=passes,
                step=block * steps_per_block + step_in_block,
                block=block,
                step_in_block=step_in_block,
                nominal_steps=rule.steps,
                n_blocks=rule.n_blocks,
            )
            answer_masked = masked[:, first_answer:]
            request = Pass(
                clock=clock,
                canvas=canvas,
                rows=rows,
                masked=[
                    [canvas.prompt_length[b] + int(i) for i in np.flatnonzero(m)] for b, m in enumerate(answer_masked)
                ],
                filled=[
                    [canvas.prompt_length[b] + int(i) for i in np.flatnonzero(~m)] for b, m in enumerate(answer_masked)
                ],
                guided=rule.cfg_scale > 0,
            )
            result = forward(request)
            passes += 1
            drawn_over = canvas.layout  # noise follows the sequence that this pass ran on
            canvas = result.canvas

            logits = result.logits
            if rule.cfg_scale > 0:
                logits = unmask.guide(logits[:batch], logits[batch:], rule.cfg_scale)
            logits = unmask.suppress(logits, rule.suppressed)
            uniform = None
            if rule.temperature > 0:
                where = drawn_over.locate(rows)
                uniform = torch.stack(
                    [_uniform_rows(noise[b], drawn_over.length[b], where[b], logits.shape[-1]) for b in range(batch)]
                ).to(device)
            candidate = unmask.propose(logits, rule.temperature, uniform)
            sure = unmask.confidence(logits, candidate)
            if rule.remasking == "random":
                where = drawn_over.locate(rows).cpu()
                score = torch.stack(
                    [torch.rand(drawn_over.length[b], generator=noise[b])[where[b]] for b in range(batch)]
                ).to(device)
            else:
                score = sure
            eligible = torch.from_numpy(eligible_host[:, columns]).to(device)
            asked = [counts[b][step_in_block] if active[b] else 0 for b in range(batch)]
            commit = unmask.select(score, eligible, asked)

            canvas.write(rows, embed(candidate), commit)
            tokens[:, at] = torch.where(commit, candidate, tokens[:, at])
            masked_before = [numbers[masked[b]].tolist() for b in range(batch)]
            snapshot = torch.cat([tokens, torch.zeros_like(tokens).index_copy_(1, at, commit.long())], 1).cpu().numpy()
            host_tokens, host_commit = snapshot[:, : len(numbers)], snapshot[:, len(numbers) :].astype(bool)
            masked = masked & ~(host_commit & (host_tokens != rule.mask_id))
            yield Step(
                clock=clock,
                slots=numbers[columns].tolist(),
                logits=logits,
                candidate=candidate,
                confidence=sure,
                score=score,
                eligible=eligible,
                committed=commit,
                counts=asked,
                active=active,
                masked_before=masked_before,
                tokens=host_tokens[:, first_answer:],
                canvas=canvas,
            )
            for b in range(batch):
                if active[b] and rule.stop:
                    stop_at[b] = stop.search(host_tokens[b, first_answer:].tolist(), rule.stop, stop_at[b])

    output = [host_tokens[b, first_answer:][: stop_at[b]].tolist() + list(rule.suffix) for b in range(batch)]
    yield Finished(output=output, stop_at=stop_at, passes=passes, canvas=canvas)


def _still_decoding(masked: np.ndarray, in_block: np.ndarray, numbers: np.ndarray, stop_at: int | None) -> bool:
    """Whether a sample needs another step in this block: masks are left in it, and before its stop if it has one."""
    if stop_at is not None and not (masked & (numbers >= 0) & (numbers < stop_at)).any():
        return False
    return bool((masked & in_block).any())


def _stray_prompt_slots(canvas: Canvas, mask_embed: Tensor) -> list[list[int]]:
    """Slots (negative numbers) of prompt rows that the published rule takes for masked: equal to the mask embedding."""
    close = ((canvas.embeds - mask_embed).abs() < 1e-5).all(-1).cpu()
    return [[int(r) - p for r in close[b, :p].nonzero()[:, 0]] for b, p in enumerate(canvas.prompt_length)]
