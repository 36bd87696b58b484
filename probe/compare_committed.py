"""Why late pruning changes so little: what was committed before the cut, what is guessed without sight, what was kept.

The *cut* of a sample is the nominal step from which a run misses visual tokens. Slots whose final commit came before it
had the whole picture; the others are *at stake*. A *blind* run, from which all visual tokens are withdrawn at the same
cut, tells the slots at stake that the text alone gives from those that the tokens that were left must have given. Pure
functions on arrays; `docs/compare.md` has every share as a formula.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from probe.compare_steps import Side, filled_slots
from probe.intervals import Estimate, ratios

Kind = Literal["all", "content", "end"]
KINDS: tuple[Kind, ...] = ("all", "content", "end")
"""All slots; those before the reference's end of answer; that end and the padding behind it."""
NONE = Estimate()


@dataclass(frozen=True, eq=False)
class Final:
    """How one run of one sample ended, by slot."""

    token: np.ndarray  # (position,) ids, negative where there is no such slot
    filled: np.ndarray  # (position,) whether it holds a token in the end
    last: np.ndarray  # (position,) nominal step of its final commit
    place: np.ndarray  # (position,) where it stands in the answer, -1: nowhere


@dataclass(frozen=True, eq=False)
class Course:
    """One run: of each sample how it ended, the cut (None: nothing was missing), and whether nothing was left then."""

    label: str
    final: Sequence[Final | None]
    cut: Sequence[int | None]
    sightless: Sequence[bool]

    @property
    def is_blind(self) -> bool:
        """Whether some sample has a cut, and no sample has a visual token left from its cut on."""
        cuts = [none for cut, none in zip(self.cut, self.sightless, strict=True) if cut is not None]
        return bool(cuts) and all(cuts)


@dataclass(frozen=True)
class Shares:
    """Shares of the `slots` that the reference filled, with bootstrap intervals over samples.

    committed + agrees + unlike = 1. With a blind run agrees = guessed + kept, and unlike = harmed + lost;
    `saved` = kept / (kept + lost) is the share of what the text alone does not give that the tokens left did.
    """

    slots: int
    committed: Estimate
    agrees: Estimate
    unlike: Estimate
    guessed: Estimate = NONE
    kept: Estimate = NONE
    harmed: Estimate = NONE
    lost: Estimate = NONE
    saved: Estimate = NONE


@dataclass(frozen=True)
class Committed:
    """The decomposition of one run. `cuts` are the nominal steps at which samples were cut, smallest and largest;
    `blind` the label of the blind run of the same cuts, empty if there is none; `strayed` the share of the committed
    slots that differ from the reference all the same (0 if both runs went the same way up to the cut).
    """

    label: str
    blind: str
    cuts: tuple[int, int]
    strayed: float
    shares: Mapping[Kind, Shares]


def final_of(side: Side, place: np.ndarray | None = None) -> Final:
    """The end of a run. A slot's final commit is the last step that wrote it, or that opened or changed it.

    `place (position,)`: where each slot stands in the answer in the end; by default slots stand in their order.
    """
    filled = filled_slots(side.token, side.commit_step) & (side.token >= 0)
    changed = filled.copy()
    changed[1:] &= ~filled[:-1] | (side.token[1:] != side.token[:-1])
    step = np.where(changed, np.arange(len(changed))[:, None], 0).max(0)
    nominal = np.asarray(side.nominal_step)[np.maximum(step, side.commit_step)]
    order = np.arange(side.token.shape[1]) if place is None else place
    return Final(side.token[-1], filled[-1], nominal, order)


def content_of(final: Final, ends: Iterable[int]) -> np.ndarray:
    """`(position,)` whether a slot stands before the first end token of the answer."""
    stops = final.filled & np.isin(final.token, list(ends))
    return np.asarray(final.place < (final.place[stops].min() if stops.any() else np.inf))


