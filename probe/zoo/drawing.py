"""Anti-aliased shapes and letters for the synthetic world, drawn once per (form, size) and cached.

Forms are drawn with Pillow at eight times their size and averaged down, so a mask value is the share of a
pixel that the form covers: float32 in [0, 1]. Letters come from 5 x 7 dot patterns whose neighbouring dots
are joined by strokes of a round pen. No font file and no font engine takes part, so the pixels do not
depend on the machine.
"""

from __future__ import annotations

from functools import cache
from math import cos, pi, sin

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

CELL = 24  # pixels per side of a scene cell, and of every shape mask
GLYPH_WIDTH, GLYPH_HEIGHT = 6, 9  # pixels of a letter's mask
_FINE = 8  # supersampling factor

# Rows from top to bottom, five bits each, most significant bit left.
_DOTS = {
    "A": (14, 17, 17, 31, 17, 17, 17), "B": (30, 17, 17, 30, 17, 17, 30), "C": (14, 17, 16, 16, 16, 17, 14),
    "D": (30, 17, 17, 17, 17, 17, 30), "E": (31, 16, 16, 30, 16, 16, 31), "F": (31, 16, 16, 30, 16, 16, 16),
    "G": (14, 17, 16, 23, 17, 17, 14), "H": (17, 17, 17, 31, 17, 17, 17), "I": (14, 4, 4, 4, 4, 4, 14),
    "J": (7, 2, 2, 2, 2, 18, 12), "K": (17, 18, 20, 24, 20, 18, 17), "L": (16, 16, 16, 16, 16, 16, 31),
    "M": (17, 27, 21, 21, 17, 17, 17), "N": (17, 25, 25, 21, 19, 19, 17), "O": (14, 17, 17, 17, 17, 17, 14),
    "P": (30, 17, 17, 30, 16, 16, 16), "Q": (14, 17, 17, 17, 21, 18, 13), "R": (30, 17, 17, 30, 20, 18, 17),
    "S": (14, 17, 16, 14, 1, 17, 14), "T": (31, 4, 4, 4, 4, 4, 4), "U": (17, 17, 17, 17, 17, 17, 14),
    "V": (17, 17, 17, 17, 17, 10, 4), "W": (17, 17, 17, 21, 21, 27, 17), "X": (17, 17, 10, 4, 10, 17, 17),
    "Y": (17, 17, 10, 4, 4, 4, 4), "Z": (31, 1, 2, 4, 8, 16, 31),
}  # fmt: skip


def _read_only(image: Image.Image) -> np.ndarray:
    mask = np.asarray(image.reduce(_FINE), np.float32) / 255
    mask.setflags(write=False)
    return mask


@cache
def glyph_mask(letter: str) -> np.ndarray:
    """Coverage of a capital letter: float32 (9, 6)."""
    width, height, pen = GLYPH_WIDTH * _FINE, GLYPH_HEIGHT * _FINE, 11
    dots = {(x, y) for y, bits in enumerate(_DOTS[letter]) for x in range(5) if bits >> (4 - x) & 1}
    image = Image.new("L", (width, height))
    brush = ImageDraw.Draw(image)

    def place(x: int, y: int) -> tuple[float, float]:
        reach = pen / 2
        return reach + x * (width - 1 - 2 * reach) / 4, reach + y * (height - 1 - 2 * reach) / 6

    for x, y in dots:
        cx, cy = place(x, y)
        brush.ellipse((cx - pen / 2, cy - pen / 2, cx + pen / 2, cy + pen / 2), fill=255)
        for dx, dy in ((1, 0), (0, 1), (1, 1), (-1, 1)):
            # a diagonal is a stroke only where no straight step joins the two dots
            straight = dx and dy and ((x + dx, y) in dots or (x, y + dy) in dots)
            if (x + dx, y + dy) in dots and not straight:
                brush.line((place(x, y), place(x + dx, y + dy)), fill=255, width=pen)
    return _read_only(image)


def _corners(count: int, radii: tuple[float, ...], turn: float) -> list[tuple[float, float]]:
    """Points around the origin at alternating radii, the first at ``turn`` quarter turns."""
    steps = [turn * pi / 2 + 2 * pi * k / count for k in range(count)]
    return [(radii[k % len(radii)] * cos(a), radii[k % len(radii)] * sin(a)) for k, a in enumerate(steps)]


def _outline(shape: str) -> list[tuple[float, float]]:
    """A polygon inside the square [-1, 1] x [-1, 1], y downwards."""
    if shape == "square":
        return [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)]
    if shape == "triangle":
        return [(0, -0.95), (1, 0.85), (-1, 0.85)]
    if shape == "diamond":
        return [(0, -1), (0.8, 0), (0, 1), (-0.8, 0)]
    if shape == "star":
        return [(x, y + 0.07) for x, y in _corners(10, (1.05, 0.44), -1)]
    if shape == "cross":
        a, b = 0.36, 0.96
        return [
            (-a, -b),
            (a, -b),
            (a, -a),
            (b, -a),
            (b, a),
            (a, a),
            (a, b),
            (-a, b),
            (-a, a),
            (-b, a),
            (-b, -a),
            (-a, -a),
        ]
    if shape == "heart":
        turns = [2 * pi * k / 60 for k in range(60)]
        return [
            (sin(t) ** 3, -(13 * cos(t) - 5 * cos(2 * t) - 2 * cos(3 * t) - cos(4 * t)) / 16.5 - 0.12) for t in turns
        ]
    return _corners(64, (0.98,), 0)  # circle, and the outside of a ring


def _draw_shape(shape: str, size: int) -> Image.Image:
    middle, half = CELL * _FINE / 2 - 0.5, size * _FINE / 2
    image = Image.new("L", (CELL * _FINE, CELL * _FINE))
    brush = ImageDraw.Draw(image)
    brush.polygon([(middle + half * x, middle + half * y) for x, y in _outline(shape)], fill=255)
    if shape == "ring":
        brush.polygon([(middle + half * 0.55 * x, middle + half * 0.55 * y) for x, y in _outline("circle")], fill=0)
    return image


@cache
def shape_mask(shape: str, size: int) -> np.ndarray:
    """Coverage of a shape of ``size`` pixels in the middle of a cell: float32 (24, 24)."""
    return _read_only(_draw_shape(shape, size))


@cache
def soft_shadow(shape: str, size: int) -> np.ndarray:
    """A blurred copy of the shape one pixel lower, its strength: float32 (24, 24)."""
    blurred = _draw_shape(shape, size).filter(ImageFilter.BoxBlur(_FINE))
    shifted = Image.new("L", blurred.size)
    shifted.paste(blurred, (0, _FINE))
    return _read_only(shifted)


def shade(colour: np.ndarray) -> np.ndarray:
    """A cell of one colour (float32 (3,)), a little lighter at the top: float32 (24, 1, 3)."""
    light = np.linspace(1.07, 0.9, CELL, dtype=np.float32)[:, None, None]
    return np.minimum(colour * light, 255)
