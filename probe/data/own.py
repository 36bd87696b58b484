"""The user's own pictures, clips and questions: given one by one, or in a JSON Lines file of samples."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from probe.data.metrics import METRICS, unfit
from probe.data.pictures import is_file, open_image, shown
from probe.data.sample import Sample
from probe.data.video import FRAMES, read_clip
from probe.errors import ProbeError
from probe.registry import nearest

_SEEN = ("image", "images", "frames", "video")
_FIELDS = (*_SEEN, "question", "answer", "answers", "metric", "id")
_EXAMPLE = '{"image": "page.png", "question": "Read the page.", "answer": "BAKO DIRU"}'


def from_image(path: str | Path, question: str) -> Sample:
    """A sample of one picture, without a reference answer."""
    return from_images([path], question)


def from_images(paths: Sequence[str | Path], question: str) -> Sample:
    """A sample of several pictures in this order, without a reference answer."""
    if not paths:
        raise ProbeError("no picture; give the path of at least one")
    named = ", ".join(Path(path).name for path in paths)
    return Sample(named, tuple(open_image(path) for path in paths), _asked(question, named))


def from_video(path: str | Path, question: str, frames: int = FRAMES) -> Sample:
    """A sample of one clip, without a reference answer.

    `frames` are taken of it evenly. `path` is a video file (`pip install 'dmllm-probe[video]'`), or a folder of
    pictures, which are the frames in the order of their names.
    """
    name = Path(path).name
    return Sample(name, (), _asked(question, name), frames=read_clip(path, frames))


def _asked(question: str, about: str) -> str:
    if not question.strip():
        raise ProbeError(f"an empty question about {about}; say what to ask")
    return question


def from_jsonl(path: str | Path) -> Iterator[Sample]:
    """Samples from a file with one JSON object per line; blank lines are skipped.

    Fields: ``image`` (a path), ``images`` (a list of paths), ``frames`` (the pictures of one clip, a list of paths) or
    ``video`` (a video file or a folder of frames, of which ``frames``, a number, are taken evenly; default 32);
    ``question``; optional ``answer`` (a text) or ``answers`` (a list), ``metric`` (default ``exact_match`` where there
    is an answer), ``id`` (default the line's number). Paths are relative to the file. A line that is wrong, and a
    picture that is damaged, raise `ProbeError` when their turn comes; reading may go on after that. A file of which no
    line is right raises at once, with what is wrong in the first one.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ProbeError(f"no file at {path}") from None
    except UnicodeDecodeError as error:
        raise ProbeError(f"{path} cannot be read as UTF-8 text: {error}") from None
    except (OSError, ValueError) as error:
        raise ProbeError(f"{shown(path)} cannot be read: {getattr(error, 'strerror', None) or error}") from None
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
    """The line's fields in one shape: what is seen, its paths, how many frames, question, answers, metric, id."""
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
    if "answer" in row and "answers" in row:
        raise ProbeError(f"{where}: both `answer` and `answers`; give one of them")
    seen, count = _seen(row, where)
    if not isinstance(row.get("question"), str) or not row["question"].strip():
        raise ProbeError(f"{where}: `question` must be a text that is not empty")
    answers = _texts(row, "answer", "answers", where)
    metric = row.get("metric", "exact_match" if answers else "")
    if not isinstance(metric, str) or (metric and metric not in METRICS):
        raise ProbeError(f"{where}: no metric is called `{metric}`; {nearest(str(metric), list(METRICS))}")
    if metric and not answers:
        raise ProbeError(f"{where}: the metric `{metric}` needs an `answer` to compare with")
    if wrong := unfit(metric, answers):
        raise ProbeError(f"{where}: {wrong}")
    paths = [folder / path for path in row[seen]] if isinstance(row[seen], list) else [folder / row[seen]]
    what = "video" if seen == "video" else "picture"
    for path in paths:
        if not (is_file(path) or (seen == "video" and os.path.isdir(path))):
            raise ProbeError(f"{where}: no {what} at {shown(path)} (paths are relative to the JSONL file)")
    name = row.get("id", number)
    if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
        raise ProbeError(f"{where}: `id` must be a text or a whole number")
    return {
        "seen": seen,
        "paths": paths,
        "count": count,
        "question": row["question"],
        "answers": tuple(answers),
        "metric": metric,
        "id": str(name),
    }


def _seen(row: dict[str, Any], where: str) -> tuple[str, int]:
    """Which field says what is to be seen, and how many frames of a video; all paths are texts."""
    count = FRAMES
    if "video" in row and "frames" in row:
        count = row["frames"]
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ProbeError(f"{where}: beside `video`, `frames` is how many of its frames to take: a number from 1 on")
    given = [key for key in _SEEN if key in row and not (key == "frames" and "video" in row)]
    if len(given) > 1:
        raise ProbeError(f"{where}: both `{given[0]}` and `{given[1]}`; give one of them")
    if not given:
        raise ProbeError(f"{where}: no picture; give `image` (a path), `images`, `frames` (lists of paths) or `video`")
    if given[0] == "video":
        if not isinstance(row["video"], str):
            raise ProbeError(f"{where}: `video` must be a text: the path of a file or of a folder of frames")
    elif given[0] == "image":
        _texts(row, "image", "images", where)
    elif not _texts(row, "", given[0], where):
        raise ProbeError(f"{where}: no picture; `{given[0]}` is empty")
    return given[0], count


def _texts(row: dict[str, Any], one: str, many: str, where: str) -> list[str]:
    """The values of a field that may be given as one text or as a list of texts; empty where it is absent."""
    if one and one in row:
        if not isinstance(row[one], str):
            raise ProbeError(f"{where}: `{one}` must be a text; for several, use the list `{many}`")
        return [row[one]]
    values = row.get(many, [])
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        single = f"; for a single one, use `{one}`" if one else ""
        raise ProbeError(f"{where}: `{many}` must be a list of texts{single}")
    return values


def _sample(located: tuple[str, dict[str, Any] | ProbeError]) -> Sample:
    where, row = located
    if isinstance(row, ProbeError):
        raise row
    try:
        if row["seen"] == "video":
            pictures = read_clip(row["paths"][0], row["count"])
        else:
            pictures = tuple(open_image(path) for path in row["paths"])
    except ProbeError as error:
        raise ProbeError(f"{where}: {error}") from None
    clip = row["seen"] in ("frames", "video")
    return Sample(
        id=row["id"],
        images=() if clip else pictures,
        question=row["question"],
        answers=row["answers"],
        metric=row["metric"],
        frames=pictures if clip else (),
    )
