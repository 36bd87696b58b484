"""Names to objects: signals, scores, selections, operations, backbones, tasks. Typos get a suggestion.

A part of the vocabulary is a plain function. Its *positional* parameters name the tensors that it is given, its
*keyword-only* parameters are what a recipe may set; their annotations validate the recipe:

    @scores.register
    def norm(hidden: Tensor, *, p: float = 2.0) -> Tensor:
        ...

A keyword-only parameter whose annotation carries `Nested` takes another part of the vocabulary (or a list of them),
spelled in a recipe like any part; the function gets it ready to be called.

Installed packages add to a registry with an entry point of the group `probe.<kind>` (for example `probe.scores`).
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import entry_points
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, create_model

from probe.errors import ProbeError

MEANT = dict.fromkeys(("remove", "delete", "discard", "prune"), "drop") | {"average": "merge", "cosine": "similarity"}
"""What other words for parts of the vocabulary mean, where spelling alone would lead astray."""


def nearest(name: str, known: list[str]) -> str:
    """A tail for an error message: the nearest known name, or all of them when none is near."""
    if (meant := MEANT.get(str(name).lower())) in known:
        return f"did you mean `{meant}`?"
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"did you mean `{close[0]}`?" if close else f"known: {', '.join(known)}"


@dataclass(frozen=True)
class Nested:
    """Marks a parameter whose value is itself a part: `Annotated[Callable[...], Nested("selection")]`."""

    kind: str
    gives: str = "per_token"
    """Of scores: what they must give (`per_token`, `pairwise`, `features`)."""


@dataclass(frozen=True)
class Slot:
    """A parameter that takes a part of the vocabulary, or (`many`) a list of at least one; scores must give `gives`."""

    kind: str
    many: bool
    required: bool
    gives: str = "per_token"


def _nested(annotation: Any) -> tuple[Nested, bool] | None:
    """The part that an annotation asks for, and whether it is a list of them."""
    if get_origin(annotation) is Annotated:
        marks = [m for m in get_args(annotation)[1:] if isinstance(m, Nested)]
        return (marks[0], False) if marks else _nested(get_args(annotation)[0])
    inside = [found for a in get_args(annotation) if (found := _nested(a))]
    if not inside:
        return None
    return inside[0][0], inside[0][1] or get_origin(annotation) is tuple


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

    def reads(self, params: Mapping[str, Any]) -> tuple[str, ...]:
        """Those of `needs` that the function looks at under these parameters; it gets None for the others."""
        chosen = self.meta.get("reads")
        return self.needs if chosen is None else tuple(n for n in self.needs if n in chosen(params))

    @cached_property
    def _keywords(self) -> dict[str, tuple[Any, Any]]:
        """Annotation and default (`...`: none) of every keyword-only parameter."""
        try:
            hints = get_type_hints(self.function, include_extras=True)
        except NameError as error:  # imported for type checkers alone, or not at all
            raise ProbeError(
                f"the {self.kind} `{self.name}`: `{error.name}` is not defined where annotations are read; import it "
                "at the top of the file, not under `TYPE_CHECKING`"
            ) from error
        return {
            p.name: (hints.get(p.name, Any), ... if p.default is inspect.Parameter.empty else p.default)
            for p in inspect.signature(self.function).parameters.values()
            if p.kind is inspect.Parameter.KEYWORD_ONLY
        }

    @cached_property
    def slots(self) -> dict[str, Slot]:
        """The parameters that take parts of the vocabulary."""
        found = {name: (_nested(hint), default) for name, (hint, default) in self._keywords.items()}
        return {
            name: Slot(part[0].kind, part[1], default is ..., part[0].gives)
            for name, (part, default) in found.items()
            if part is not None
        }

    @cached_property
    def params(self) -> type[BaseModel]:
        """A pydantic model of the other keyword-only parameters; unknown keys are refused."""
        fields: dict[str, Any] = {n: spelled for n, spelled in self._keywords.items() if n not in self.slots}
        return create_model(
            f"{self.kind}.{self.name}", __config__=ConfigDict(extra="forbid", arbitrary_types_allowed=True), **fields
        )

    @property
    def summary(self) -> str:
        """The first line of the function's docstring."""
        return (inspect.getdoc(self.function) or "").split("\n", 1)[0]


def _same_place(old: Callable[..., Any], new: Callable[..., Any]) -> bool:
    """Whether a function is the same one defined again, as when a notebook cell or a plugin's file runs twice."""
    again = (old.__module__, old.__qualname__) == (new.__module__, new.__qualname__)
    return again and (old.__module__ == "__main__" or old.__module__.startswith("probe_plugin_"))


class Registry:
    """Functions of one kind by name; `register` is a decorator."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Entry] = {}
        self._loaded_entry_points = False

    def register(self, function: Callable[..., Any] | None = None, *, name: str | None = None, **meta: Any) -> Any:
        """Register a function under its own name, or `name`; extra keywords are kept as `entry.meta`.

        `reads`: which inputs the function looks at, a function of its parameters. `one_of`: parameters of which a
        recipe sets exactly one. `check`: a function of the parameters and the nested parts that gives None, or the name
        of a parameter and what is wrong with it. `quiet`: parameters that are told of only where they are not at their
        default.
        """

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
calibrations = Registry("calibration")
