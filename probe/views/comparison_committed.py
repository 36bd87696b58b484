"""What `probe compare` prints of answers that were settled before the cut, and of those at stake behind it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from rich.console import RenderableType
from rich.text import Text

from probe.compare import Run
from probe.compare_committed import Committed, Kind, Shares
from probe.intervals import Estimate
from probe.views.comparison_parts import explained, grid


def committed_tables(found: Sequence[Committed], runs: Sequence[Run], reference: str) -> Iterable[RenderableType]:
    """Two tables, and what to add where there is no blind run with the same cut."""
    a = reference
    table = grid("committed", "slots", "cut", "number", "before cut", f"after, as {a}", f"after, unlike {a}", left=2)
    for one, kind, shares in _rows(found):
        whole = kind == "all"
        table.add_row(
            one.label if whole else "", kind, _cut(one) if whole else "", str(shares.slots),
            *map(_share, (shares.committed, shares.agrees, shares.unlike)),
        )  # fmt: skip
    yield table
    yield from explained(
        f"slots: that {a} filled; shares in percent, bootstrap intervals over samples",
        f"content, end: before {a}'s end of the answer; that end and the padding behind it",
        "cut: nominal step from which the run misses visual tokens",
        "before cut: their final commit came before it, with the picture whole",
        f"after, as {a}: their final commit came after it, and the token is {a}'s",
    )
    sighted = [one for one in found if one.blind]
    if sighted:
        yield Text()
        table = grid("at stake", "slots", "guessed", "kept", "harmed", "lost", "saved", left=2)
        for one, kind, shares in _rows(sighted):
            table.add_row(
                f"{one.label} ({one.blind})" if kind == "all" else "", kind,
                *map(_share, (shares.guessed, shares.kept, shares.harmed, shares.lost, shares.saved)),
            )  # fmt: skip
        yield table
        blind = ", ".join(dict.fromkeys(one.blind for one in sighted))
        yield from explained(
            f"({blind}): the blind run: no visual token at all from the same cut on",
            f"guessed: after the cut, and {a}'s token in the blind run too: the text tells it",
            f"kept: {a}'s token, in the blind run not: restored with the tokens left",
            f"harmed: not {a}'s token, in the blind run it is: misled by the tokens left",
            f"lost: {a}'s token in neither",
            "saved: kept / (kept + lost), of what the text alone does not tell",
        )
    early = [one for one in found if one.early]
    if early:
        yield Text()
        table = grid("restored", "slots", "gain", "kept", "seen", "context", left=2)
        for one, kind, shares in _rows(early):
            table.add_row(
                f"{one.label} ({one.early})" if kind == "all" else "", kind, _share(shares.gain, "+"),
                *map(_share, (shares.kept, shares.seen, shares.context)),
            )  # fmt: skip
        yield table
        zero = ", ".join(dict.fromkeys(one.early for one in early))
        yield from explained(
            f"({zero}): the same pruner from the first step on",
            f"gain: slots at stake with {a}'s token, less those that have it in {zero}",
            f"seen: kept, and {a}'s token in {zero} too: the tokens left show it",
            f"context: kept, in {zero} not: it took what was committed before the cut",
        )
    yield from _wanted([one for one in found if not one.blind], runs)


def _rows(found: Sequence[Committed]) -> Iterable[tuple[Committed, Kind, Shares]]:
    for one in found:
        for kind, shares in one.shares.items():
            if shares.slots:
                yield one, kind, shares


def _share(estimate: Estimate, sign: str = "") -> str:
    """`12 [10,15]`, in percent; the interval only where it has a width."""
    if math.isnan(estimate.value):
        return "-"
    value, *ends = (f"{100 * x + 0.0:{sign}.0f}" for x in (estimate.value, estimate.low, estimate.high))
    return value if set(ends) <= {value, "nan"} else f"{value} [{','.join(ends)}]"


def _cut(one: Committed) -> str:
    first, last = one.cuts
    return str(first) if first == last else f"{first}-{last}"


def _wanted(bare: Sequence[Committed], runs: Sequence[Run]) -> Iterable[RenderableType]:
    """The runs without a blind run, by the start that one would need."""
    dials = {run.label: run.dials for run in runs}
    by_start: dict[str, list[str]] = {}
    for one in bare:
        first, last = one.cuts
        start = str(dials[one.label].get("start", first)) if first == last else ""
        by_start.setdefault(start, []).append(one.label)
    for start, labels in by_start.items():
        names = ", ".join(labels)
        words = (
            f"{names}: none of these runs is blind from the same cut on. To part what the text tells from what the "
            f"tokens left tell, add a run of `prune/blind --set start={start}` on the same data."
            if start
            else f"{names}: cut at steps that differ by sample; a run of `prune/blind` has one cut for all"
        )
        yield Text()
        yield Text(words)
