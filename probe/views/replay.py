"""One sample's denoising, step by step, in the terminal: forwards and backwards, by keys.

`render_frame` draws one step. Nothing is said by colour alone: open slots are blocks, new tokens stand in brackets,
confidence is the height of a bar.
"""

from __future__ import annotations

import io
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from probe.site import Fate
from probe.trace import Trace
from probe.views.replay_frames import (
    LEVELS,
    MARKS,
    OPEN,
    SPECIAL,
    Frame,
    SlotState,
    broken_lines,
    frames,
    grid_of,
    label_of,
    level_of,
)

_MAP = 16  # most rows of the map of visual tokens
_SECONDS = 0.6  # between two steps while playing
_GLYPHS = {
    Fate.KEPT: "█",
    Fate.DROPPED: "·",
    Fate.MERGED: "+",
    Fate.WITHDRAWN: "-",
    Fate.MASKED: "x",
    Fate.SKIPPED: "~",
    Fate.EVICTED: "o",
}


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


def _cells(frame: Frame, width: int, *, bars: bool) -> list[Text]:
    """The slots, as many to a line as fit; below each its confidence."""
    out = []
    for places in broken_lines(frame.widths, width):
        words, levels = Text(), Text(style="dim")
        for p in places:
            slot, size = frame.slots[p], frame.widths[p]
            gap = " " * frame.gaps[p]
            marks = MARKS.get(slot.state, "  ")
            words.append(gap).append(
                f"{marks[0]}{label_of(slot)}{marks[1]}".center(size - len(gap)), _STYLES[slot.state]
            )
            bright = "bold" if slot.state in MARKS else ""
            levels.append(gap).append(level_of(slot.confidence).center(size - len(gap)), bright)
        out += [words, levels] if bars else [words]
    return out


def _around_new(frame: Frame, lines: list[Text], width: int, room: int) -> list[Text]:
    """As many of the lines as there is room for, with the first slot that this step wrote among them."""
    if len(lines) <= room:
        return lines
    room = max(1, room - 1)  # a line says what part this is
    new = next((p for p, s in enumerate(frame.slots) if s.state in MARKS), 0)
    at = next((i for i, places in enumerate(broken_lines(frame.widths, width)) if new in places), 0)
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
            bars.append(level_of(n / frame.n_visual - 1e-9) if n > 0 else "_", "green")
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
    grid = grid_of(frame)
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
