"""What a replay shows: one sample's denoising as frames, read from a trace. Knows no terminal and no picture."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from probe.compare_steps import filled_slots
from probe.errors import ProbeError
from probe.site import Fate, Role
from probe.trace import Trace

LEVELS = "▁▂▃▄▅▆▇█"
OPEN = "░"
SPECIAL = "·"
_LONGEST = 12  # characters of a token; longer ones are cut


class SlotState(StrEnum):
    """What a slot of the answer is at one step."""

    OPEN = "open"
    NEW = "new"
    CHANGED = "changed"
    FILLED = "filled"


@dataclass(frozen=True)
class Slot:
    """One slot of the answer after a step. `text` is the token as it is read, with its leading blank if it begins a
    word; `special` marks tokens that are no text, such as the end of the answer. `confidence` is, of an open slot,
    that of its best token at this step; of a filled one that of the step that filled it; NaN if unknown."""

    state: SlotState
    token: int
    text: str
    confidence: float
    special: bool = False


@dataclass(frozen=True, eq=False)
class Frame:
    """One step of a sample, with what all steps share.

    `widths` are the columns that each slot needs over all steps, `gaps` says before which of them a word begins, and
    `nominal_step` where the step stands in the schedule. `visual_alive (layer,)` counts visual tokens in each layer's
    attention; `fates` says what became of each visual token at the last layer, `(visual,)`, and `box (visual, 4)`
    where it lies in its picture (NaN: nowhere). Arrays are empty where the trace does not hold them.
    """

    step: int
    n_steps: int
    nominal_step: int
    block: int
    slots: tuple[Slot, ...]
    widths: tuple[int, ...]
    gaps: tuple[bool, ...]
    visual_alive: tuple[int, ...]
    n_visual: int
    fates: np.ndarray
    box: np.ndarray
    title: str
    question: str
    references: tuple[str, ...]
    prediction: str
    score: float
    picture: bytes | None

    @property
    def n_open(self) -> int:
        """How many slots are still masked."""
        return sum(s.state is SlotState.OPEN for s in self.slots)

    @property
    def n_new(self) -> int:
        """How many slots this step wrote."""
        return sum(s.state in (SlotState.NEW, SlotState.CHANGED) for s in self.slots)

    @property
    def answer(self) -> str:
        """The answer so far, up to its end if that is known; open slots as blocks."""
        end = next((p for p, s in enumerate(self.slots) if s.special and s.state is not SlotState.OPEN), None)
        text = "".join(
            (" " if gap else "") + OPEN if s.state is SlotState.OPEN else s.text
            for s, gap in zip(self.slots[:end], self.gaps, strict=False)
        )
        return " ".join(text.split())

    @property
    def said(self) -> str:
        """What this step did, in words."""
        last = self.step == self.n_steps - 1
        left = "left masked" if last else "still masked"
        return (
            f"step {self.step + 1} of {self.n_steps}: {self.n_new} written, {self.n_open} of {len(self.slots)} {left}"
        )

    def fate_counts(self) -> dict[str, int]:
        """How many visual tokens have each fate at the last layer; fates that none has are left out."""
        counts = Counter(self.fates[self.fates != 0].tolist())
        return {f.name.lower(): counts[int(f)] for f in Fate if counts[int(f)]}


# -------------------------------------------------------------------- what is shown


def row_of(trace: Trace, sample: int) -> int:
    """The row of a sample, by its number in the data of the run (a shard's rows count otherwise)."""
    numbers = trace.samples.tolist()
    if sample in numbers:
        return int(numbers.index(sample))
    held = f"it has sample {', '.join(map(str, numbers[:8]))}{', ...' if len(numbers) > 8 else ''}"
    raise ProbeError(f"{trace.path.name} has no sample {sample}; {held if numbers else 'it has none'}")


def frames(trace: Trace, row: int) -> list[Frame]:
    """All steps of one row of a trace. Raises `ProbeError` if the sample failed or its tokens were not recorded."""
    if not 0 <= row < trace.n_samples:
        raise ProbeError(f"{trace.path.name} has no row {row}: it holds {trace.n_samples} samples, counted from 0")
    record = trace.record(row)
    here = f"{trace.path.name}: sample {record.sample}"
    if record.failed:
        raise ProbeError(f"{here} failed and has no steps to replay: {record.failed}")
    lacking = [n for n in ("token", "commit_step") if n not in record.arrays]
    if lacking:
        raise ProbeError(f"{here} did not record `{lacking[0]}`, which a replay shows; choose a sample that did")
    token, commit = (np.asarray(record.arrays[n]) for n in ("token", "commit_step"))
    if not token.size:
        raise ProbeError(f"{here} has no denoising step to replay")
    steps, n_slots = token.shape
    filled = filled_slots(token, commit)
    confidence = record.arrays.get("confidence", np.full(token.shape, np.nan))
    words = _words(trace, np.unique(token).tolist())
    slots = [_slots(t, token, filled, confidence, words) for t in range(steps)]
    # where a word begins is taken from the last step, so that nothing moves from step to step
    gaps = tuple(p > 0 and slots[-1][p].text.startswith(" ") for p in range(n_slots))
    widths = tuple(max(len(label_of(step[p])) for step in slots) + 2 + gaps[p] for p in range(n_slots))
    fates, alive = (record.arrays.get(n) for n in ("visual_kept", "visual_tokens"))
    nominal = record.arrays.get("nominal_step", np.arange(steps))
    block = record.arrays.get("block", np.zeros(steps, int))
    box = record.arrays.get("visual_box", np.zeros((0, 4))).copy()
    if "visual_role" in record.arrays and len(box):
        box[record.arrays["visual_role"] == int(Role.NEWLINE)] = np.nan
    head = trace.header
    title = f"{trace.path.name} · sample {record.sample}"
    title += "".join(f" · {part}" for part in (head.recipe_name, Path(head.backbone).name, record.task) if part)
    return [
        Frame(
            step=t,
            n_steps=steps,
            nominal_step=int(nominal[t]),
            block=int(block[t]),
            slots=slots[t],
            widths=widths,
            gaps=gaps,
            visual_alive=() if alive is None else tuple(int(n) for n in alive[t]),
            n_visual=trace.extents(row).get("visual", 0),
            fates=np.zeros(0, int) if fates is None or not fates.size else fates[t, -1],
            box=box,
            title=title + (" · partial file" if trace.partial else ""),
            question=record.question,
            references=record.references,
            prediction=record.prediction,
            score=record.score,
            picture=record.picture,
        )
        for t in range(steps)
    ]


def _slots(
    t: int, token: np.ndarray, filled: np.ndarray, confidence: np.ndarray, words: Callable[[int], tuple[str, bool]]
) -> tuple[Slot, ...]:
    out = []
    for p, value in enumerate(token[t].tolist()):
        if not filled[t, p]:
            out.append(Slot(SlotState.OPEN, value, "", float(confidence[t, p])))
            continue
        same = (token[:t, p] == value) & filled[:t, p]
        since = t if not t or not same[-1] else t - int((~same[::-1]).argmax() if not same.all() else t)
        was = t > 0 and bool(filled[t - 1, p])
        state = SlotState.FILLED if since < t else SlotState.CHANGED if was else SlotState.NEW
        text, special = words(value)
        out.append(Slot(state, value, text, float(confidence[since, p]), special))
    return tuple(out)


def _words(trace: Trace, ids: Sequence[int]) -> Callable[[int], tuple[str, bool]]:
    """The text of each id, and whether it is a special token; numbers, if the tokenizer is not at hand."""
    tokenizer = _tokenizer(trace.header.backbone)
    known: dict[int, tuple[str, bool]] = {}
    for i in ids:
        known[i] = (f" {i}", False) if tokenizer is None or i < 0 else _word(tokenizer, i)
    return known.__getitem__


def _word(tokenizer: Any, i: int) -> tuple[str, bool]:
    added = tokenizer.get_added_tokens_decoder().get(i)
    if added is not None and added.special:
        return added.content, True
    # what the token adds to itself: so a word's beginning has its blank, whatever way the tokenizer marks it
    once, twice = (tokenizer.decode([i] * n, skip_special_tokens=False) for n in (1, 2))
    text = twice[len(once) :] if twice.startswith(once) else once
    return "".join(c if c.isprintable() else "⏎" if c == "\n" else " " for c in text), False


def _tokenizer(backbone: str) -> Any:
    """The tokenizer of a backbone whose files are on this machine, or None. Loads no weights, fetches nothing."""
    from huggingface_hub import try_to_load_from_cache
    from tokenizers import Tokenizer

    from probe.backbones.checkpoint import EMBEDDED

    file = EMBEDDED.get(backbone, Path(backbone).expanduser()) / "tokenizer.json"
    if not file.is_file():
        try:
            cached = try_to_load_from_cache(backbone, "tokenizer.json")
        except ValueError:  # no name of a repository
            cached = None
        if not isinstance(cached, str):
            return None
        file = Path(cached)
    try:
        return Tokenizer.from_file(str(file))
    except Exception:  # tokenizers raises plain Exception for a malformed file; ids can still be shown
        return None


def label_of(slot: Slot) -> str:
    """What stands in a slot's cell."""
    if slot.state is SlotState.OPEN:
        return OPEN
    text = SPECIAL if slot.special else slot.text.strip() or "␣"
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def level_of(confidence: float) -> str:
    """The bar of a confidence; blank where it is not known."""
    if math.isnan(confidence):
        return " "
    return LEVELS[min(len(LEVELS) - 1, max(0, int(confidence * len(LEVELS))))]


def grid_of(frame: Frame) -> np.ndarray | None:
    """`(row, column)` fates of the finest view's tokens; 0 where none lies; None if they lie in no grid."""
    if not len(frame.box) or len(frame.box) != len(frame.fates):
        return None
    seen = ~np.isnan(frame.box).any(1)
    if not seen.any():
        return None
    size = frame.box[:, 2:] - frame.box[:, :2]
    area = size.prod(1)
    fine = seen & (area <= area[seen].min() * 1.5)
    step = np.median(size[fine], axis=0)
    centre = (frame.box[fine, :2] + frame.box[fine, 2:]) / 2
    places = np.floor(centre / step).astype(int)
    if (places < 0).any() or (places > 256).any():
        return None
    grid = np.zeros((int(places[:, 1].max()) + 1, int(places[:, 0].max()) + 1), int)
    grid[places[:, 1], places[:, 0]] = frame.fates[fine]
    return grid


MARKS = {SlotState.NEW: "[]", SlotState.CHANGED: "<>"}
"""What stands around a token that is new, or changed."""


def broken_lines(widths: Sequence[int], width: int) -> list[list[int]]:
    """Places of the slots on each line."""
    lines: list[list[int]] = [[]]
    used = 0
    for p, size in enumerate(widths):
        if lines[-1] and used + size > width:
            lines.append([])
            used = 0
        lines[-1].append(p)
        used += size
    return lines
