"""A replay shows what the trace holds, step by step: as text, under keys, and as an animated picture."""

from __future__ import annotations

import io
import math
import os
import re
import select
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console, RenderableType

sys.path.insert(0, str(Path(__file__).parents[1]))

from comparison_traces import MASK, One, write

from probe.errors import ProbeError
from probe.trace import SampleRecord, Trace, TraceHeader, TraceWriter, Variable, open_trace
from probe.views.replay import Player, key_of, play, render_frame
from probe.views.replay_frames import Frame, SlotState, frames, row_of
from probe.views.replay_gif import draw_frame, save_gif

M, NAN = MASK, math.nan
OPEN, NEW, CHANGED, FILLED = SlotState.OPEN, SlotState.NEW, SlotState.CHANGED, SlotState.FILLED
TOKENS = [[5, M, M], [5, 17, M], [6, 17, M]]
CONFIDENCE = [[0.9, 0.3, 0.05], [NAN, 0.6, NAN], [0.7, NAN, NAN]]


def shown(thing: RenderableType, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), no_color=True)
    console.print(thing)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert all(len(line) <= width for line in lines)
    return "\n".join(line.rstrip() for line in lines)


def opened(path: Path, *samples: One, **header: object) -> Trace:
    return open_trace(write(path / "t.trace.h5", dict(enumerate(samples)), **header))  # type: ignore[arg-type]


def test_frames_by_hand(tmp_path: Path) -> None:
    with opened(tmp_path, One(TOKENS, 1, confidence=CONFIDENCE)) as trace:
        got = frames(trace, 0)
    assert [[s.state for s in f.slots] for f in got] == [
        [NEW, OPEN, OPEN],
        [FILLED, NEW, OPEN],
        [CHANGED, FILLED, OPEN],
    ]
    assert [(f.n_open, f.n_new) for f in got] == [(2, 1), (1, 1), (1, 1)]
    sure = [[s.confidence for s in f.slots] for f in got]
    assert np.allclose(sure, [[0.9, 0.3, 0.05], [0.9, 0.6, NAN], [0.7, 0.6, NAN]], equal_nan=True)
    assert [f.visual_alive for f in got] == [(4, 4), (2, 2), (2, 2)]
    assert [f.fate_counts() for f in got] == [{"kept": 4}, {"kept": 2, "dropped": 2}, {"kept": 2, "dropped": 2}]
    assert [s.text for s in got[0].slots] == [" 5", "", ""], "no tokenizer is known, so ids are shown"
    assert got[-1].answer == "6 17░" and got[0].question == "Why?" and got[0].references == ("a b",)


def test_a_step_as_text_needs_no_colour(tmp_path: Path) -> None:
    with opened(tmp_path, One(TOKENS, 1, confidence=CONFIDENCE, score=0.5)) as trace:
        one, two, three = (shown(render_frame(f)) for f in frames(trace, 0))
    assert "step 1 of 3: 1 written, 2 of 3 still masked" in one
    lines = two.splitlines()
    at = next(i for i, line in enumerate(lines) if "[17]" in line)
    assert lines[at].split() == ["5", "[17]", "░"]
    assert lines[at + 1].index("█") == lines[at].index("5"), "confidence 0.9 below its token"
    assert lines[at + 1].split() == ["█", "▅"], "0.6 is the fifth of eight levels; the open slot has none"
    assert "went       2 kept, 2 dropped (at the last layer)" in two and "layers 0..1: 2 of 4 tokens" in two
    # boxes lie left-right, top-bottom; the lower two are gone
    assert "picture    ████\n           ····\n" in two and "·· dropped (2 of the finest view)" in two
    assert "<6>" in three and "rewritten" in three and "1 of 3 left masked" in three
    assert "predicted  a b  (score 0.500)" in three and "right      a b" in three and "predicted" not in two


def test_slots_do_not_move_from_step_to_step(tmp_path: Path) -> None:
    tokens = [[M] * 30 for _ in range(30)]
    for t in range(30):
        for p in range(t + 1):
            tokens[t][p] = 10 ** (p % 5) + p
    with opened(tmp_path, One(tokens, 1)) as trace:
        texts = [shown(render_frame(f)).splitlines()[3:] for f in frames(trace, 0)]
    last = texts[-1]
    for text in texts[:-1]:
        for line, final in zip(text[:4:2], last[:4:2], strict=True):
            for word in re.finditer(r"\d+", line):
                assert final[word.start() : word.end()] == word[0]


