"""One sample's denoising, step by step: in the terminal, forwards and backwards, or as an animated picture.

`frames` reads everything that is shown; `render_frame` draws one step for a terminal, `save_gif` all of them. Nothing
is said by colour alone: open slots are blocks, new tokens stand in brackets, confidence is the height of a bar.
"""

from __future__ import annotations

import io
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from probe.compare_steps import filled_slots
from probe.errors import ProbeError
from probe.site import Fate, Role
from probe.trace import Trace
from probe.views.picture import DIM, FRAME, INK, PANEL, PAPER, RIGHT, WRONG, _font, _wrapped, kept_panel

LEVELS = "▁▂▃▄▅▆▇█"
OPEN = "░"
SPECIAL = "·"
_LONGEST = 12  # characters of a token; longer ones are cut
_MAP = 16  # most rows of the map of visual tokens
_SECONDS = 0.6  # between two steps while playing
_GLYPHS = {Fate.KEPT: "█", Fate.DROPPED: "·", Fate.MERGED: "+", Fate.WITHDRAWN: "-", Fate.MASKED: "x"}


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
    widths = tuple(max(len(_label(step[p])) for step in slots) + 2 + gaps[p] for p in range(n_slots))
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


def _label(slot: Slot) -> str:
    """What stands in a slot's cell."""
    if slot.state is SlotState.OPEN:
        return OPEN
    text = SPECIAL if slot.special else slot.text.strip() or "␣"
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _level(confidence: float) -> str:
    if math.isnan(confidence):
        return " "
    return LEVELS[min(len(LEVELS) - 1, max(0, int(confidence * len(LEVELS))))]


# -------------------------------------------------------------------- in the terminal


def render_frame(frame: Frame, *, width: int = 80, height: int | None = None) -> RenderableType:
    """One step as text. With a `height` that is too small, the map goes first, then the bars of confidence."""
    head = [Text(frame.title, style="bold", no_wrap=True, overflow="ellipsis"), _progress(frame, width), Text()]
    told = [_pair("question", frame.question), _pair("answer", frame.answer or "(nothing yet)")]
    tail = [Text(), *told]
    if frame.step == frame.n_steps - 1:
        tail += _result(frame)
    visual = _visual(frame, width)
    cells, keys = _cells(frame, width, bars=True), _legend(frame)
    lines = [*head, *cells, keys, Text(), *visual, *_map(frame, width), *tail]
    if height is not None and _height(lines, width) > height:
        lines = [*head, *cells, keys, Text(), *visual, *tail]
    if height is not None and _height(lines, width) > height:
        tail = [_cut(line, 2 * width - 16) for line in tail]  # two lines, also where words leave them short
        cells = _cells(frame, width, bars=False)
        room = height - _height([*head, keys, Text(), *visual, *tail], width)
        lines = [*head, *_around_new(frame, cells, width, room), keys, Text(), *visual, *tail]
    return Group(*lines)


def _cut(text: Text, size: int) -> Text:
    """The beginning of a text that is too long."""
    short = text.copy()
    short.truncate(size, overflow="ellipsis")
    return short


def _height(lines: Sequence[Text], width: int) -> int:
    """Lines of the terminal that texts take when they are wrapped."""
    console = Console(width=width, file=io.StringIO())
    return sum(1 if line.no_wrap else len(line.wrap(console, width)) for line in lines)


def _pair(name: str, text: str, style: str = "") -> Text:
    return Text.assemble((f"{name:<11}", "dim"), (text, style))


def _progress(frame: Frame, width: int) -> Text:
    n, total = frame.n_open, len(frame.slots)
    extra = [f"{frame.nominal_step + 1} in the schedule"] if frame.nominal_step != frame.step else []
    extra += [f"block {frame.block + 1}"] if frame.block else []
    told = f"  ({', '.join(extra)})" if extra else ""
    size = max(8, min(30, width - len(frame.said) - len(told) - 3))
    left = math.ceil(size * n / total)
    return Text.assemble((frame.said, "bold"), told, "  ", (OPEN * left, "dim"), ("█" * (size - left), "green"))


