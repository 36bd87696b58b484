"""The denoising loop: a generator of events that owns the clock.

It knows neither the model nor probes, and decides nothing itself: an unmasking policy says which slots the next pass
is about and what it commits, a caching policy which rows the pass computes, a length policy whether slots come or go
(`decoding.policy`). A `forward` turns a canvas and the wanted rows into logits, and may hand back a canvas that lost
visual tokens.

Masked state is a boolean of its own: the mask token can win an arg-max, in which case the slot stays masked and the
budget is spent; and a prompt row that equals the mask embedding is decoded as a slot, as LLaDA-V does.

One host synchronisation per pass: the tokens of the answer, which policies and the next pass's rows need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from probe.canvas import Canvas
from probe.decoding import unmask
from probe.decoding.draw import Draw
from probe.decoding.fit import check_fit, name_of
from probe.decoding.policy import Ask, Change, Decision, State, Work
from probe.decoding.rule import Rule
from probe.errors import ProbeError
from probe.site import Clock, Phase
from probe.upload import upload

__all__ = ["Event", "Finished", "Forward", "Pass", "PassResult", "Rule", "Step", "denoise"]


@dataclass(frozen=True)
class Pass:
    """One forward pass that the loop asks for.

    `rows (batch, c)` int64 are the canvas rows (numbered when they were made) of the slots whose logits are needed, and
    `previous` the rows before them (-1 where this pass does not compute it), for models whose row predicts the next
    slot. `masked[b]` and `filled[b]` (host) are the rows of masked and of written slots, `predicting[b]` the rows
    before masked slots, whether those are computed themselves, stored, or not in the sequence yet. Under guidance
    (`guided`) a second stream runs on `canvas.unconditional(mask embedding)`; its logits follow the first stream's
    along the batch.
    `tail (batch, t)` are the places, behind the prompt, of slots and suffix that this pass computes.
    """

    clock: Clock
    canvas: Canvas
    rows: Tensor
    previous: Tensor
    masked: list[list[int]]
    filled: list[list[int]]
    work: Work = field(default_factory=Work)
    tail: np.ndarray | None = None
    conditioned: bool = False
    """Whether the wanted slots show noise that the model must be prepared for (`Backbone.condition`)."""
    previous_logits: Tensor | None = None
    """`(batch, c, vocabulary)` of an earlier pass, for models that are conditioned on them at the wanted slots."""
    computed: list[list[int]] = field(default_factory=list)
    """Per sample (host): the rows of the slots that this pass computes."""
    predicting: list[list[int]] = field(default_factory=list)
    guided: bool = False
    window: tuple[list[int], ...] = ()
    """Per sample (host): rows of the block being decoded."""
    edge: tuple[int, ...] = ()
    """Per sample (host): the row before the block, which predicts its first slot where logits are shifted."""
    shadow: bool = False


@dataclass(frozen=True)
class PassResult:
    """`logits (streams * batch, c, vocabulary)` float32, and the canvas that the next step shall use.

    `alive[b]` and `places (batch, c)`: how long the sequence was, and where in it the wanted slots stood. `on_cache`:
    what was removed for good leaves stored features outdated; `refresh` asks for a pass that computes everything.
    `chosen (batch, c)` bool: of the slots' rows, those that a pass computed which chooses them itself (`Work.delta`).
    """

    logits: Tensor
    canvas: Canvas
    alive: tuple[int, ...] = ()
    places: Tensor | None = None
    on_cache: str | None = None
    chosen: Tensor | None = None


class Forward(Protocol):
    """What the loop calls: model and probes behind one function."""

    shift: int
    """How many rows before a slot the row stands that predicts it: 0 or 1."""

    def __call__(self, request: Pass, /) -> PassResult:
        """Run one forward pass."""
        ...

    def wants_every_row(self, clock: Clock, /) -> str | None:
        """Why (a probe's name and need) this pass must compute every row; None when it need not."""
        ...


@dataclass(frozen=True)
class Step:
    """Event: one pass is done. Positions are slots: 0 is the first generated one, negative ones are prompt.

    `slots (c,)` (host) are the slots with fresh logits; `logits (batch, c, vocabulary)` as the decision used them
    (guided and suppressed); `candidate`, its `confidence` (float64), the `score` that ranked it, `eligible`,
    `committed` all `(batch, c)`; `remasked` likewise or None;
    `counts` what the schedule asked for; `active[b]` whether the sample was still decoding; `masked_before[b]` the
    slots masked before the step; `tokens (batch, slots)` the answer after it (host), `numbers (slots,)` which slots.
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
    work: Work = field(default_factory=Work)
    computed: np.ndarray | None = None
    """`(batch, slots)` bool: the answer slots whose rows the pass computed."""
    remasked: Tensor | None = None
    numbers: np.ndarray | None = None
    masked: np.ndarray | None = None
    """`(batch, slots)` bool: the answer slots that are masked after the pass."""
    written: np.ndarray | None = None
    """`(batch, slots)` bool: the answer slots that the pass wrote (the mask token, if it won, included)."""
    on_cache: str | None = None
    """Where visual tokens were removed for good: `refresh` or `columns`, how the cache is brought up to date."""
    chosen: Tensor | None = None
    """`(batch, slots)` bool on the device, in place of `computed` where the pass itself chose the rows."""


@dataclass(frozen=True)
class Finished:
    """Event: the generation ended. `output[b]` are the ids before the stop string (then the suffix)."""

    output: list[list[int]]
    stop_at: list[int | None]
    passes: int
    canvas: Canvas


Event = Step | Finished


def denoise(
    canvas: Canvas,
    forward: Forward,
    rule: Rule,
    embed: Callable[[Tensor], Tensor],
    noise: Sequence[Draw],
) -> Iterator[Event]:
    """Run the rule to its end, one event per pass and a last `Finished`.

    `embed` maps ids `(...)` to embeddings `(..., width)`; `noise` has one source per sample.
    """
    device = canvas.embeds.device
    mask_embed = embed(torch.tensor(rule.mask_id, device=device))
    rule.caching.check(rule, forward.shift)
    check_fit(rule.unmasking, rule.caching, shift=forward.shift)
    state = _begin(canvas, rule, mask_embed, noise, forward.shift)
    tokens = upload(state.tokens, device)
    if rule.prior:
        at = [state.first + slot for slot, _ in rule.prior]
        rows = upload(state.rows[:, at], device)
        canvas.write(rows, embed(tokens[:, at]), torch.ones_like(rows, dtype=torch.bool))

    outdated = False
    prefill = rule.caching.prefill(state, forward.shift)
    for ask in chain([prefill] if prefill is not None else [], rule.unmasking.passes(state)):
        clock = _clock(state, ask)
        work = rule.caching.plan(state, ask)
        if outdated and work.partial:
            work = rule.caching.refreshed(state, ask) or work
        if work.prompt != "all" and (reason := forward.wants_every_row(clock)):
            again = rule.caching.refreshed(state, ask)
            if again is None:
                kind = name_of(rule.caching)
                raise ProbeError(f"step {clock.step}: {reason}, but the cache `{kind}` computes only some rows here")
            work = again
        computed = _computed(state, ask, work)
        ask = _within(state, ask, work, computed)
        clock = _clock(state, ask, work.phase)
        if ask.show is not None:
            shown_rows = upload(state.rows[:, ask.columns], device)
            canvas.write(shown_rows, embed(ask.show), torch.ones_like(ask.show, dtype=torch.bool))
        request = _request(state, canvas, ask, work, clock, computed, guided=rule.cfg_scale > 0)
        result = forward(request)
        state.passes += 1
        canvas = result.canvas
        state.alive, state.places = result.alive, result.places

        on_cache = result.on_cache if rule.caching.renews or result.on_cache is None else "columns"
        outdated = on_cache == "refresh" or (outdated and work.partial)

        logits = result.logits
        if rule.cfg_scale > 0:
            logits = unmask.guide(logits[: state.batch], logits[state.batch :], rule.cfg_scale)
        logits = unmask.suppress(logits, rule.suppressed)
        if ask.phase is Phase.PREFILL:
            decision = rule.unmasking.first_token(state, ask, logits)
        else:
            decision = rule.unmasking.decide(state, ask, logits)
        # a candidate of NaN logits is no prediction: its slot stays masked, whatever the policy asked for
        decision = replace(decision, commit=decision.commit & ~decision.confidence.isnan())
        masked_before = [state.numbers[m].tolist() for m in state.masked]
        tokens = _carry_out(state, canvas, request, ask, decision, tokens, embed, mask_embed)
        for policy in (rule.unmasking, rule.length):
            if further := policy.fill(state, ask, decision):
                tokens = _fill(state, canvas, further, tokens, embed)
        rule.caching.after(state, ask, decision)
        first = state.first
        yield Step(
            clock=clock,
            slots=state.numbers[ask.columns].tolist(),
            logits=logits[:, : len(ask.columns)],
            candidate=decision.candidate,
            confidence=decision.confidence,
            score=decision.score,
            eligible=upload(ask.eligible, device),
            committed=decision.commit,
            counts=list(ask.counts),
            active=list(ask.active),
            masked_before=masked_before,
            tokens=state.tokens[:, first:].copy(),
            canvas=canvas,
            work=work,
            computed=computed[:, first:],
            remasked=decision.remask,
            numbers=state.numbers[first:].copy(),
            masked=state.masked[:, first:].copy(),
            written=_written(state)[:, first:].copy(),
            on_cache=on_cache,
            chosen=result.chosen,
        )
        for b in range(state.batch):
            if ask.active[b] and rule.stop:
                found = rule.unmasking.stop_at(state.tokens[b, first:].tolist(), rule.stop, state.stop_at[b])
                state.stop_at[b] = found
        if state.written is not None and not state.written.any() and _stuck(decision, ask):
            break  # nothing changed and nothing can: the next pass would see the same NaN
        change = rule.length.after(state, ask, logits, decision)
        if change is not None:
            canvas, tokens = _change(state, canvas, change, tokens, embed, mask_embed)
            if change.finish:
                break
        if state.finished:
            break

    answer = state.tokens[:, state.first :]
    output = [answer[b][: state.stop_at[b]].tolist() + list(rule.suffix) for b in range(state.batch)]
    yield Finished(output=output, stop_at=state.stop_at, passes=state.passes, canvas=canvas)


def _stuck(decision: Decision, ask: Ask) -> bool:
    """Whether every slot that may be committed has NaN for a prediction (some may), and nothing else was done."""
    eligible = upload(ask.eligible, decision.commit.device)
    if decision.remask is not None or not bool(eligible.any()):
        return False
    return bool(decision.confidence.isnan()[eligible].all())


def _begin(canvas: Canvas, rule: Rule, mask_embed: Tensor, noise: Sequence[Draw], shift: int) -> State:
    """Slots: masked-looking prompt rows (negative numbers) first, then the answer."""
    batch, gen = canvas.layout.batch, rule.gen_length
    stray = _stray_prompt_slots(canvas, mask_embed) if rule.unmasking.decodes_prompt else [[]] * batch
    numbers = np.array(sorted({s for per_sample in stray for s in per_sample}) + list(range(gen)), np.int64)
    rows = (np.array(canvas.prompt_length)[:, None] + numbers).clip(min=0)
    masked = np.ones((batch, len(numbers)), dtype=bool)
    first = len(numbers) - gen
    for b in range(batch):
        masked[b, :first] = [s in stray[b] for s in numbers[:first]]
    tokens = np.full((batch, len(numbers)), rule.mask_id, np.int64)
    for slot, token in rule.prior:
        tokens[:, first + slot] = token
        masked[:, first + slot] = False
    return State(
        rule=rule,
        prompt_length=canvas.prompt_length,
        numbers=numbers,
        rows=rows,
        tokens=tokens,
        masked=masked,
        draw=noise,
        device=canvas.embeds.device,
        stop_at=[None] * batch,
        shift=shift,
        filled_at=np.full((batch, len(numbers)), -1),
    )


def _clock(state: State, ask: Ask, phase: Phase | None = None) -> Clock:
    answer = state.masked[:, state.first :]
    return Clock(
        pass_index=state.passes,
        step=ask.step,
        block=ask.block,
        step_in_block=ask.step_in_block,
        nominal_steps=state.rule.nominal_steps,
        n_blocks=state.rule.n_blocks,
        phase=phase if phase is not None else ask.phase,
        committed=tuple(1 - float(m.mean()) for m in answer),
    )


def _computed(state: State, ask: Ask, work: Work) -> np.ndarray:
    """`(batch, slots)` bool: the slots whose rows the pass computes."""
    present = np.ones(state.slots, bool) if ask.absent is None else ~ask.absent
    chosen = present if work.slots is None else work.slots & present
    out: np.ndarray = np.broadcast_to(chosen, (state.batch, state.slots)).copy()
    out[:, : state.first] = work.prompt == "all"  # slots that are prompt rows come and go with the prompt
    return out


def _within(state: State, ask: Ask, work: Work, computed: np.ndarray) -> Ask:
    """The ask without slots of which the pass computes no row: a windowed cache cuts off masks left behind."""
    usable = computed[:, ask.columns]
    if state.shift:
        before = np.where(ask.columns > state.first, ask.columns - 1, -1)
        usable = usable | np.where(before >= 0, computed[:, before], work.prompt != "none")
    if usable.all() or ask.show is not None:
        return ask
    at = usable.any(0)
    return replace(ask, columns=ask.columns[at], eligible=(ask.eligible & usable)[:, at])


def _request(
    state: State, canvas: Canvas, ask: Ask, work: Work, clock: Clock, computed: np.ndarray, *, guided: bool
) -> Pass:
    first = state.first
    rows = state.rows[:, ask.columns]
    before = np.where(ask.columns > first, ask.columns - 1, -1)
    last_prompt = np.array(canvas.prompt_length)[:, None] - 1
    previous = np.where(before[None] >= 0, state.rows[:, before], last_prompt)
    known = np.where(before[None] >= 0, computed[:, before], work.prompt != "none")
    previous = np.where(known, previous, -1)
    answer = np.arange(first, state.slots)
    slots, masks = state.rows[:, answer], state.masked[:, answer]
    tail = None
    if work.prompt != "all" or not computed[:, first:].all() or not work.suffix:
        ends = [n_slots := state.slots - first, n_slots + canvas.suffix_length]
        suffix = np.arange(*ends) if work.suffix else np.empty(0, np.int64)
        places = [np.concatenate([np.flatnonzero(c), suffix]) for c in computed[:, first:]]
        width = max(len(p) for p in places)  # ragged samples repeat their last row, which changes nothing
        tail = np.stack([np.concatenate([p, np.repeat(p[-1:], width - len(p))]) for p in places])
    low, high = ask.window
    rows_before = np.concatenate([last_prompt, slots[:, :-1]], 1)
    known_before = np.concatenate([np.full_like(masks[:, :1], work.prompt != "none"), computed[:, first:-1]], 1)
    return Pass(
        clock=clock,
        canvas=canvas,
        rows=upload(rows, state.device),
        previous=upload(previous, state.device),
        masked=[slots[b][masks[b] & computed[b, first:]].tolist() for b in range(state.batch)],
        filled=[slots[b][~masks[b] & computed[b, first:]].tolist() for b in range(state.batch)],
        work=work,
        tail=tail,
        computed=[slots[b][computed[b, first:]].tolist() for b in range(state.batch)],
        predicting=[rows_before[b][masks[b] & known_before[b]].tolist() for b in range(state.batch)],
        guided=guided,
        window=tuple(state.rows[b, max(low, first) : high].tolist() for b in range(state.batch)),
        edge=tuple(int(state.rows[b, low - 1]) if low > first else p - 1 for b, p in enumerate(canvas.prompt_length)),
        shadow=ask.shadow,
        conditioned=ask.show is not None,
        previous_logits=ask.previous,
    )


def _carry_out(
    state: State,
    canvas: Canvas,
    request: Pass,
    ask: Ask,
    decision: Decision,
    tokens: Tensor,
    embed: Callable[[Tensor], Tensor],
    mask_embed: Tensor,
) -> Tensor:
    """Write what a pass decided into canvas, tokens and masks; the one synchronisation of the pass."""
    rule, columns = state.rule, ask.columns
    state.written = np.zeros_like(state.masked)
    if len(columns) == 0:
        return tokens
    at = upload(columns, state.device)
    commit, candidate = decision.commit, decision.candidate
    shown, changed = candidate, commit
    remask = decision.remask
    if remask is not None:
        shown = torch.where(remask, rule.mask_id, shown)
        changed = changed | remask
        embeds = torch.where(remask[..., None], mask_embed, embed(shown))
    else:
        embeds = embed(shown)
    canvas.write(request.rows, embeds, changed)
    tokens = tokens.clone()
    tokens[:, at] = torch.where(changed, shown, tokens[:, at])
    flags = torch.zeros_like(tokens).index_copy_(1, at, commit.long())
    if remask is not None:
        flags.index_add_(1, at, 2 * remask.long())
    snapshot = torch.cat([tokens, flags], 1).cpu().numpy()
    state.tokens = snapshot[:, : state.slots].copy()
    host = snapshot[:, state.slots :]
    written = (host & 1).astype(bool)
    state.written = written
    assert state.filled_at is not None
    state.filled_at = np.where(written, state.passes - 1, state.filled_at)
    state.masked = (state.masked & ~(written & (state.tokens != rule.mask_id))) | (host & 2).astype(bool)
    return tokens


def _fill(
    state: State, canvas: Canvas, further: dict[tuple[int, int], int], tokens: Tensor, embed: Callable[[Tensor], Tensor]
) -> Tensor:
    """Write slots outside the ask; they count as written in this pass."""
    assert state.written is not None and state.filled_at is not None
    new = np.zeros_like(state.masked)
    for (sample, column), token in further.items():
        new[sample, column] = True
        state.tokens[sample, column] = token
    state.written = state.written | new
    state.filled_at = np.where(new, state.passes - 1, state.filled_at)
    state.masked = np.where(new, state.tokens == state.rule.mask_id, state.masked)
    tokens = upload(state.tokens, state.device)
    rows, where = upload(state.rows, state.device), upload(new, state.device)
    canvas.write(rows[:, state.first :], embed(tokens)[:, state.first :], where[:, state.first :])
    return tokens


def _written(state: State) -> np.ndarray:
    return np.zeros_like(state.masked) if state.written is None else state.written


def _change(
    state: State,
    canvas: Canvas,
    change: Change,
    tokens: Tensor,
    embed: Callable[[Tensor], Tensor],
    mask_embed: Tensor,
) -> tuple[Canvas, Tensor]:
    """Carry out what a length policy wants."""
    if state.batch != 1 and (change.insert or change.delete):
        raise ProbeError(f"slots can only come and go one sample at a time, not in a batch of {state.batch}")
    if change.insert or change.delete:
        canvas = _resize(state, canvas, change, mask_embed)
        tokens = upload(state.tokens, state.device)
    if change.fill:
        at = list(change.fill)
        ids = upload([list(change.fill.values())] * state.batch, state.device)
        rows = upload(state.rows[:, at], state.device)
        canvas.write(rows, embed(ids), torch.ones_like(ids, dtype=torch.bool))
        tokens = tokens.clone()
        tokens[:, at] = ids
        state.tokens[:, at] = ids.cpu().numpy()
        state.masked[:, at] = ids.cpu().numpy() == state.rule.mask_id
    return canvas, tokens


def _resize(state: State, canvas: Canvas, change: Change, mask_embed: Tensor) -> Canvas:
    """Slots come and go: every array of the state, and the canvas, in one order."""
    first = state.first
    insert = dict(change.insert)
    order: list[int] = []  # columns as before; -1 for a new slot
    for column in range(state.slots + 1):
        order += [-1] * insert.get(column, 0)
        if column < state.slots and column not in change.delete:
            order.append(column)
    source = np.array(order, np.int64)
    new = source < 0
    fresh_rows = canvas.layout.length_at_start + np.arange(int(new.sum()))
    fresh_numbers = max(int(state.numbers.max(initial=-1)) + 1, state.memory.get("next_number", 0))
    fresh_numbers = fresh_numbers + np.arange(int(new.sum()))
    state.memory["next_number"] = (
        int(fresh_numbers[-1]) + 1 if len(fresh_numbers) else state.memory.get("next_number", 0)
    )
    canvas = canvas.resized(source[first:] - np.where(source[first:] < 0, 0, first), fresh_rows, mask_embed)

    def moved(x: np.ndarray, filler: np.ndarray | int) -> np.ndarray:
        y = x[..., np.where(new, 0, source)].copy()
        y[..., new] = filler
        return y

    state.numbers = moved(state.numbers, fresh_numbers)
    state.rows = moved(state.rows, fresh_rows)
    state.tokens = moved(state.tokens, state.rule.mask_id)
    state.masked = moved(state.masked, 1).astype(bool)
    assert state.filled_at is not None
    state.filled_at = moved(state.filled_at, -1)
    state.written = None
    return canvas


def _stray_prompt_slots(canvas: Canvas, mask_embed: Tensor) -> list[list[int]]:
    """Slots (negative numbers) of prompt rows that the published rule takes for masked: equal to the mask embedding."""
    close = ((canvas.embeds - mask_embed).abs() < 1e-5).all(-1).cpu()
    return [[int(r) - p for r in close[b, :p].nonzero()[:, 0]] for b, p in enumerate(canvas.prompt_length)]
