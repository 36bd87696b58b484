"""Names to objects: signals, scores, selections, operations, backbones, tasks. Typos get a suggestion.

A part of the vocabulary is a plain function. Its *positional* parameters name the tensors that it is given, its
*keyword-only* parameters are what a recipe may set; their annotations validate the recipe:

    @scores.register
    def norm(hidden: Tensor, *, p: float = 2.0) -> Tensor:
        ...

Installed packages add to a registry with an entry point of the group `probe.<kind>` (for example `probe.scores`).
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import entry_points
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, create_model

from probe.errors import ProbeError


def nearest(name: str, known: list[str]) -> str:
    """A tail for an error message: the nearest known name, or all of them when none is near."""
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"did you mean `{close[0]}`?" if close else f"known: {', '.join(known)}"


@dataclass(frozen=True)
class Entry:
    """One registered function: what it needs (tensor names) and what a recipe may set (a pydantic model)."""

    kind: str
    name: str
    function: Callable[..., Any]
    meta: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def needs(self) -> tuple[str, ...]:
        """Names of the positional parameters, in order."""
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return tuple(p.name for p in inspect.signature(self.function).parameters.values() if p.kind in kinds)

    @cached_property
    def params(self) -> type[BaseModel]:
        """A pydantic model of the keyword-only parameters; unknown keys are refused."""
        hints = get_type_hints(self.function, include_extras=True)
        fields: dict[str, Any] = {
            p.name: (hints.get(p.name, Any), ... if p.default is inspect.Parameter.empty else p.default)
            for p in inspect.signature(self.function).parameters.values()
            if p.kind is inspect.Parameter.KEYWORD_ONLY
        }
        return create_model(
            f"{self.kind}.{self.name}", __config__=ConfigDict(extra="forbid", arbitrary_types_allowed=True), **fields
        )

    @property
    def summary(self) -> str:
        """The first line of the function's docstring."""
        return (inspect.getdoc(self.function) or "").split("\n", 1)[0]


def _same_place(old: Callable[..., Any], new: Callable[..., Any]) -> bool:
    """Whether a function is the same one defined again, as when a notebook cell runs twice."""
    return (old.__module__, old.__qualname__) == (new.__module__, new.__qualname__) and old.__module__ == "__main__"


class Registry:
    """Functions of one kind by name; `register` is a decorator."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Entry] = {}
        self._loaded_entry_points = False

    def register(self, function: Callable[..., Any] | None = None, *, name: str | None = None, **meta: Any) -> Any:
        """Register a function under its own name, or `name`; extra keywords are kept as `entry.meta`."""

        def add(f: Callable[..., Any]) -> Callable[..., Any]:
            key = name or f.__name__
            if key in self._entries and not _same_place(self._entries[key].function, f):
                raise ProbeError(f"{self.kind} `{key}` is registered twice ({f.__module__})")
            self._entries[key] = Entry(self.kind, key, f, meta)
            return f

        return add(function) if function is not None else add

    def __getitem__(self, name: str) -> Entry:
        self._load_entry_points()
        if name not in self._entries:
            raise ProbeError(f"no {self.kind} is called `{name}`; {nearest(name, self.names())}")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        self._load_entry_points()
        return name in self._entries

    def __iter__(self) -> Iterator[Entry]:
        self._load_entry_points()
        return iter(self._entries[n] for n in self.names())

    def names(self) -> list[str]:
        """All names, sorted."""
        self._load_entry_points()
        return sorted(self._entries)

    def _load_entry_points(self) -> None:
        if not self._loaded_entry_points:
            self._loaded_entry_points = True
            for point in entry_points(group=f"probe.{self.kind}s"):
                loaded = point.load()  # importing it may already have registered it
                if callable(loaded) and point.name not in self._entries:
                    self.register(loaded, name=point.name)


signals = Registry("signal")
scores = Registry("score")
selections = Registry("selection")
operations = Registry("operation")
unmaskings = Registry("unmasking")
cachings = Registry("caching")
lengths = Registry("length")
