"""A registered function with a recipe's parameters: validated once, cheap to ask at every step.

Where a parameter takes one value, a recipe may also write a list (one value per layer of the probe) or a schedule
(a mapping of shares of the steps to values, each from that share on). Where it takes a part of the vocabulary, that
part is validated like any other, and its faults keep their place.
"""

from __future__ import annotations

import collections.abc
import json
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from probe.recipe_at import as_share
from probe.recipe_parts import Part
from probe.recipe_words import Wrong, describe, first_fault, names_of
from probe.registry import Entry, Registry, Slot, nearest
from probe.site import Clock, Site, first_step

Words = Mapping[str, Registry]
"""The registries that nested parts are looked up in, by kind."""


@dataclass(frozen=True)
class Call:
    """A function of the vocabulary with its parameters, which may change over the steps."""

    entry: Entry
    segments: tuple[tuple[float, dict[str, Any]], ...]
    """From which share of the steps on which parameters hold; the first share is 0."""
    nested: Mapping[str, tuple[Call, ...]] = field(default_factory=dict)
    """The parts that stand inside this one, by parameter."""
    score: Call | None = None
    """Of a selection inside a combination: the score of its own, which it has besides the probe's."""
    written: frozenset[str] = frozenset()
    """The parameters that the recipe names; the others are at their defaults."""

    def walk(self) -> Iterator[Call]:
        """This call and all calls inside it."""
        yield self
        for inner in (*(c for calls in self.nested.values() for c in calls), *([self.score] if self.score else [])):
            yield from inner.walk()

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


def bind(
    entry: Entry,
    params: dict[str, Any],
    index: int,
    layers: int,
    *,
    varies: bool = True,
    words: Words | None = None,
    inner: bool = False,
) -> Call:
    """The call for the `index`-th of a probe's `layers` layers. Faults raise `Wrong`, their path below the part's name.

    With `varies=False` lists and schedules have no special meaning. `words` are the registries of nested parts; a
    selection that stands inside another part (`inner`) may have a `score` of its own.
    """
    known = [*names_of(entry.params), *entry.slots]
    own_score = inner and entry.kind == "selection" and "score" not in known
    for name in params:
        if name not in known and not (own_score and name == "score"):
            hint = nearest(name, known) if known else f"`{entry.name}` has no parameters"
            if name in entry.needs:
                hint = "it is one of the function's inputs; what a recipe sets stands behind a `*`"
            raise Wrong(f"unknown parameter `{name}` of the {entry.kind} `{entry.name}`; {hint}", name)
    if (either := entry.meta.get("one_of", ())) and sum(params.get(name) is not None for name in either) != 1:
        names = " and ".join(f"`{name}`" for name in either)
        given = [name for name in either if params.get(name) is not None]
        raise Wrong(f"takes one of {names}, not both", given[-1]) if given else Wrong(f"needs one of {names}")
    nested, score = {}, None
    for name, slot in entry.slots.items():
        if name in params:
            nested[name] = _parts(slot, params[name], index, layers, words or {}, name)
        elif slot.required:
            raise Wrong(f"needs the parameter `{name}`", name)
    if own_score and "score" in params:
        score = _parts(Slot("score", False, True), params["score"], index, layers, words or {}, "score")[0]
    plain = {k: v for k, v in params.items() if k in names_of(entry.params)}
    timelines = {
        name: _timeline(entry, name, value, index, layers) if varies else [(0.0, value, (name,))]
        for name, value in plain.items()
    }
    shares = sorted({0.0, *(share for line in timelines.values() for share, _, _ in line)})
    segments = []
    for share in shares:
        now = {name: [step for step in line if step[0] <= share][-1] for name, line in timelines.items()}
        segments.append((share, _validate(entry, now)))
        if (check := entry.meta.get("check")) and (wrong := check(segments[-1][1], nested)):
            raise Wrong(wrong[1], wrong[0])
    return Call(entry, tuple(segments), nested, score, frozenset(params))


def _parts(slot: Slot, value: Any, index: int, layers: int, words: Words, *path: str | int) -> tuple[Call, ...]:
    """The calls of the parts that stand at `path` of another part's parameters."""
    if slot.many and not (isinstance(value, list) and value):
        found = "is empty" if value == [] else f"is {describe(value)}"
        raise Wrong(f"should be a list of {slot.kind}s, at least one, but {found}", *path)
    items = [(v, (*path, i)) for i, v in enumerate(value)] if slot.many else [(value, path)]
    calls = []
    for item, place in items:
        try:
            part = Part.model_validate(item)
        except ValidationError as error:
            inside, sentence = first_fault(error, item)
            raise Wrong(sentence, *place, *inside) from None
        registry = words.get(slot.kind)
        if registry is None or part.name not in registry:
            hint = nearest(part.name, registry.names()) if registry is not None else "none is registered"
            raise Wrong(f"there is no {slot.kind} `{part.name}`; {hint}", *place)
        try:
            calls.append(bind(registry[part.name], part.params, index, layers, words=words, inner=True))
        except Wrong as error:
            raise Wrong(str(error), *place, part.name, *error.path) from None
    return tuple(calls)


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
        first = str(path[0]) if path else ""
        place = values[first][2] + path[1:] if first in values else path
        raise Wrong(words, *place) from None
    return {name: getattr(model, name) for name in type(model).model_fields}


def _timeline(entry: Entry, name: str, value: Any, index: int, layers: int, *path: str | int) -> _Timeline:
    """A parameter's value over the steps, for one layer of the probe."""
    here = (name, *path)
    if isinstance(value, list) and not _takes_list(_field(entry.params, name)):
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


def _field(model: type[BaseModel], name: str) -> Any:
    """The annotation of the field that a recipe calls `name`."""
    return next(f.annotation for n, f in model.model_fields.items() if name in (n, f.alias))


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