_STYLES = {
    SlotState.OPEN: "dim",
    SlotState.NEW: "bold black on #e69f00",
    SlotState.CHANGED: "bold black on #56b4e9",
    SlotState.FILLED: "",
}
_MARKS = {SlotState.NEW: "[]", SlotState.CHANGED: "<>"}


def _cells(frame: Frame, width: int, *, bars: bool) -> list[Text]:
    """The slots, as many to a line as fit; below each its confidence."""
    out = []
    for places in _broken(frame.widths, width):
        words, levels = Text(), Text(style="dim")
        for p in places:
            slot, size = frame.slots[p], frame.widths[p]
            gap = " " * frame.gaps[p]
            marks = _MARKS.get(slot.state, "  ")
            words.append(gap).append(f"{marks[0]}{_label(slot)}{marks[1]}".center(size - len(gap)), _STYLES[slot.state])
            bright = "bold" if slot.state in _MARKS else ""
            levels.append(gap).append(_level(slot.confidence).center(size - len(gap)), bright)
        out += [words, levels] if bars else [words]
    return out


def _broken(widths: Sequence[int], width: int) -> list[list[int]]:
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


def _around_new(frame: Frame, lines: list[Text], width: int, room: int) -> list[Text]:
    """As many of the lines as there is room for, with the first slot that this step wrote among them."""
    if len(lines) <= room:
        return lines
    room = max(1, room - 1)  # a line says what part this is
    new = next((p for p, s in enumerate(frame.slots) if s.state in _MARKS), 0)
    at = next((i for i, places in enumerate(_broken(frame.widths, width)) if new in places), 0)
    start = max(0, min(at - room // 2, len(lines) - room))
    part = f"(lines {start + 1} to {start + room} of {len(lines)})"
    return [*lines[start : start + room], Text(part, style="dim")]


def _legend(frame: Frame) -> Text:
    parts = [f"{OPEN} masked", "[ ] new", f"{LEVELS[0]} to {LEVELS[-1]} confidence 0 to 1"]
    if any(s.special for s in frame.slots):
        parts.append(f"{SPECIAL} end of answer")
    if any(s.state is SlotState.CHANGED for s in frame.slots):
        parts.append("< > rewritten")
    return Text("   ".join(parts), style="dim")


def _visual(frame: Frame, width: int) -> list[Text]:
    """Visual tokens by layer, and where they went."""
    if not frame.n_visual:
        return [_pair("visual", "this sample has no visual tokens")]
    lines = []
    if frame.visual_alive:
        bars = Text.assemble(("visual     ", "dim"))
        for n in frame.visual_alive:
            bars.append(_level(n / frame.n_visual - 1e-9) if n > 0 else "_", "green")
        low, high = min(frame.visual_alive), max(frame.visual_alive)
        share = f"{low}" if low == high else f"{low} to {high}"
        last = len(frame.visual_alive) - 1
        lines.append(bars.append(f"  layers 0..{last}: {share} of {frame.n_visual} tokens are attended to"))
    fates = frame.fate_counts()
    if fates:
        told = ", ".join(f"{n} {name}" for name, n in fates.items())
        lines.append(_pair("went", f"{told} (at the last layer)"))
    return lines


def _map(frame: Frame, width: int) -> list[Text]:
    """The finest view's tokens where they lie in the picture, with a glyph for each fate."""
    grid = _grid(frame)
    if grid is None or grid.shape[0] > _MAP or 2 * grid.shape[1] + 11 > width:
        return []
    lines = []
    for r, row in enumerate(grid):
        line = Text.assemble(("picture    " if r == 0 else " " * 11, "dim"))
        for fate in row.tolist():
            kept = fate == int(Fate.KEPT)
            line.append((_GLYPHS[Fate(fate)] if fate else " ") * 2, "green" if kept else "dim")
        lines.append(line)
    seen = [f for f in Fate if (grid == int(f)).any()]
    told = "   ".join(f"{_GLYPHS[f] * 2} {f.name.lower()} ({(grid == int(f)).sum()} of the finest view)" for f in seen)
    return [*lines, Text(" " * 11 + told, style="dim")]


def _grid(frame: Frame) -> np.ndarray | None:
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


def _result(frame: Frame) -> list[Text]:
    score = "" if math.isnan(frame.score) else f"  (score {frame.score:.3f})"
    lines = [_pair("predicted", f"{frame.prediction or '(nothing)'}{score}", "bold")]
    if frame.references:
        more = f"  (or {len(frame.references) - 1} others)" if len(frame.references) > 1 else ""
        lines.append(_pair("right", frame.references[0] + more))
    return lines


# -------------------------------------------------------------------- keys


@dataclass
class Player:
    """Which step is shown, and whether it plays by itself. Knows keys, not terminals."""

    count: int
    at: int = 0
    playing: bool = False
    over: bool = False

    def press(self, key: str) -> None:
        """`right`/`n`, `left`/`p`, `home`, `end`, `space`, `q`; others do nothing."""
        moves = {"right": 1, "n": 1, "left": -1, "p": -1}
        if key in moves:
            self.at = min(self.count - 1, max(0, self.at + moves[key]))
            self.playing = False
        elif key in ("home", "end"):
            self.at = 0 if key == "home" else self.count - 1
            self.playing = False
        elif key == "space":
            self.playing = not self.playing
            if self.playing and self.at == self.count - 1:
                self.at = 0
        elif key == "q":
            self.over = True

    def tick(self) -> None:
        """Time has passed: the next step if it plays, which ends at the last one."""
        if self.playing:
            self.at = min(self.count - 1, self.at + 1)
            self.playing = self.at < self.count - 1


_ESCAPES = {
    "[C": "right", "OC": "right", "[D": "left", "OD": "left", "[H": "home", "OH": "home", "[1~": "home", "[7~": "home",
    "[F": "end", "OF": "end", "[4~": "end", "[8~": "end",
}  # fmt: skip
_WINDOWS = {"M": "right", "K": "left", "G": "home", "O": "end"}


def key_of(typed: str) -> str:
    """The name of a key from what a terminal sends for it; an escape alone, Ctrl-C and Ctrl-D end the replay."""
    if typed.startswith("\x1b"):
        return _ESCAPES.get(typed[1:], "" if len(typed) > 1 else "q")
    return {" ": "space", "\x03": "q", "\x04": "q", "": "q"}.get(typed, typed.lower())


@contextmanager
def _keys() -> Iterator[Callable[[float | None], str | None]]:
    """A function that waits so many seconds (None: for ever) for a key; None if none came."""
    if sys.platform == "win32":
        yield _windows_key
        return
    import select
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)

    def wait(seconds: float | None) -> str | None:
        if not select.select([descriptor], [], [], seconds)[0]:
            return None
        typed = os.read(descriptor, 1)
        # the rest of an escape sequence comes at once; several keys typed ahead must stay apart
        while typed[:1] == b"\x1b" and select.select([descriptor], [], [], 0.03)[0]:
            typed += os.read(descriptor, 1)
            if len(typed) > 2 and (typed[-1:].isalpha() or typed[-1:] == b"~"):
                break
        return key_of(typed.decode("latin-1"))

    try:
        tty.setcbreak(descriptor)
        yield wait
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _windows_key(seconds: float | None) -> str | None:
    import time

    console: Any = __import__("msvcrt")  # known on Windows alone
    end = math.inf if seconds is None else time.monotonic() + seconds
    while not console.kbhit():
        if time.monotonic() > end:
            return None
        time.sleep(0.02)
    typed = console.getwch()
    return _WINDOWS.get(console.getwch(), "") if typed in ("\0", "\xe0") else key_of(typed)


def play(trace: Trace, row: int, console: Console) -> None:
    """Replay a sample: with keys on a terminal, else all steps one after another."""
    shown = frames(trace, row)
    if not console.is_terminal or console.is_dumb_terminal or not sys.stdin.isatty():
        for frame in shown:
            console.print(render_frame(frame, width=console.width))
            console.print()
        return
    player = Player(len(shown))

    def screen() -> RenderableType:
        keys = Text("←/p back  →/n on  space plays  home/end  q quits", style="dim")
        if player.playing:
            keys = Text("playing; space stops", style="dim")
        size = console.size
        return Group(render_frame(shown[player.at], width=size.width, height=size.height - 2), Text(), keys)

    with (
        suppress(KeyboardInterrupt),
        _keys() as wait,
        Live(screen(), console=console, screen=True, auto_refresh=False) as live,
    ):
        live.refresh()
        while not player.over:
            key = wait(_SECONDS if player.playing else None)
            if key is None:
                player.tick()
            else:
                player.press(key)
            live.update(screen(), refresh=True)


# -------------------------------------------------------------------- as a picture

_WIDE, _MARGIN = 900, 16
_NEW, _CHANGED, _EMPTY = (230, 159, 0), (86, 180, 233), (226, 226, 230)


def save_gif(trace: Trace, row: int, path: Path) -> Path:
    """All steps as an animated GIF: the picture with the visual tokens that are left, and the answer filling in."""
    shown = frames(trace, row)
    drawn = [draw_frame(f) for f in shown]
    height = max(d.height for d in drawn)
    sheets = []
    for image in drawn:
        sheet = Image.new("RGB", (_WIDE, height), PAPER)
        sheet.paste(image, (0, 0))
        sheets.append(sheet.quantize(192, dither=Image.Dither.NONE))
    pace = [1000 if len(shown) < 6 else 450] * len(shown)
    pace[-1] = 3000
    try:
        sheets[0].save(path, "GIF", save_all=True, append_images=sheets[1:], duration=pace, loop=0, disposal=1)
    except (OSError, ValueError) as error:
        raise ProbeError(f"cannot write {path}: {error}; name a .gif in a folder that is there") from error
    return path


def draw_frame(frame: Frame) -> Image.Image:
    """One step as a picture, `_WIDE` pixels wide and as high as it needs."""
    left = _MARGIN + (PANEL + 2 * _MARGIN if frame.picture else 0)
    room = _WIDE - left - _MARGIN
    sheet = Image.new("RGB", (_WIDE, 4000), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((_MARGIN, 10), frame.title, font=_font(14), fill=DIM)
    y = _draw_picture(sheet, frame) if frame.picture else 0
    x, top = left, 40
    total = len(frame.slots)
    pen.text((x, top), frame.said, font=_font(16), fill=INK)
    done = round(room * (total - frame.n_open) / total)
    pen.rectangle((x, top + 24, x + room, top + 34), fill=_EMPTY)
    if done:
        pen.rectangle((x, top + 24, x + done, top + 34), fill=FRAME)
    bottom = _draw_text(pen, x, top + 48, room, "asked", frame.question, INK)
    bottom = _draw_cells(pen, x, bottom + 6, room, frame)
    if frame.step < frame.n_steps - 1:
        answer = frame.answer.replace(OPEN, "_") or "(nothing)"
        bottom = _draw_text(pen, x, bottom + 8, room, "so far", answer, INK)
    else:
        colour = INK if math.isnan(frame.score) else RIGHT if frame.score >= 0.995 else WRONG
        score = "" if math.isnan(frame.score) else f"  (score {frame.score:.2f})"
        bottom = _draw_text(pen, x, bottom + 8, room, "answer", f"{frame.prediction or '(nothing)'}{score}", colour)
        if frame.references:
            bottom = _draw_text(pen, x, bottom, room, "right", frame.references[0], DIM)
    return sheet.crop((0, 0, _WIDE, max(y, bottom) + _MARGIN))


def _draw_picture(sheet: Image.Image, frame: Frame) -> int:
    """The picture with what is left of its visual tokens, and how many each layer attends to. Returns its bottom."""
    assert frame.picture is not None
    picture = Image.open(io.BytesIO(frame.picture))
    kept = frame.fates == int(Fate.KEPT)
    box = frame.box if len(frame.box) == len(kept) else frame.box[:0]
    panel = kept_panel(picture, box, kept[: len(box)])
    shown = round(PANEL * picture.height / max(picture.size))
    sheet.paste(panel.crop((0, 0, PANEL, shown)), (_MARGIN, 40))
    pen = ImageDraw.Draw(sheet)
    y = 40 + shown + 8
    fates = frame.fate_counts()
    told = ", ".join(f"{n} {name}" for name, n in fates.items()) or "visual tokens: not recorded"
    pen.text((_MARGIN, y), f"visual tokens: {told}" if fates else told, font=_font(13), fill=INK)
    y += 20
    if fates.keys() - {"kept"}:
        pen.text((_MARGIN, y), "greyed: gone; green frames: coarse view's tokens", font=_font(12), fill=DIM)
        y += 18
    if frame.visual_alive and frame.n_visual:
        pen.text((_MARGIN, y), "attended to, by layer:", font=_font(12), fill=DIM)
        y += 18
        step = PANEL / len(frame.visual_alive)
        for i, n in enumerate(frame.visual_alive):
            x0, x1 = _MARGIN + round(i * step), _MARGIN + round((i + 1) * step) - 2
            pen.rectangle((x0, y, max(x0, x1), y + 40), fill=_EMPTY)
            tall = round(40 * n / frame.n_visual)
            if tall:
                pen.rectangle((x0, y + 40 - tall, max(x0, x1), y + 40), fill=FRAME)
            if step >= 30:
                pen.text((x0 + 4, y + 42), str(n), font=_font(12), fill=DIM)
        y += 60
    return y


def _draw_text(
    pen: ImageDraw.ImageDraw, x: int, y: int, room: int, name: str, text: str, colour: tuple[int, int, int]
) -> int:
    font = _font(15)
    pen.text((x, y), name, font=font, fill=DIM)
    for line in _wrapped(pen, text, font, room - 70)[:6]:
        pen.text((x + 70, y), line, font=font, fill=colour)
        y += 21
    return y + 4


def _draw_cells(pen: ImageDraw.ImageDraw, x: int, y: int, room: int, frame: Frame) -> int:
    """The slots as cells with a bar of confidence each. Returns their bottom."""
    font = _font(16)
    sizes = [max(22, 8 * (w - 2 - gap) + 14) + 8 * gap for w, gap in zip(frame.widths, frame.gaps, strict=True)]
    for places in _broken(sizes, room):
        left = x
        for p in places:
            gap = 8 * frame.gaps[p]
            slot, size, left = frame.slots[p], sizes[p] - gap, left + gap
            ground = {SlotState.NEW: _NEW, SlotState.CHANGED: _CHANGED, SlotState.OPEN: _EMPTY}.get(slot.state, PAPER)
            edge = INK if slot.state in _MARKS else _EMPTY
            pen.rectangle((left, y, left + size - 3, y + 26), fill=ground, outline=edge, width=2 if edge == INK else 1)
            if slot.state is not SlotState.OPEN:
                text = _label(slot)
                pen.text((left + (size - 3 - pen.textlength(text, font=font)) / 2, y + 3), text, font=font, fill=INK)
            if not math.isnan(slot.confidence):
                long = round((size - 4) * min(1.0, max(0.0, slot.confidence)))
                pen.rectangle((left, y + 29, left + size - 4, y + 32), fill=_EMPTY)
                pen.rectangle((left, y + 29, left + long, y + 32), fill=DIM)
            left += size
        y += 40
    legend = "grey cell: masked; framed orange cell: written now; bar below: confidence"
    if any(s.special and s.state is not SlotState.OPEN for s in frame.slots):
        legend += f"; {SPECIAL} end of answer"
    pen.text((x, y), legend, font=_font(12), fill=DIM)
    return y + 20


__all__ = ["Frame", "Player", "Slot", "SlotState", "frames", "play", "render_frame", "row_of", "save_gif"]
