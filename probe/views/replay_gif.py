"""One sample's denoising as an animated picture, drawn with Pillow."""

from __future__ import annotations

import io
import math
from pathlib import Path

from PIL import Image, ImageDraw

from probe.errors import ProbeError
from probe.site import Fate
from probe.trace import Trace
from probe.views.picture import DIM, FRAME, INK, PANEL, PAPER, RIGHT, WRONG, _font, _wrapped, kept_panel
from probe.views.replay_frames import MARKS, OPEN, SPECIAL, Frame, SlotState, broken_lines, frames, label_of

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
    for places in broken_lines(sizes, room):
        left = x
        for p in places:
            gap = 8 * frame.gaps[p]
            slot, size, left = frame.slots[p], sizes[p] - gap, left + gap
            ground = {SlotState.NEW: _NEW, SlotState.CHANGED: _CHANGED, SlotState.OPEN: _EMPTY}.get(slot.state, PAPER)
            edge = INK if slot.state in MARKS else _EMPTY
            pen.rectangle((left, y, left + size - 3, y + 26), fill=ground, outline=edge, width=2 if edge == INK else 1)
            if slot.state is not SlotState.OPEN:
                text = label_of(slot)
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