def test_words_come_from_the_tokenizer_of_the_backbone(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    from probe.backbones.checkpoint import EMBEDDED

    tokenizer = Tokenizer.from_file(str(EMBEDDED["miniature"] / "tokenizer.json"))
    mask, end = (tokenizer.token_to_id(t) for t in ("<|mdm_mask|>", "<|eot_id|>"))
    ids = tokenizer.encode("FUME green", add_special_tokens=False).ids
    final = [*ids, end, mask]
    with opened(tmp_path, One([[mask] * len(final), final]), backbone="miniature") as trace:
        first, last = frames(trace, 0)
    assert "".join(s.text for s in last.slots[: len(ids)]).split() == ["FUME", "green"]
    assert last.slots[len(ids)].special and last.answer == "FUME green", "what stands behind the end is no answer"
    assert first.n_open == len(final)
    assert " end of answer" in shown(render_frame(last))


def test_a_low_terminal_still_shows_what_is_new(tmp_path: Path) -> None:
    tokens = [[M] * 300 for _ in range(300)]
    for t in range(300):
        tokens[t][: t + 1] = range(1000, 1001 + t)
    with opened(tmp_path, One(tokens, 1, confidence=np.full((300, 300), 0.5).tolist())) as trace:
        frame = frames(trace, 0)[250]
    frame = replace(frame, question="Why so " + "very " * 100 + "long?")
    text = shown(render_frame(frame, width=80, height=200))
    assert "[1250]" in text and "▅" in text
    for height in (30, 24):
        text = shown(render_frame(frame, width=80, height=height))
        assert "[1250]" in text and "(lines " in text and "▅" not in text
        assert len(text.splitlines()) <= height


def test_samples_that_cannot_be_replayed_say_why(tmp_path: Path) -> None:
    with opened(tmp_path, One([[5]]), One([], failed="no such picture")) as trace:
        with pytest.raises(ProbeError, match="t.trace.h5: sample 1 failed and has no steps to replay: no such picture"):
            frames(trace, 1)
        with pytest.raises(ProbeError, match="has no row 2: it holds 2 samples"):
            frames(trace, 2)
        with pytest.raises(ProbeError, match="t.trace.h5 has no sample 7; it has sample 0, 1"):
            row_of(trace, 7)
        assert row_of(trace, 1) == 1
    with TraceWriter(tmp_path / "x.h5", TraceHeader("r", "", "", "toy"), [Variable("x", (), "1", "x")]) as writer:
        writer.write(SampleRecord(3, arrays={"x": np.float64(1)}))
        with open_trace(tmp_path / "x.h5.partial") as trace, pytest.raises(ProbeError, match="did not record `token`"):
            frames(trace, row_of(trace, 3))


def test_one_step_without_pictures(tmp_path: Path) -> None:
    nothing = {"visual_tokens": np.zeros((1, 2)), "visual_kept": np.zeros((1, 2, 0)), "visual_box": np.zeros((0, 4))}
    with opened(tmp_path, One([[5, 6]], more=nothing)) as trace:
        (frame,) = frames(trace, 0)
        text = shown(render_frame(frame))
        assert "this sample has no visual tokens" in text and "0 of 2 left masked" in text
        assert "[5]" in text and "[6]" in text
        with Image.open(save_gif(trace, 0, tmp_path / "o.gif")) as image:
            assert getattr(image, "n_frames", 1) == 1


def test_keys_move_and_play() -> None:
    player = Player(4)
    trail = []
    for key in ("left", "right", "n", "n", "right", "p", "home", "end", "?", "left"):
        player.press(key)
        trail.append(player.at)
    assert trail == [0, 1, 2, 3, 3, 2, 0, 3, 3, 2]
    player.press("space")
    player.tick()
    assert (player.at, player.playing) == (3, False), "playing ends at the last step"
    player.press("space")
    assert (player.at, player.playing) == (0, True), "and begins again from the first"
    player.press("space")
    player.tick()
    assert (player.at, player.playing, player.over) == (0, False, False)
    player.press("q")
    assert player.over


def test_what_terminals_send() -> None:
    sent = {"\x1b[C": "right", "\x1bOD": "left", "\x1b[H": "home", "\x1b[4~": "end", " ": "space", "N": "n", "q": "q",
            "\x03": "q", "\x1b": "q", "\x1b[5~": ""}  # fmt: skip
    assert {typed: key_of(typed) for typed in sent} == sent


def test_a_pipe_gets_all_steps(tmp_path: Path) -> None:
    console = Console(width=80, file=io.StringIO())
    with opened(tmp_path, One(TOKENS, 1)) as trace:
        play(trace, 0, console)
    assert isinstance(console.file, io.StringIO)
    assert re.findall(r"step (\d) of 3", console.file.getvalue()) == ["1", "2", "3"]


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are of Unix")
def test_keys_in_a_terminal(tmp_path: Path) -> None:
    import fcntl
    import pty
    import termios

    with opened(tmp_path, One(TOKENS, 1)) as trace:
        path = trace.path
    code = (
        "import sys; from rich.console import Console; from probe.trace import open_trace\n"
        "from probe.views.replay import play\n"
        "play(open_trace(sys.argv[1]), 0, Console()); print('over')"
    )
    ours, theirs = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    before = termios.tcgetattr(theirs)
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=theirs, stdout=theirs, stderr=theirs,
        cwd=Path(__file__).parents[2], env={**os.environ, "TERM": "xterm-256color"},
    )  # fmt: skip

    def wait_for(words: str) -> str:
        text, end = "", time.monotonic() + 20
        while words not in text and time.monotonic() < end:
            if select.select([ours], [], [], 0.1)[0]:
                text += os.read(ours, 1 << 16).decode(errors="replace")
        assert words in text, text
        return text

    try:
        wait_for("step 1 of 3")
        for typed, words in ((b"\x1b[C", "step 2"), (b"n", "step 3"), (b"\x1b[D", "step 2"), (b"\x1b[F", "step 3"),
                             (b"p", "step 2"), (b"\x1bOH", "step 1"), (b" ", "step 3")):  # fmt: skip
            os.write(ours, typed)
            wait_for(words)
        os.write(ours, b"q")
        wait_for("over")
        assert child.wait(10) == 0
        assert termios.tcgetattr(theirs)[3] == before[3], "the terminal is as it was"
    finally:
        child.kill()
        child.wait()
        os.close(ours)
        os.close(theirs)


