"""The user's own pictures and questions: one picture, or a JSON Lines file of samples."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from probe.data.metrics import METRICS
from probe.data.sample import Sample
from probe.errors import ProbeError
from probe.registry import nearest

MOST_PIXELS = 100_000_000  # 100 megapixels; more is taken for a decompression bomb
_FIELDS = ("image", "images", "question", "answer", "answers", "metric", "id")
_EXAMPLE = '{"image": "page.png", "question": "Read the page.", "answer": "BAKO DIRU"}'


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


def from_image(path: str | Path, question: str) -> Sample:
    """A sample of one picture, without a reference answer."""
    if not question.strip():
        raise ProbeError(f"an empty question about {path}; say what to ask")
    return Sample(id=Path(path).name, images=(open_image(path),), question=question)


def from_jsonl(path: str | Path) -> Iterator[Sample]:
    """Samples from a file with one JSON object per line; blank lines are skipped.

    Fields: ``image`` (a path) or ``images`` (a list of paths), ``question``; optional ``answer`` (a text)
    or ``answers`` (a list), ``metric`` (default ``exact_match`` where there is an answer), ``id`` (default
    the line's number). Paths are relative to the file. Every line is checked before the first sample is
    given out; pictures are read when their sample's turn comes. Reading may go on after a sample whose
    picture is damaged.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ProbeError(f"no file at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ProbeError(f"{path} cannot be read as UTF-8 text: {error}") from None
    rows = [
        (f"{path}, line {number}", _checked(line, f"{path}, line {number}", path.parent, str(number)))
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]
    if not rows:
        raise ProbeError(f"{path} holds no samples; a line looks like {_EXAMPLE}")
    seen: dict[str, str] = {}
    for where, row in rows:
        if row["id"] in seen:
            raise ProbeError(f"{where}: the id {row['id']!r} was already used at {seen[row['id']]}; ids must differ")
        seen[row["id"]] = where
    return map(_sample, rows)  # a map goes on after an exception, a generator would not


def _checked(line: str, where: str, folder: Path, number: str) -> dict[str, Any]:
    """The line's fields in one shape: paths, question, answers, metric, id."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ProbeError(
            f"{where}: not JSON ({error.msg} at column {error.colno}); a line looks like {_EXAMPLE}"
        ) from None
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
        if not image.is_file():
            raise ProbeError(f"{where}: no picture at {image} (paths are relative to the JSONL file)")
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


def _sample(located: tuple[str, dict[str, Any]]) -> Sample:
    where, row = located
    try:
        images = tuple(open_image(p) for p in row["paths"])
    except ProbeError as error:
        raise ProbeError(f"{where}: {error}") from None
    return Sample(row["id"], images, row["question"], row["answers"], row["metric"])
