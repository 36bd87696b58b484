"""A run as a picture: what the model was shown, which visual tokens it kept, what it answered. Pillow only."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from probe.site import Fate, Role
from probe.trace import Trace, open_trace

PANEL = 264
GAP = 14
TEXT_LINES = 5
INK, DIM, PAPER = (34, 34, 40), (110, 110, 118), (255, 255, 255)
# Okabe-Ito: distinguishable with any colour vision
RIGHT, WRONG, FRAME = (0, 114, 178), (213, 94, 0), (0, 158, 115)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def kept_panel(picture: Image.Image, box: np.ndarray, kept: np.ndarray, size: int = PANEL) -> Image.Image:
    """The picture with the regions of dropped tokens greyed out.

    `box (visual, 4)` as shares of the picture, NaN for tokens that see none; `kept (visual,)` boolean. The base view
    covers everything coarsely, so only the finest view that exists is painted; kept base tokens get a thin frame.
    Without boxes the picture is shown as it is.
    """
    scale = size / max(picture.size)
    w, h = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    image = picture.convert("RGB").resize((w, h), Image.Resampling.LANCZOS)
    if not len(box):
        return _padded(image, size)
    seen = ~np.isnan(box).any(1)
    area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
    seen &= area > 0
    fine = seen & (area <= np.nanmin(area[seen]) * 1.5) if seen.any() else seen
    grey = image.convert("L").convert("RGB").point(lambda v: round(0.32 * v + 158))
    stay = Image.new("L", (w, h), 0)
    pen = ImageDraw.Draw(stay)
    for pixels in _rectangles(box[fine & kept], w, h):
        pen.rectangle(pixels, fill=255)
    image = Image.composite(image, grey, stay)
    pen = ImageDraw.Draw(image)
    for pixels in _rectangles(box[seen & kept & ~fine], w, h):
        pen.rectangle(pixels, outline=FRAME)
    return _padded(image, size)


def _rectangles(box: np.ndarray, width: int, height: int) -> Iterator[tuple[int, int, int, int]]:
    """Boxes in pixels, both ends included; those that cover none (they see only padding) are left out."""
    for x0, y0, x1, y1 in box:
        left, top, right, bottom = round(x0 * width), round(y0 * height), round(x1 * width), round(y1 * height)
        if right > left and bottom > top:
            yield left, top, right - 1, bottom - 1


def _padded(image: Image.Image, size: int) -> Image.Image:
    canvas = Image.new("RGB", (size, size), PAPER)
    canvas.paste(image, (0, 0))
    return canvas


def _wrapped(
    pen: ImageDraw.ImageDraw, text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int
) -> list[str]:
    lines = [""]
    for word in text.split():
        trial = f"{lines[-1]} {word}".strip()
        if pen.textlength(trial, font=font) <= width or not lines[-1]:
            lines[-1] = trial
        else:
            lines.append(word)
    return lines


def _last_kept(trace: Trace, row: int) -> np.ndarray:
    """`(visual,)` whether a token is still seen by the last layer of the last step."""
    fates = trace.row("visual_kept", row)
    return fates[-1, -1] == int(Fate.KEPT)


def draw_run(baseline: Path | None, recipe: Path, out: Path, samples: int = 3) -> Path | None:
    """Up to `samples` pictures, one column each: as shown, with the tokens left at the end, and both answers.

    Chooses samples whose tokens were removed, of different tasks. Returns None when no sample has a picture.
    """
    with open_trace(recipe) as trace:
        failed = trace.array("failed")
        rows = [r for r in range(trace.n_samples) if not failed[r] and trace.picture(r) is not None]
        if not rows:
            return None
        before = _predictions(baseline)
        chosen = _different(trace, rows, before, samples)
        columns = [_column(trace, r, before) for r in chosen]
        title = f"{trace.header.recipe_name} on {Path(trace.header.backbone).name}"
    width = len(columns) * (PANEL + GAP) + GAP
    sheet = Image.new("RGB", (width, max(c.height for c in columns) + 52), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, 8), title, font=_font(18), fill=INK)
    pen.text(
        (GAP, 31),
        "above: the picture; below: what is left of its visual tokens at the end "
        "(green frames: tokens of the coarse base view)",
        font=_font(12),
        fill=DIM,
    )
    for i, column in enumerate(columns):
        sheet.paste(column, (GAP + i * (PANEL + GAP), 52))
    sheet.save(out)
    return out


def _different(trace: Trace, rows: Sequence[int], before: dict[int, tuple[str, float]], n: int) -> list[int]:
    """Up to `n` rows that show the most: tokens were removed, pictures and tasks differ, one answer changed."""
    numbers, texts, tasks = trace.array("sample"), trace.array("prediction"), trace.array("task")

    def changed(row: int) -> bool:
        return int(numbers[row]) in before and before[int(numbers[row])][0] != str(texts[row])

    pruned = [r for r in rows if not _last_kept(trace, r).all()]
    order = [*[r for r in pruned if changed(r)][:1], *pruned, *rows]
    chosen: list[int] = []
    pictures: set[bytes | None] = set()
    for row in dict.fromkeys(order):
        if trace.picture(row) not in pictures and str(tasks[row]) not in {str(tasks[c]) for c in chosen}:
            pictures.add(trace.picture(row))
            chosen.append(row)
    return sorted((chosen + [r for r in dict.fromkeys(order) if r not in chosen])[:n])


def _predictions(path: Path | None) -> dict[int, tuple[str, float]]:
    if path is None:
        return {}
    with open_trace(path) as trace:
        numbers, texts, scores = trace.array("sample"), trace.array("prediction"), trace.array("score")
        return {int(n): (str(t), float(s)) for n, t, s in zip(numbers, texts, scores, strict=True)}


def _column(trace: Trace, row: int, before: dict[int, tuple[str, float]]) -> Image.Image:
    record = trace.record(row)
    assert record.picture is not None
    picture = Image.open(io.BytesIO(record.picture))
    box = trace.row("visual_box", row).copy()
    box[trace.row("visual_role", row) == int(Role.NEWLINE)] = np.nan
    kept = _last_kept(trace, row)
    small = _font(13)
    told: list[tuple[str, str, tuple[int, int, int]]] = [("asked", record.question, INK)]
    if record.sample in before:
        text, score = before[record.sample]
        told.append(("unpruned", text, _colour(score)))
    told.append((f"{kept.mean():.0%} left", record.prediction, _colour(record.score)))
    if record.references:
        told.append(("right", record.references[0], DIM))
    measure = ImageDraw.Draw(Image.new("RGB", (8, 8)))
    paragraphs = [
        (f"{label}:", _wrapped(measure, text or "(nothing)", small, PANEL - 72), c) for label, text, c in told
    ]
    height = 2 * (PANEL + GAP) + sum(16 * min(len(lines), TEXT_LINES) + 5 for _, lines, _ in paragraphs)
    column = Image.new("RGB", (PANEL, height), PAPER)
    column.paste(kept_panel(picture, box[:0], kept[:0]), (0, 0))
    column.paste(kept_panel(picture, box, kept), (0, PANEL + GAP))
    pen = ImageDraw.Draw(column)
    y = 2 * (PANEL + GAP)
    for label, lines, colour in paragraphs:
        pen.text((0, y), label, font=small, fill=DIM)
        for line in lines[:TEXT_LINES]:
            pen.text((72, y), line, font=small, fill=colour)
            y += 16
        y += 5
    return column


def _colour(score: float) -> tuple[int, int, int]:
    if np.isnan(score):
        return INK
    return RIGHT if score >= 0.995 else WRONG