def test_the_gif_has_a_frame_per_step_and_its_colours(tmp_path: Path) -> None:
    png = io.BytesIO()
    Image.new("RGB", (64, 32), (200, 30, 30)).save(png, "PNG")
    record = replace(One(TOKENS, 1, confidence=CONFIDENCE).record(0), picture=png.getvalue())
    from comparison_traces import VARIABLES

    with TraceWriter(tmp_path / "t.h5", TraceHeader("r", "", "", "toy"), VARIABLES) as writer:
        writer.write(record)
    with open_trace(tmp_path / "t.h5") as trace, Image.open(save_gif(trace, 0, tmp_path / "o.gif")) as image:
        assert (image.n_frames, image.size[0]) == (3, 900)  # type: ignore[attr-defined]
        drawn = [draw_frame(f) for f in frames(trace, 0)]
    # the picture stands at (16, 40), 264 wide and 132 high; below its middle all tokens are gone, so it is grey
    low = [d.getpixel((100, 40 + 100)) for d in drawn]
    assert low[0] == (200, 30, 30) and low[1] == low[2] and len(set(low[1])) == 1  # type: ignore[arg-type]
    assert drawn[1].getpixel((100, 60)) == (200, 30, 30)
    with (
        open_trace(tmp_path / "t.h5") as trace,
        pytest.raises(ProbeError, match="name a .gif in a folder that is there"),
    ):
        save_gif(trace, 0, tmp_path / "nowhere" / "o.gif")


def test_a_frame_is_a_value(tmp_path: Path) -> None:
    with opened(tmp_path, One(TOKENS, 1, nominal=[0, 2, 5], more={"visual_box": np.full((4, 4), NAN)})) as trace:
        last = frames(trace, 0)[-1]
    assert isinstance(last, Frame) and (last.step, last.nominal_step) == (2, 5)
    assert "6 in the schedule" in shown(render_frame(last)) and "picture" not in shown(render_frame(last))
