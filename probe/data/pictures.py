"""Reading a picture from a file, and laying several side by side."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from probe.errors import ProbeError

MOST_PIXELS = 100_000_000  # 100 megapixels; more is taken for a decompression bomb
GAP = 0.02  # between pictures of a sheet, as a share of a cell


def open_image(path: str | Path) -> Image.Image:
    """The picture in RGB, turned as its EXIF orientation says."""
    path = Path(path)
    if not path.is_file():
        raise ProbeError(f"no picture at {path}" + (" (that is a folder)" if path.is_dir() else ""))
    too_large = f"{path} holds more than {MOST_PIXELS // 10**6} megapixels; give a smaller picture"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # judged by our own bound
            with Image.open(path) as file:
                if file.width * file.height > MOST_PIXELS:
                    raise ProbeError(too_large)
                return ImageOps.exif_transpose(file).convert("RGB")
    except Image.DecompressionBombError:
        raise ProbeError(too_large) from None
    except UnidentifiedImageError:
        raise ProbeError(f"{path} is not a picture that Pillow can read; PNG and JPEG work") from None
    except (
        OSError,
        SyntaxError,
        ValueError,
    ) as error:  # what Pillow raises for damaged files of several formats
        raise ProbeError(f"the picture {path} cannot be read: {error}") from None


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
