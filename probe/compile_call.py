"""A registered function with a recipe's parameters: validated once, cheap to ask at every step.

Where a parameter takes one value, a recipe may also write a list (one value per layer of the probe) or a schedule
(a mapping of shares of the steps to values, each from that share on).
"""

from __future__ import annotations

import collections.abc
import json
import types
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import ValidationError

from probe.recipe_at import as_share
from probe.recipe_words import Wrong, describe, first_fault, names_of
from probe.registry import Entry, nearest
from probe.site import Clock, Site, first_step


@dataclass(frozen=True)
class Call:
    """A function of the vocabulary with its parameters, which may change over the steps."""

    entry: Entry
    segments: tuple[tuple[float, dict[str, Any]], ...]
    """From which share of the steps on which parameters hold; the first share is 0."""

    def params(self, clock: Clock) -> dict[str, Any]:
        """The validated keyword arguments at this clock. The same mapping every time: do not change it."""
        if len(self.segments) == 1:
            return self.segments[0][1]
        begun = [p for share, p in self.segments if clock.step >= first_step(share, clock.nominal_steps)]
        return begun[-1]

    @property
    def constant(self) -> bool:
        """Whether the parameters are the same at every step."""
        return len(self.segments) == 1

    @property
    def variants(self) -> tuple[dict[str, Any], ...]:
        """All parameters that hold at some step."""
        return tuple(params for _, params in self.segments)


def bind(entry: Entry, params: dict[str, Any], index: int, layers: int, *, varies: bool = True) -> Call:
    """The call for the `index`-th of a probe's `layers` layers. Faults raise `Wrong`, their path below the part's name.

    With `varies=False` lists and schedules have no special meaning.
    """
    known = names_of(entry.params)
    for name in params:
        if name not in known:
            hint = nearest(name, known) if known else f"`{entry.name}` has no parameters"
            raise Wrong(f"unknown parameter `{name}` of the {entry.kind} `{entry.name}`; {hint}", name)
    timelines = {
        name: _timeline(entry, name, value, index, layers) if varies else [(0.0, value, (name,))]
        for name, value in params.items()
    }
    shares = sorted({0.0, *(share for line in timelines.values() for share, _, _ in line)})
    segments = []
    for share in shares:
        now = {name: [step for step in line if step[0] <= share][-1] for name, line in timelines.items()}
        segments.append((share, _validate(entry, now)))
    return Call(entry, tuple(segments))


_Timeline = list[tuple[float, Any, tuple[str | int, ...]]]
"""From which share of the steps on, which value, and where it stands in the recipe."""


def _validate(entry: Entry, values: dict[str, tuple[float, Any, tuple[str | int, ...]]]) -> dict[str, Any]:
    data = {name: value for name, (_, value, _) in values.items()}
    try:
        # JSON's strict mode refuses text for numbers and 1 for true, yet reads lists as tuples and words as enums
        model = entry.params.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        path, words = first_fault(error, data)
        if words == "is missing":
            raise Wrong(f"needs the parameter `{path[0]}`", *path) from None
        place = values[str(path[0])][2] + path[1:] if path else ()
        raise Wrong(words, *place) from None
    return {name: getattr(model, name) for name in type(model).model_fields}


def _timeline(entry: Entry, name: str, value: Any, index: int, layers: int, *path: str | int) -> _Timeline:
    """A parameter's value over the steps, for one layer of the probe."""
    here = (name, *path)
    if isinstance(value, list) and not _takes_list(entry.params.model_fields[name].annotation):
        if len(value) != layers:
            raise Wrong(
                f"a list gives one value per layer, but it has {len(value)} values and the probe {_count(layers)}",
                *here,
            )
        return _timeline(entry, name, value[index], index, layers, *path, index)
    if not isinstance(value, dict) or not any(_is_share(key) for key in value):
        return [(0.0, value, here)]
    line: _Timeline = []
    for key, item in value.items():
        if not _is_share(key):
            raise Wrong(f"a schedule's keys are shares of the steps such as 0% or 50%, not `{key}`", *here, key)
        share = _share(key, *here)
        if line and share <= line[-1][0]:
            raise Wrong(
                f"a schedule's shares must rise, but {key} comes after {list(value)[len(line) - 1]}",
                *here,
                key,
            )
        if not line and share != 0.0:
            raise Wrong(f"a schedule starts at 0%, but the first share is {key}", *here, key)
        if share == 1.0:
            raise Wrong(f"{key} is after the last step, so this value would never hold", *here, key)
        inner = _timeline(entry, name, item, index, layers, *path, key)
        if len(inner) > 1:
            raise Wrong(f"a schedule cannot stand inside a schedule ({describe(item)})", *here, key)
        line.append((share, *inner[0][1:]))
    return line


def _is_share(key: str) -> bool:
    try:
        _share(key)
    except Wrong as error:
        return bool(error.path)
    return True


def _share(key: str, *path: str | int) -> float:
    """The share that a key of a schedule spells: `50%`, `0.5` or `0`."""
    try:
        share = as_share(key)
        if share is None and key.strip().replace(".", "", 1).isdecimal():
            share = as_share(float(key))
    except Wrong as error:
        raise Wrong(str(error), *path, key) from None
    if share is None:
        raise Wrong("no share")
    return share


def _count(layers: int) -> str:
    return "1 layer" if layers == 1 else f"{layers} layers"


def _takes_list(annotation: Any) -> bool:
    """Whether a list may be the value of a parameter itself."""
    if annotation is Any:
        return True
    origin = get_origin(annotation)
    if origin is Annotated:
        return _takes_list(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return any(_takes_list(a) for a in get_args(annotation))
    kind = origin or annotation
    return (
        isinstance(kind, type)
        and not issubclass(kind, str)
        and issubclass(kind, collections.abc.Collection)
        and (not issubclass(kind, collections.abc.Mapping))
    )


def layer_error(site: Site, layer: int | None, relative: int) -> str | None:
    """Why the attention of the layer `relative` to a probe's own cannot be had at its site, or None when it can."""
    if layer is None:
        return f"attention is known only inside the layers, not at `{site}`; attach at a layer, such as `layer.input`"
    if relative > 0:
        return f"layer {layer + relative} has not run yet when layer {layer} does; use 0 or a negative number"
    if relative == 0 and site is Site.LAYER_INPUT:
        return (
            f"layer {layer} has not computed its attention yet at its input; use `layer: -1` (the layer before) "
            "or the site `layer.after_attention`"
        )
    if layer + relative < 0:
        before = "no previous layer" if relative == -1 else f"no layer {-relative} before it"
        return f"layer {layer} has {before}"
    return None
