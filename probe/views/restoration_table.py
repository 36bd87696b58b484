"""Late pruning over many runs as Markdown and CSV: `probe tables FOLDER --restoration`."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence

from probe.compare_committed import Kind, Shares
from probe.intervals import Estimate
from probe.study.restoration import Late

HEAD = (
    "data", "settings", "pruner", "s", "n", "unpruned", "from 0", "from s", "line", "surplus", "slots 0",
    "slots s", "gain", "before cut", "guessed", "kept", "context", "harmed", "lost", "saved",
)  # fmt: skip
TOLD = (
    "from 0, from s: score in percent of the pruner from the first step on, and from the share s of the steps on",
    "line: s x unpruned + (1 - s) x from 0; surplus: from s - line, and its paired 95 % interval",
    "the rest is percent of the unpruned answer's content slots. slots 0, slots s: those with the unpruned run's token "
    "in the end; gain: of those at stake at the cut those that have it, less those that have it in the run from 0",
    "before cut: committed before the cut; "
    "guessed, kept, harmed, lost: committed after it, with the unpruned run's token in the blind run too, in this one "
    "alone, in the blind run alone, in neither; context: of kept, what the run from 0 has not; saved: kept / (kept + "
    "lost)",
)
_PARTS = ("committed", "agrees", "unlike", "guessed", "kept", "harmed", "lost", "saved", "gain", "seen", "context")


def to_markdown(found: Sequence[Late], *, intervals: bool = False) -> str:
    """A table for each backbone, with what its columns say below the last one."""
    out = []
    for backbone in dict.fromkeys(one.backbone for one in found):
        own = [one for one in found if one.backbone == backbone]
        settings = any(one.settings for one in own)
        columns = [i for i, name in enumerate(HEAD) if settings or name != "settings"]
        words = [_words(one, intervals) for one in own]
        lines = ["| " + " | ".join(HEAD[i] for i in columns) + " |"]
        lines.append("|" + "".join("---|" if HEAD[i] in HEAD[:3] else "---:|" for i in columns))
        lines += ["| " + " | ".join(line[i] for i in columns) + " |" for line in words]
        out += [f"**{backbone}**", "", *lines, ""]
    if any(not one.blind for one in found):
        out += ["- where guessed, kept, harmed and lost are missing there is no blind run with the same cut", ""]
    return "\n".join([*out, *(f"- {told}" for told in TOLD)]) + "\n"


def _words(one: Late, intervals: bool) -> tuple[str, ...]:
    kind: Kind = "content" if one.shares["content"].slots else "all"
    shares = one.shares[kind]
    cells = (shares.committed, shares.guessed, shares.kept, shares.context, shares.harmed, shares.lost, shares.saved)
    return (
        one.data, one.settings, one.pruner, "–" if math.isnan(one.start) else f"{one.start:.0%}", str(one.n),
        *map(_number, (one.unpruned.value, one.zero, one.score.value, one.line)),
        _share(one.surplus, True, "+"), _number(one.alike_zero[kind]), _number(one.alike[kind]),
        _share(shares.gain, True, "+"),
        *(_share(cell, intervals) for cell in cells),
    )  # fmt: skip


def _number(value: float, sign: str = "") -> str:
    return "–" if math.isnan(value) else f"{100 * value + 0.0:{sign}.1f}"


def _share(share: Estimate, intervals: bool, sign: str = "") -> str:
    known = intervals and not math.isnan(share.low)
    return _number(share.value, sign) + (f" [{_number(share.low, sign)}, {_number(share.high, sign)}]" if known else "")


def to_csv(found: Sequence[Late]) -> str:
    """One line per run and kind of slots (all, content, end), from 0 to 1; empty where nothing is known."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    ends = [f"{part}{end}" for part in _PARTS for end in ("", "_low", "_high")]
    writer.writerow(
        ["backbone", "data", "settings", "pruner", "dials", "start", "n", "unpruned", "from_0", "from_s", "line",
         "surplus", "surplus_low", "surplus_high", "slots", "number", "alike_0", "alike_s", *ends]
    )  # fmt: skip
    for one in found:
        surplus = (one.surplus.value, one.surplus.low, one.surplus.high)
        told = (one.start, one.n, one.unpruned.value, one.zero, one.score.value, one.line, *surplus)
        who = (one.backbone, one.data, one.settings, one.pruner, json.dumps(dict(one.dials)))
        for kind, shares in one.shares.items():
            numbers = [one.alike_zero[kind], one.alike[kind], *_values(shares)]
            writer.writerow([*who, *map(_plain, told), kind, shares.slots, *map(_plain, numbers)])
    return buffer.getvalue()


def _values(shares: Shares) -> list[float]:
    found = [getattr(shares, part) for part in _PARTS]
    return [value for share in found for value in (share.value, share.low, share.high)]


def _plain(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}"
