"""Why late pruning changes so little: what was committed before the cut, what is guessed without sight, what was kept.

The *cut* of a sample is the nominal step from which a run misses visual tokens. Slots whose final commit came before it
had the whole picture; the others are *at stake*. A *blind* run, from which all visual tokens are withdrawn at the same
cut, tells the slots at stake that the text alone gives from those that the tokens that were left must have given; an
*early* run, the same pruner from the first step on, tells of these the ones that it took the answer's own context to
give. Pure functions on arrays; `docs/compare.md` has every share as a formula.
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
    `saved` = kept / (kept + lost) is the share of what the text alone does not give that the tokens left did. With an
    early run `gain` is agrees minus the share of the slots at stake that end as the reference's there: the surplus in
    slots. With both, kept = seen + context: what the early run has as well, and what only the late one has.
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
    gain: Estimate = NONE
    seen: Estimate = NONE
    context: Estimate = NONE


@dataclass(frozen=True)
class Committed:
    """The decomposition of one run. `cuts` are the nominal steps at which samples were cut, smallest and largest.

    `blind` is the label of the blind run of the same cuts, `early` that of the same pruner from the first step on; each
    is empty if there is none. `strayed` is the share of the committed slots that differ from the reference all the same
    (0 if both runs went the same way up to the cut).
    """

    label: str
    blind: str
    early: str
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


def counts_of(
    reference: Final,
    late: Final,
    blind: Final | None,
    cut: int | None,
    content: np.ndarray,
    early: Final | None = None,
) -> np.ndarray:
    """`(kind, 11)` numbers of one sample's slots: compared, committed, strayed, agrees, unlike, guessed, kept, harmed,
    lost, seen, early (at stake, and the reference's token in the early run). Compared are the slots that the reference
    filled; one that another run left open is unlike there. What needs a run that is not given is 0.
    """
    n = len(reference.token)
    compared, there = reference.filled, _cut(late.filled, n, False)
    same = _alike(late, reference)
    # a slot that either run wrote anew later was not settled at the cut, however early it was filled first
    before = there if cut is None else there & (reference.last < cut) & (_cut(late.last, n, cut) < cut)
    committed, stake = compared & before, compared & ~before
    told = [compared, committed, committed & ~same, stake & same, stake & ~same]
    none = np.zeros(n, bool)
    zero = none if early is None else stake & _alike(early, reference)
    if blind is None:
        told += [none] * 5
    else:
        unseen = _alike(blind, reference)
        kept = stake & same & ~unseen
        told += [stake & same & unseen, kept, stake & ~same & unseen, stake & ~same & ~unseen, kept & zero]
    told += [zero]
    masks = {"all": np.full(n, True), "content": content, "end": ~content}
    return np.array([[(slots & masks[kind]).sum() for slots in told] for kind in KINDS])


def _alike(run: Final, reference: Final) -> np.ndarray:
    """`(position,)` of the reference: whether a run ended with its token there."""
    n = len(reference.token)
    return np.asarray(_cut(run.filled, n, False) & (_cut(run.token, n, -1) == reference.token))


def _cut(values: np.ndarray, n: int, fill: int | bool) -> np.ndarray:
    """The first `n` values, filled up where there are fewer."""
    return np.concatenate([values[:n], np.full(max(0, n - len(values)), fill, values.dtype)])


def shares_of(counts: np.ndarray, *, blind: bool, early: bool = False) -> Shares:
    """Shares over samples of one kind's `counts (sample, 11)`: ratios of sums, one set of draws for all of them."""
    whole, committed, _, agrees, unlike, guessed, kept, harmed, lost, seen, zero = counts.T
    parts = {"committed": committed, "agrees": agrees, "unlike": unlike}
    if blind:
        parts |= {"guessed": guessed, "kept": kept, "harmed": harmed, "lost": lost}
    if early:
        parts |= {"gain": agrees - zero}
    if blind and early:
        parts |= {"seen": seen, "context": kept - seen}
    found = dict(zip(parts, ratios(list(parts.values()), whole), strict=True))
    if blind:
        found |= {"saved": ratios([kept], kept + lost)[0]}
    return Shares(int(whole.sum()), **found)


def blind_for(late: Course, runs: Sequence[Course]) -> Course | None:
    """The first blind run that was cut where this one was, in every sample."""
    return next((run for run in runs if run.is_blind and list(run.cut) == list(late.cut)), None)


def decompose(
    reference: Course, runs: Sequence[Course], ends: Iterable[int] = (), early: Mapping[str, str] | None = None
) -> tuple[Committed, ...]:
    """The decomposition of every run in which some sample was cut.

    `ends` are the ids that end an answer; `early` says of a run's label which run is its pruner from the first step on.
    """
    known, by_label = frozenset(ends) or guessed_ends(reference.final), {run.label: run for run in runs}
    out = []
    for run in runs:
        cuts = [cut for cut in run.cut if cut is not None]
        blind, zero = blind_for(run, runs), by_label.get((early or {}).get(run.label, ""))
        beside = [other for other in (blind, zero) if other is not None]
        rows = []
        for i, (base, own) in enumerate(zip(reference.final, run.final, strict=True)):
            if base is None or own is None or any(other.final[i] is None for other in beside):
                continue
            others = [None if other is None else other.final[i] for other in (blind, zero)]
            rows.append(counts_of(base, own, others[0], run.cut[i], content_of(base, known), others[1]))
        if not rows or not cuts:
            continue
        counts = np.array(rows)
        committed, strayed = counts[:, 0, 1].sum(), counts[:, 0, 2].sum()
        has = {"blind": blind is not None, "early": zero is not None}
        out.append(
            Committed(
                label=run.label,
                blind="" if blind is None else blind.label,
                early="" if zero is None else zero.label,
                cuts=(min(cuts), max(cuts)),
                strayed=float(strayed / committed) if committed else 0.0,
                shares={kind: shares_of(counts[:, k], **has) for k, kind in enumerate(KINDS)},
            )
        )
    return tuple(out)
