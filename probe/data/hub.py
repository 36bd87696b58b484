"""A data set by its name on the Hub, or a local one in the same formats. The only file that imports `datasets`.

Rows are streamed, so nothing is fetched beyond the samples that are run. Code that comes with a data set never runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from probe.data.metrics import METRICS, unfit
from probe.data.pictures import MOST_PIXELS
from probe.data.sample import Sample
from probe.errors import ProbeError
from probe.registry import nearest

GUESSES: Mapping[str, Sequence[str]] = {
    "image": ("image", "images", "picture", "img"),
    "question": ("question", "query", "prompt", "text", "instruction"),
    "answers": ("answers", "answer", "label", "target", "ground_truth"),
    "id": ("id", "question_id", "questionId", "sample_id"),
}
"""What a column is called that nobody named: the first of these that the data set has."""
HOW = "pip install 'dmllm-probe[hub]'"


def from_hub(
    name: str,
    *,
    config: str | None = None,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    metric: str | None = None,
    question: str | None = None,
) -> Iterator[Sample]:
    """Samples from a data set: a Hub id, a folder of its files, or one Parquet file.

    `columns` names the data set's columns for `image`, `question`, `answers` and `id`; what it leaves out is looked for
    among usual names. `question` is asked of every row instead of a column's. Without `split` the only one is taken, or
    `test`, `validation`, `train`, in this order. A row without a usable picture or answer raises when its turn comes,
    and reading may go on.
    """
    for ours in columns or {}:
        if ours not in GUESSES:
            raise ProbeError(f"data.columns: there is no field `{ours}`; {nearest(ours, list(GUESSES))}")
    if metric is not None and metric not in METRICS:
        raise ProbeError(f"data.metric: no metric is called `{metric}`; {nearest(metric, list(METRICS))}")
    rows = _opened(name, config, split)
    features = dict(rows.features or {})
    present = list(features) or list(next(iter(rows), {}))
    if not present:
        raise ProbeError(f"the data set {name} has no rows")
    found = _columns(name, present, columns or {}, asked=question is not None)
    rows = _undecoded(rows, found["image"], features)
    return map(partial(_sample, name, found, features, metric, question), enumerate(rows))


def _opened(name: str, config: str | None, split: str | None) -> Any:
    """The rows of one split, streamed."""
    try:
        import datasets
    except ImportError:
        raise ProbeError(f"reading the data set {name} takes the library `datasets`: {HOW}") from None
    datasets.disable_progress_bars()
    path = Path(name)
    try:
        if path.is_dir() and any((path / f).is_file() for f in ("state.json", "dataset_dict.json")):
            splits = datasets.load_from_disk(str(path))
        elif path.is_file():
            kind = {".json": "json", ".jsonl": "json", ".csv": "csv"}.get(path.suffix, "parquet")
            splits = datasets.load_dataset(kind, data_files=str(path), streaming=True)
        else:
            splits = datasets.load_dataset(name, config, streaming=True)
    except Exception as error:  # each kind of trouble with files, network and names has its own exception
        raise ProbeError(f"the data set {name} cannot be read: {_first_line(error)}") from None
    if not isinstance(splits, dict):
        return splits
    names = list(splits)
    if split is None:
        split = next((s for s in ("test", "validation", "train") if s in names), names[0])
    if split not in names:
        raise ProbeError(f"data.split: {name} has no split `{split}`; {nearest(split, names)}")
    return splits[split]


def _first_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _columns(name: str, present: Sequence[str], given: Mapping[str, str], *, asked: bool) -> dict[str, str]:
    """The data set's column for each of our fields that it has."""
    found: dict[str, str] = {}
    for ours, usual in GUESSES.items():
        if ours in given and given[ours] not in present:
            raise ProbeError(
                f"data.columns.{ours}: {name} has no column `{given[ours]}`; {nearest(given[ours], list(present))}"
            )
        column = given.get(ours) or next((c for c in usual if c in present), None)
        if column is not None:
            found[ours] = column
    for ours in ("image",) if asked else ("image", "question"):
        if ours not in found:
            raise ProbeError(
                f"no column of {name} looks like the {ours} (it has {', '.join(present)}); "
                f"say which one it is: data.columns={{{ours}: NAME}}"
            )
    return found


def _undecoded(rows: Any, column: str, features: Mapping[str, Any]) -> Any:
    """The rows with their pictures as they are stored: a damaged one then costs its row, and not all that follow."""
    import datasets

    feature: Any = features.get(column)
    if isinstance(feature, datasets.Image):
        return rows.cast_column(column, datasets.Image(decode=False))
    if isinstance(getattr(feature, "feature", None), datasets.Image):
        return rows.cast_column(column, type(feature)(datasets.Image(decode=False)))
    return rows


def _sample(
    name: str,
    columns: Mapping[str, str],
    features: Mapping[str, Any],
    metric: str | None,
    question: str | None,
    numbered: tuple[int, Mapping[str, Any]],
) -> Sample:
    number, row = numbered
    where = f"{name}, row {number}"
    asked = question if question is not None else row[columns["question"]]
    if not isinstance(asked, str) or not asked.strip():
        raise ProbeError(f"{where}: the column `{columns['question']}` holds no question")
    answers = _answers(row.get(columns.get("answers", "")), features.get(columns.get("answers", "")))
    chosen = metric or ("exact_match" if answers else "")
    if metric and not answers:
        raise ProbeError(f"{where}: the metric `{metric}` needs an answer, and there is none")
    if chosen and (wrong := unfit(chosen, answers)):
        raise ProbeError(f"{where}: {wrong}")
    given = row[columns["image"]]
    seen = list(given) if isinstance(given, list | tuple) else [given]
    try:
        images = tuple(_picture(item) for item in seen if item is not None)
    except (OSError, ValueError, SyntaxError) as error:
        raise ProbeError(f"{where}: the picture cannot be read: {error}") from None
    if not images:
        raise ProbeError(f"{where}: no picture in the column `{columns['image']}`")
    own = row.get(columns.get("id", ""))
    return Sample(
        id=str(number if own is None else own), images=images, question=asked, answers=answers, metric=chosen, task=name
    )


def _answers(value: Any, feature: Any) -> tuple[str, ...]:
    """A cell as reference texts: a text, a number, the name of a class, or a list of them."""
    if value is None:
        return ()
    if isinstance(value, list | tuple):
        return tuple(text for item in value for text in _answers(item, getattr(feature, "feature", feature)))
    if hasattr(feature, "int2str") and isinstance(value, int) and not isinstance(value, bool):
        return (str(feature.int2str(value)),)
    return (str(value),)


def _picture(value: Any) -> Image.Image:
    """A cell as a picture: bytes, a place that they are read from, or decoded already."""
    import datasets

    if isinstance(value, bytes):
        value = {"bytes": value, "path": None}
    if isinstance(value, dict):
        value = datasets.Image().decode_example(value)
    if not isinstance(value, Image.Image):
        raise ValueError(f"{type(value).__name__} is no picture")
    if value.width * value.height > MOST_PIXELS:
        raise ValueError(f"more than {MOST_PIXELS // 10**6} megapixels")
    return ImageOps.exif_transpose(value).convert("RGB")
