"""Reading a picture from a file, and laying several side by side."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from probe.data.sample import check_size
from probe.errors import ProbeError

MOST_PIXELS = 100_000_000  # 100 megapixels; more is taken for a decompression bomb
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA", "ICO")
"""What is read: pictures made of pixels. Formats that are programs or that need other programs (EPS, WMF) are not."""
GAP = 0.02  # between pictures of a sheet, as a share of a cell


def open_image(path: str | Path) -> Image.Image:
    """The picture in RGB, turned as its EXIF orientation says; of an animation the first frame.

    Sixteen bits per channel become eight; transparency is dropped, not blended.
    """
    path = Path(path)
    if not is_file(path):
        raise ProbeError(f"no picture at {shown(path)}" + (" (that is a folder)" if os.path.isdir(path) else ""))
    too_large = f"{path} holds more than {MOST_PIXELS // 10**6} megapixels; give a smaller picture"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes, judged by our own bounds, and of damaged metadata
            with Image.open(path, formats=FORMATS) as file:
                if file.width * file.height > MOST_PIXELS:
                    raise ProbeError(too_large)
                check_size(file, str(path))
                return eight_bits(ImageOps.exif_transpose(file), path).convert("RGB")
    except Image.DecompressionBombError:
        raise ProbeError(too_large) from None
    except UnidentifiedImageError:
        raise ProbeError(f"{path} is not a picture that can be read; PNG and JPEG work") from None
    except ProbeError:
        raise
    except MemoryError:
        raise ProbeError(f"{path} takes more memory than there is; give a smaller picture") from None
    except Exception as error:  # decoders of damaged files raise errors of every kind
        raise ProbeError(f"the picture {path} cannot be read: {str(error) or type(error).__name__}") from None


def eight_bits(image: Image.Image, where: object) -> Image.Image:
    """A picture of one channel of 16 bits with 8 (0..65535 becomes 0..255); Pillow alone would cut all above 255."""
    if not image.mode.startswith("I") and image.mode != "F":
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min(initial=0) < 0 or values.max(initial=0) > 65_535:
        kind = "floating-point" if image.mode == "F" else "32-bit"
        raise ProbeError(f"{where} holds {kind} values of unknown range; convert it to 8 or 16 bits per channel")
    return Image.fromarray(np.rint(values / 257).astype(np.uint8))


def is_file(path: Path) -> bool:
    """Whether there is a file; what cannot even be the name of one (too long, NUL in it) is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def shown(path: Path) -> str:
    """A path for a message, of bounded length."""
    text = str(path)
    return text if len(text) <= 200 else f"{text[:197]}..."


def sheet_places(sizes: Sequence[tuple[int, int]]) -> tuple[tuple[float, float], np.ndarray]:
    """Where pictures of these (width, height) stand on one sheet: row by row, in a nearly square array of cells.

    Returns the sheet's (width, height) in cells, and `(pictures, 4)` float64: x0, y0, x1, y1 as shares of the sheet.
    The longer side of every picture is a cell's; a single picture is its own sheet.
    """
    if len(sizes) == 1:
        (width, height), longer = sizes[0], max(sizes[0])
        return (width / longer, height / longer), np.array([[0.0, 0.0, 1.0, 1.0]])
    columns = math.ceil(math.sqrt(len(sizes)))
    rows = math.ceil(len(sizes) / columns)
    wide, high = columns + GAP * (columns - 1), rows + GAP * (rows - 1)
    places = []
    for number, (width, height) in enumerate(sizes):
        row, column = divmod(number, columns)
        left, top, longer = column * (1 + GAP), row * (1 + GAP), max(width, height)
        places.append([left / wide, top / high, (left + width / longer) / wide, (top + height / longer) / high])
    return (wide, high), np.array(places)


def sheet_of(images: Sequence[Image.Image], side: int) -> Image.Image:
    """Pictures on one sheet whose longer side has at most `side` pixels. One picture is only made smaller."""
    if len(images) == 1:
        small = images[0].copy()
        small.thumbnail((side, side))
        return small
    (wide, high), places = sheet_places([image.size for image in images])
    scale = side / max(wide, high)
    sheet = Image.new("RGB", (round(wide * scale), round(high * scale)), (255, 255, 255))
    for image, place in zip(images, places, strict=True):
        x0, y0, x1, y1 = (round(share * size) for share, size in zip(place, sheet.size * 2, strict=True))
        sheet.paste(image.convert("RGB").resize((max(1, x1 - x0), max(1, y1 - y0)), Image.Resampling.LANCZOS), (x0, y0))
    return sheet


def on_sheet(box: np.ndarray, picture: np.ndarray, sizes: Sequence[tuple[int, int]]) -> np.ndarray:
    """Boxes `(V, 4)` as shares of their pictures, `picture (V,)`, as shares of the sheet; NaN stays NaN."""
    place = sheet_places(sizes)[1][picture]
    low, span = place[:, :2], place[:, 2:] - place[:, :2]
    return np.concatenate([low + box[:, :2] * span, low + box[:, 2:] * span], 1).astype(box.dtype)
