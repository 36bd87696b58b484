"""From what a recipe or a command line names to samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from probe.data.folder import from_folder, pictures_in
from probe.data.harness import from_harness
from probe.data.hub import from_hub
from probe.data.own import from_jsonl
from probe.data.sample import Sample
from probe.data.tasks import load, tasks
from probe.errors import ProbeError

DEFAULT_LIMIT = 24
"""Samples of a task when neither the recipe nor the command says how many: tasks have no end."""
_HUB, _HARNESS = "hub:", "lmms_eval:"


class Source(Protocol):
    """What a recipe's `data` says; `probe.recipe_data.Data` is one."""

    file: str | None
    folder: str | None
    hub: str | None
    lmms_eval: str | None
    ask: str | None
    config: str | None
    split: str | None
    columns: dict[str, str] | None
    metric: str | None
    include_path: str | None
    limit: int | None

    @property
    def source(self) -> str:
        """The name of the task, where there is nothing else."""


def samples(data: Source, backbone: str = "") -> Iterator[Sample]:
    """The samples that `data` names, all of them but for an embedded task, which has no end.

    Of a task of lmms-eval, the first `limit` of each of its parts; `backbone` then decides how a reply is scored.

    What concerns all of them raises `ProbeError` at once; one that cannot be read raises when its turn comes, and
    reading may go on.
    """
    if data.file is not None:
        return from_jsonl(data.file)
    if data.folder is not None:
        return from_folder(data.folder, data.ask or "")
    if data.hub is not None:
        return from_hub(
            data.hub,
            config=data.config,
            split=data.split,
            columns=data.columns,
            metric=data.metric,
            question=data.ask,
        )
    if data.lmms_eval is not None:
        return from_harness(data.lmms_eval, include_path=data.include_path, limit=data.limit, backbone=backbone)
    return load(data.source, DEFAULT_LIMIT if data.limit is None else data.limit)


def named(text: str, ask: str | None = None) -> Mapping[str, Any]:
    """What `--data TEXT` and `--ask` mean, as a recipe's `data` would say it.

    A JSON Lines file; a folder of pictures; another folder or file with a data set; an embedded task; `hub:NAME`, or
    any `owner/name`; `lmms_eval:TASK`.
    """
    path = Path(text)
    key, value = "task", text
    if text.startswith((_HUB, _HARNESS)):
        key, _, value = text.partition(":")
    elif path.suffix in (".jsonl", ".json"):
        key = "file"
    elif path.is_dir():
        key = "folder" if pictures_in(path) else "hub"
    elif path.is_file() or (text not in tasks() and text.count("/") == 1 and not text.startswith("world/")):
        key = "hub"
    if ask is None:
        if key == "folder":
            raise ProbeError(f"--data {text} is a folder of pictures; say what to ask about each of them with --ask")
        return {key: value}
    if key not in ("folder", "hub"):
        raise ProbeError(f"--ask goes with --image, --video or a folder of pictures; {text} has questions of its own")
    return {key: value, "ask": ask}
