"""The user's own pictures and questions: one picture, or a JSON Lines file of samples."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from probe.data.metrics import METRICS
from probe.data.sample import Sample, check_size
from probe.errors import ProbeError
from probe.registry import nearest

MOST_PIXELS = 100_000_000  # 100 megapixels; more is taken for a decompression bomb
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA", "ICO")
"""What is read: pictures made of pixels. Formats that are programs or that need other programs (EPS, WMF) are not."""
_FIELDS = ("image", "images", "question", "answer", "answers", "metric", "id")
_EXAMPLE = '{"image": "page.png", "question": "Read the page.", "answer": "BAKO DIRU"}'


def open_image(path: str | Path) -> Image.Image:
    """The picture in RGB, turned as its EXIF orientation says; of an animation the first frame.

    Sixteen bits per channel become eight; transparency is dropped, not blended.
    """
    path = Path(path)
    if not is_file(path):
        raise ProbeError(f"no picture at {_shown(path)}" + (" (that is a folder)" if os.path.isdir(path) else ""))
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


def _shown(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 200 else f"{text[:197]}..."


def from_image(path: str | Path, question: str) -> Sample:
    """A sample of one picture, without a reference answer."""
    if not question.strip():
        raise ProbeError(f"an empty question about {path}; say what to ask")
    return Sample(id=Path(path).name, images=(open_image(path),), question=question)


def from_jsonl(path: str | Path) -> Iterator[Sample]:
    """Samples from a file with one JSON object per line; blank lines are skipped.

    Fields: ``image`` (a path) or ``images`` (a list of paths), ``question``; optional ``answer`` (a text)
    or ``answers`` (a list), ``metric`` (default ``exact_match`` where there is an answer), ``id`` (default
    the line's number). Paths are relative to the file. A line that is wrong, and a picture that is damaged,
    raise `ProbeError` when their turn comes; reading may go on after that. A file of which no line is right
    raises at once, with what is wrong in the first one. Pictures are read when their sample's turn comes.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ProbeError(f"no file at {path}") from None
    except UnicodeDecodeError as error:
        raise ProbeError(f"{path} cannot be read as UTF-8 text: {error}") from None
    except (OSError, ValueError) as error:
        raise ProbeError(f"{_shown(path)} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    rows: list[tuple[str, dict[str, Any] | ProbeError]] = []
    seen: dict[str, str] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = _checked(line, where, path.parent, str(number))
            if row["id"] in seen:
                before = seen[row["id"]]
                raise ProbeError(f"{where}: the id {row['id']!r} was already used at {before}; ids must differ")
        except ProbeError as error:
            rows.append((where, error))
            continue
        seen[row["id"]] = where
        rows.append((where, row))
    if not rows:
        raise ProbeError(f"{path} holds no samples; a line looks like {_EXAMPLE}")
    if not seen:
        only = f" (none of the {len(rows)} lines is right)" if len(rows) > 1 else ""
        raise ProbeError(f"{rows[0][1]}{only}")
    return map(_sample, rows)  # a map goes on after an exception, a generator would not


def _checked(line: str, where: str, folder: Path, number: str) -> dict[str, Any]:
    """The line's fields in one shape: paths, question, answers, metric, id."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ProbeError(
            f"{where}: not JSON ({error.msg} at column {error.colno}); a line looks like {_EXAMPLE}"
        ) from None
    except (RecursionError, ValueError):  # thousands of brackets, numbers of thousands of digits
        raise ProbeError(f"{where}: nested too deeply, or a number too long; a line looks like {_EXAMPLE}") from None
    if not isinstance(row, dict):
        raise ProbeError(f"{where}: a JSON object is wanted, not {type(row).__name__}; a line looks like {_EXAMPLE}")
    for key in row:
        if key not in _FIELDS:
            raise ProbeError(f"{where}: unknown field `{key}`; {nearest(key, list(_FIELDS))}")
    for one, many in (("image", "images"), ("answer", "answers")):
        if one in row and many in row:
            raise ProbeError(f"{where}: both `{one}` and `{many}`; give one of them")
    images = _texts(row, "image", "images", where)
    if not images:
        raise ProbeError(f"{where}: no picture; give `image` (a path) or `images` (a list of paths)")
    if not isinstance(row.get("question"), str) or not row["question"].strip():
        raise ProbeError(f"{where}: `question` must be a text that is not empty")
    answers = _texts(row, "answer", "answers", where)
    metric = row.get("metric", "exact_match" if answers else "")
    if not isinstance(metric, str) or (metric and metric not in METRICS):
        raise ProbeError(f"{where}: no metric is called `{metric}`; {nearest(str(metric), list(METRICS))}")
    if metric and not answers:
        raise ProbeError(f"{where}: the metric `{metric}` needs an `answer` to compare with")
    paths = [folder / image for image in images]
    for image in paths:
        if not is_file(image):
            raise ProbeError(f"{where}: no picture at {_shown(image)} (paths are relative to the JSONL file)")
    name = row.get("id", number)
    if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
        raise ProbeError(f"{where}: `id` must be a text or a whole number")
    return {
        "paths": paths,
        "question": row["question"],
        "answers": tuple(answers),
        "metric": metric,
        "id": str(name),
    }


def _texts(row: dict[str, Any], one: str, many: str, where: str) -> list[str]:
    """The values of a field that may be given as one text or as a list of texts; empty where it is absent."""
    if one in row:
        if not isinstance(row[one], str):
            raise ProbeError(f"{where}: `{one}` must be a text; for several, use the list `{many}`")
        return [row[one]]
    values = row.get(many, [])
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise ProbeError(f"{where}: `{many}` must be a list of texts; for a single one, use `{one}`")
    return values


def _sample(located: tuple[str, dict[str, Any] | ProbeError]) -> Sample:
    where, row = located
    if isinstance(row, ProbeError):
        raise row
    try:
        images = tuple(open_image(p) for p in row["paths"])
    except ProbeError as error:
        raise ProbeError(f"{where}: {error}") from None
    return Sample(row["id"], images, row["question"], row["answers"], row["metric"])
