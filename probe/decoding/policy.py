"""What a decoding policy sees and says. The loop runs one pass per `Ask`; policies decide, the loop carries out.

Three kinds of policy, each a small class whose keyword settings a recipe can write:

- *unmasking* (`unmaskings`): which slots are decoded next, and what a pass commits;
- *caching* (`cachings`): which rows a pass computes, and which it takes from stored keys and values;
- *length* (`lengths`): whether slots come, go, or are filled at once.

A policy is added by decorating its class, here or in an installed package or a `--plugin` file:

    @unmaskings.register
    @dataclass(frozen=True, kw_only=True)
    class greedy(Confidence):
        '''One token per pass, ...'''

Arrays of the state are on the host: the loop brings over tokens once per pass, and nothing else waits for the device.
*Columns* number the slots as they stand now; slot *numbers* name them (0 is the first generated one, negative ones are
prompt rows that look masked).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from probe.decoding import stop
from probe.decoding.draw import Draw
from probe.site import Phase

if TYPE_CHECKING:
    from probe.decoding.rule import Rule


@dataclass(frozen=True)
class Ask:
    """One pass that an unmasking policy wants.

    `columns (c,)` are the slots whose logits it needs; `eligible (batch, c)` says which of them may be committed;
    `counts[b]` what its schedule asks for; `active[b]` whether the sample still decodes. `window` is the block being
    decoded, as columns [low, high). `absent (slots,)` leaves slots out of the sequence of this pass.
    """

    columns: np.ndarray
    eligible: np.ndarray
    counts: Sequence[int]
    active: Sequence[bool]
    step: int
    window: tuple[int, int]
    block: int = 0
    step_in_block: int = 0
    phase: Phase = Phase.DENOISE
    absent: np.ndarray | None = None
    show: Tensor | None = None
    """`(batch, c)` int64: tokens that stand at the columns in this pass though the slots stay masked (models that are
    trained on noise tokens instead of masks)."""
    previous: Tensor | None = None
    """`(batch, c, vocabulary)`: logits of an earlier pass that this one is conditioned on (`Backbone.condition`)."""
    shadow: bool = False
    """Also run a copy of the window, all masks, that no real row sees and that is blind to the slot it stands for; its
    logits follow those of `columns` (WINO's verification)."""


@dataclass(frozen=True)
class Decision:
    """What a pass comes to, all `(batch, c)` over the ask's columns.

    `candidate` int64, its `confidence` float64, the `score` that ranked it, `commit` bool. `remask` masks filled slots
    again.
    """

    candidate: Tensor
    confidence: Tensor
    score: Tensor
    commit: Tensor
    remask: Tensor | None = None


@dataclass(frozen=True)
class Delta:
    """Which rows a pass computes anew where every layer keeps what it adds to each row (dLLM-Cache).

    `prompt`, `answer`: all rows of that part; where not `answer`, the share `ratio` of its rows whose values turned
    most, layer by layer. The other rows get what the layer added to them when they were last computed.
    """

    prompt: bool
    answer: bool
    ratio: float = 0.0

    @property
    def whole(self) -> bool:
        """Whether every row is computed."""
        return self.prompt and self.answer


@dataclass(frozen=True)
class Work:
    """Which rows a pass computes, and whether stored keys and values stand in for the others.

    `prompt`: all its rows, none, or the last one. `slots`: columns `(slots,)` or `(batch, slots)` bool; None: all that
    are not absent. `suffix`: whether the fixed suffix is computed. `cached`: keys and values of computed rows are
    stored, and those of other stored rows are read; with `refresh` the store is emptied first. `evict` says, layer by
    layer once its attention has run, which columns outside the block stay stored: from one sample's queries of the
    block `(1, head, row, size)` and keys of the other columns `(1, key head, column, size)`, both rotated, their
    indices `(1, kept)`. `delta`: every layer stores what it adds instead.
    """

    prompt: Literal["all", "none", "last"] = "all"
    slots: np.ndarray | None = None
    suffix: bool = True
    cached: bool = False
    refresh: bool = False
    phase: Phase = Phase.DENOISE
    evict: Callable[[Tensor, Tensor], Tensor] | None = None
    delta: Delta | None = None

    @property
    def partial(self) -> bool:
        """Whether some rows come from what earlier passes stored."""
        return (self.cached and not self.refresh) or (self.delta is not None and not self.delta.whole)


@dataclass(frozen=True)
class Change:
    """What a length policy does after a pass (batch of one; columns as before the change).

    `insert`: (column, count) pairs, `count` masked slots before that column (the number of slots: at the end).
    `delete`: columns to remove. `fill`: column, as it is after the change, to token. `finish`: nothing is decoded after
    this pass.
    """

    insert: tuple[tuple[int, int], ...] = ()
    delete: tuple[int, ...] = ()
    fill: dict[int, int] = field(default_factory=dict)
    finish: bool = False


@dataclass
class State:
    """One generation of a batch, as policies see it. Only the loop changes it.

    `numbers (slots,)` slot numbers; `rows (batch, slots)` the canvas row (numbered when it was made) of every slot;
    `tokens (batch, slots)` int64; `masked`, `written` (in the last pass) `(batch, slots)` bool; `filled_at` the pass in
    which each slot was last filled (-1: given, or open). A policy sets `finished` to end the run after the pass.
    `memory` is the policies' own.
    """

    rule: Rule
    prompt_length: tuple[int, ...]
    numbers: np.ndarray
    rows: np.ndarray
    tokens: np.ndarray
    masked: np.ndarray
    draw: Sequence[Draw]
    device: torch.device
    alive: tuple[int, ...] = ()
    """Rows of each sample's whole sequence in the last pass (the published noise is drawn over all of them)."""
    places: Tensor | None = None
    """`(batch, c)` where the ask's columns stood in that sequence."""
    stop_at: list[int | None] = field(default_factory=list)
    passes: int = 0
    shift: int = 0
    """The row p - shift predicts slot p."""
    written: np.ndarray | None = None
    filled_at: np.ndarray | None = None
    finished: bool = False
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        """Samples."""
        return len(self.prompt_length)

    @property
    def slots(self) -> int:
        """Slots, masked-looking prompt rows included."""
        return len(self.numbers)

    @property
    def first(self) -> int:
        """The column of the first generated slot."""
        return int((self.numbers < 0).sum())

    def ask(
        self,
        eligible: np.ndarray,
        counts: Sequence[int],
        *,
        step: int,
        window: tuple[int, int],
        active: Sequence[bool] | None = None,
        columns: np.ndarray | None = None,
        **more: Any,
    ) -> Ask:
        """An `Ask` from eligibility over all slots `(batch, slots)`; logits for just those (or more `columns`)."""
        at = np.flatnonzero(eligible.any(0)) if columns is None else columns
        return Ask(
            columns=at,
            eligible=eligible[:, at],
            counts=list(counts),
            active=list(active) if active is not None else [True] * self.batch,
            step=step,
            window=window,
            **more,
        )


class Unmasking:
    """Which slots are decoded when. Subclasses say `passes` and `decide`."""

    whole: str | None = None
    """Why every pass must compute every row, where it must; no cache goes with it then."""
    needs_shift: str | None = None
    """Why it fits only backbones whose row predicts the next slot, where it does."""
    decodes_prompt = False
    """Whether prompt rows that equal the mask embedding are decoded as slots (LLaDA-V's published rule does so)."""
    by_blocks = False
    """Whether blocks behind the one being decoded are not there yet, and those before it are done."""

    def check(self, rule: Rule) -> None:
        """Raise `ProbeError` for settings that the rule cannot run with."""

    def nominal_steps(self, rule: Rule) -> int:
        """Steps that the settings ask for; adaptive policies may take fewer or more."""
        return rule.steps

    def passes(self, state: State) -> Iterator[Ask]:
        """Yield what to run next until nothing is left to decode. The state moves on between two asks."""
        raise TypeError(f"{type(self).__name__} must say which passes it wants")

    def decide(self, state: State, ask: Ask, logits: Tensor) -> Decision:
        """What the pass comes to, from `logits (batch, c, vocabulary)` float32 of the ask's columns."""
        raise TypeError(f"{type(self).__name__} must say what a pass commits")

    def fill(self, state: State, ask: Ask, decision: Decision) -> dict[tuple[int, int], int]:
        """Further slots to write in this pass, {(sample, column): token}, once the commits stand in the state."""
        return {}

    def stop_at(self, ids: Sequence[int], patterns: Sequence[Sequence[int]], known: int | None) -> int | None:
        """Where an answer ends, once a pass is done; `known` is what was found before. As LLaDA-V looks for it."""
        return stop.search(ids, patterns, known)

    def first_token(self, state: State, ask: Ask, logits: Tensor) -> Decision:
        """What a prefill commits where the logits of its last row are those of the first slot: the arg-max."""
        candidate = logits.argmax(-1)
        sure = logits.double().softmax(-1).gather(-1, candidate[..., None])[..., 0]
        return Decision(candidate, sure, sure, torch.from_numpy(ask.eligible).to(logits.device))


class Caching:
    """Which rows a pass computes. This one: all of them, every time."""

    exact = True
    """Whether the logits are those of computing every row under the same attention mask."""
    stores = False
    """Whether rows of earlier passes are used again."""
    needs_causal: str | None = None
    """Why it fits only models in which no row sees what follows it, where it does."""
    renews = True
    """Whether `refreshed` gives a plan that computes every row."""

    def check(self, rule: Rule, shift: int) -> None:
        """Raise `ProbeError` for rules or backbones that this cache does not fit."""

    def prefill(self, state: State, shift: int) -> Ask | None:
        """A pass before the first step, if the cache wants one."""
        return None

    def plan(self, state: State, ask: Ask) -> Work:
        """What to compute for this ask."""
        return Work()

    def refreshed(self, state: State, ask: Ask) -> Work | None:
        """The plan where a probe needs every row in this pass; None when this cache cannot give them."""
        return Work()

    def after(self, state: State, ask: Ask, decision: Decision) -> None:
        """Told what was committed."""


class Length:
    """Whether slots come or go. This one: never."""

    def fill(self, state: State, ask: Ask, decision: Decision) -> dict[tuple[int, int], int]:
        """Slots to write in this pass beside the commits, {(sample, column): token}; the commits stand in the state."""
        return {}

    def after(self, state: State, ask: Ask, logits: Tensor, decision: Decision) -> Change | None:
        """What to change after a pass; `logits` as in `Unmasking.decide`. The state already holds the commits."""
        return None