def guessed_ends(finals: Iterable[Final | None]) -> frozenset[int]:
    """The token that pads answers, where a trace does not say it: the one that most often ends them.

    None if fewer than two answers end with it, or if another token ever follows it.
    """
    answers = [f.token[f.filled][np.argsort(f.place[f.filled])] for f in finals if f is not None and f.filled.any()]
    counts = Counter(int(a[-1]) for a in answers)
    token, often = counts.most_common(1)[0] if counts else (-1, 0)
    pads = all((a[np.argmax(a == token) :] == token).all() for a in answers if (a == token).any())
    return frozenset({token}) if often > 1 and pads else frozenset()


def counts_of(reference: Final, late: Final, blind: Final | None, cut: int | None, content: np.ndarray) -> np.ndarray:
    """`(kind, 9)` numbers of one sample's slots: compared, committed, strayed, agrees, unlike, guessed, kept, harmed,
    lost. Compared are the slots that the reference filled; one that another run left open is unlike there. Without a
    blind run the last four are 0.
    """
    n = len(reference.token)
    compared, token = reference.filled, _cut(late.token, n, -1)
    there = _cut(late.filled, n, False)
    same = there & (token == reference.token)
    # a slot that either run wrote anew later was not settled at the cut, however early it was filled first
    before = there if cut is None else there & (reference.last < cut) & (_cut(late.last, n, cut) < cut)
    committed, stake = compared & before, compared & ~before
    told = [compared, committed, committed & ~same, stake & same, stake & ~same]
    if blind is None:
        told += [np.zeros(n, bool)] * 4
    else:
        unseen = _cut(blind.filled, n, False) & (_cut(blind.token, n, -1) == reference.token)
        told += [stake & same & unseen, stake & same & ~unseen, stake & ~same & unseen, stake & ~same & ~unseen]
    masks = {"all": np.full(n, True), "content": content, "end": ~content}
    return np.array([[(slots & masks[kind]).sum() for slots in told] for kind in KINDS])


def _cut(values: np.ndarray, n: int, fill: int | bool) -> np.ndarray:
    """The first `n` values, filled up where there are fewer."""
    return np.concatenate([values[:n], np.full(max(0, n - len(values)), fill, values.dtype)])


def shares_of(counts: np.ndarray, *, blind: bool) -> Shares:
    """Shares over samples of one kind's `counts (sample, 9)`: ratios of sums, one set of draws for all of them."""
    whole, committed, _, agrees, unlike, guessed, kept, harmed, lost = counts.T
    parts = [committed, agrees, unlike, *([guessed, kept, harmed, lost] if blind else [])]
    found = ratios(parts, whole)
    saved = ratios([kept], kept + lost) if blind else []
    return Shares(int(whole.sum()), *found, **({"saved": saved[0]} if blind else {}))


def blind_for(late: Course, runs: Sequence[Course]) -> Course | None:
    """The first blind run that was cut where this one was, in every sample."""
    return next((run for run in runs if run.is_blind and list(run.cut) == list(late.cut)), None)


def decompose(reference: Course, runs: Sequence[Course], ends: Iterable[int] = ()) -> tuple[Committed, ...]:
    """The decomposition of every run in which some sample was cut; `ends` are the ids that end an answer."""
    known = frozenset(ends) or guessed_ends(reference.final)
    out = []
    for run in runs:
        cuts = [cut for cut in run.cut if cut is not None]
        if not cuts:
            continue
        blind = blind_for(run, runs)
        rows = []
        for i, (base, own) in enumerate(zip(reference.final, run.final, strict=True)):
            other = None if blind is None else blind.final[i]
            if base is not None and own is not None and (blind is None or other is not None):
                rows.append(counts_of(base, own, other, run.cut[i], content_of(base, known)))
        if not rows:
            continue
        counts = np.array(rows)
        committed, strayed = counts[:, 0, 1].sum(), counts[:, 0, 2].sum()
        shares = {kind: shares_of(counts[:, k], blind=blind is not None) for k, kind in enumerate(KINDS)}
        stray = float(strayed / committed) if committed else 0.0
        out.append(Committed(run.label, "" if blind is None else blind.label, (min(cuts), max(cuts)), stray, shares))
    return tuple(out)
