"""What a recipe's `data` says: where the samples come from. Reading them is `probe.data`'s business."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from probe.recipe_parts import Section
from probe.recipe_words import Wrong

SOURCES = ("task", "file", "folder", "hub", "lmms_eval")
"""The keys that say where samples come from; one of them at most."""
_OF_HUB = ("config", "split", "columns", "metric")
_ALWAYS = ("task", "file", "limit")


class Data(Section):
    """What the backbone reads.

    One of: an embedded `task`; a JSON Lines `file` of the user's own; a `folder` of pictures with one question, `ask`;
    a data set by its name on the `hub`, or a local one, with its `config`, `split`, `columns` (ours: theirs) and
    `metric`; a task of `lmms_eval`, which may stand in a folder of the user's own, `include_path`. At most `limit`
    samples of it.
    """

    task: str | None = None
    file: str | None = None
    folder: str | None = None
    hub: str | None = None
    lmms_eval: str | None = None
    ask: str | None = Field(default=None, min_length=1)
    config: str | None = None
    split: str | None = None
    columns: dict[str, str] | None = None
    include_path: str | None = None
    metric: str | None = None
    limit: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [key for key in SOURCES if getattr(self, key) is not None]
        if len(given) > 1:
            raise Wrong(f"names both a `{given[0]}` and a `{given[1]}`; keep one of them", given[1])
        for key in _OF_HUB:
            if getattr(self, key) is not None and self.hub is None:
                raise Wrong(f"`{key}` is said of a data set on the `hub` only; name that, or remove `{key}`", key)
        if self.include_path is not None and self.lmms_eval is None:
            raise Wrong("`include_path` holds task files for `lmms_eval`; name its task, or remove it", "include_path")
        if self.ask is not None and self.folder is None and self.hub is None:
            raise Wrong("`ask` is the question about a `folder` of pictures (or a `hub` data set without one)", "ask")
        if self.folder is not None and self.ask is None:
            raise Wrong("a `folder` of pictures needs a question about them: `ask`", "folder")
        return self

    @model_serializer(mode="wrap")
    def _only_what_is_said(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What was never said stays unsaid: the hash of a recipe outlives keys that came later."""
        return {k: v for k, v in handler(self).items() if v is not None or k in _ALWAYS}

    @property
    def source(self) -> str:
        """What was named, as `--data` takes it, or the task `world/mixed`."""
        key = next((key for key in SOURCES if getattr(self, key) is not None), None)
        if key is None:
            return "world/mixed"
        named = str(getattr(self, key))
        return f"{key}:{named}" if key in ("hub", "lmms_eval") else named

    @property
    def is_finite(self) -> bool:
        """Whether it may hold fewer samples than its limit: all but an embedded task, which has no end."""
        return any(getattr(self, key) is not None for key in SOURCES[1:])
