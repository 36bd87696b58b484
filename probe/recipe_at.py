"""Where and when a probe attaches: the layers and the steps of `at:`, parsed once and asked often.

A *share* is a float in [0, 1] or text such as `50%`; a whole number is always an index. So `start: 0.0` and
`start: 0` mean the same, `start: 1.0` is after the last step and `start: 1` is the second step.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

from pydantic import PlainSerializer, PlainValidator

from probe.recipe_words import Wrong, describe
from probe.registry import nearest
from probe.site import Clock, Phase, first_step

Progress = Literal["steps", "committed", "blocks"]

_PERCENT = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*%")


def as_share(value: Any) -> float | None:
    """The share that a value spells (`0.5`, `50%`), or None when it spells none. Out of range raises `Wrong`."""
    if isinstance(value, str) and (match := _PERCENT.fullmatch(value.strip())):
        share = float(match[1]) / 100
    elif isinstance(value, float):
        share = value
    else:
        return None
    if not 0.0 <= share <= 1.0:
        raise Wrong(f"{describe(value)} is no share: a share lies between 0.0 and 1.0, or 0% and 100%")
    return share


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number_or_share(value: Any, what: str, *path: str | int, negative: bool = False) -> int | float:
    try:
        share = as_share(value)
    except Wrong as error:
        raise Wrong(str(error), *path) from None
    if share is not None:
        return share
    if not _is_index(value):
        raise Wrong(f"should be {what} or a share such as 50%, but is {describe(value)}", *path)
    if value < 0 and not negative:
        raise Wrong(f"{value} is no step: steps count from 0 (the last one is `last`)", *path)
    return int(value)


def _check_keys(value: dict[str, Any], known: list[str], *path: str | int) -> None:
    for key in value:
        if key not in known:
            raise Wrong(f"unknown key `{key}`; {nearest(key, known)}", *path, key)


def _every(value: dict[str, Any]) -> int:
    every = value.get("every", 1)
    if not _is_index(every) or every < 1:
        raise Wrong(f"should be a whole number of at least 1, but is {describe(every)}", "every")
    return int(every)


@dataclass(frozen=True)
class Span:
    """From one position on, up to another (exclusive; None: no end), every so many."""

    start: int | float = 0
    stop: int | float | None = None
    every: int = 1

    def spelled(self) -> dict[str, Any]:
        """As a recipe spells it."""
        end = {} if self.stop is None else {"to": self.stop}
        return {"from": self.start, **end, **({} if self.every == 1 else {"every": self.every})}


@dataclass(frozen=True)
class Steps:
    """At which denoising steps a probe fires: a span of them, or exactly the named ones."""

    exactly: tuple[int | float | str, ...] | None = None
    span: Span = Span()
    of: Progress = "steps"
    """What a share of a span is a share of: the nominal steps, the committed slots, or the blocks."""
    done: bool = False
    """Exact shares name the step that completes them, not the one that begins after them."""

    @classmethod
    def parse(cls, value: Any) -> Steps:
        """From what stands behind `steps:`."""
        if isinstance(value, Steps):
            return value
        if value == "all":
            return cls()
        if isinstance(value, str) and value in ("first", "last", "prefill"):
            return cls(exactly=(value,))
        if _is_index(value):
            return cls(exactly=(_number_or_share(value, "a step"),))
        if isinstance(value, list | tuple):
            return cls(exactly=_exact(value))
        if isinstance(value, dict):
            _check_keys(value, ["from", "to", "every", "at", "done", "of"])
            for key in ("at", "done"):
                if key not in value:
                    continue
                if len(value) > 1:
                    raise Wrong(f"`{key}` names the exact steps; it goes without any other key")
                points = value[key] if isinstance(value[key], list | tuple) else [value[key]]
                exact = _exact(points, key)
                if key == "done" and not all(isinstance(p, float) and p > 0 for p in exact):
                    raise Wrong("names the steps that complete shares, such as [25%, 50%], each above 0%", "done")
                return cls(exactly=exact, done=key == "done")
            start = _number_or_share(value.get("from", 0), "a step", "from")
            stop = None if value.get("to") is None else _number_or_share(value["to"], "a step", "to")
            if stop is not None and type(start) is type(stop) and stop <= start:
                raise Wrong(f"never comes: `to` ({value['to']}) is not behind `from` ({value.get('from', 0)})", "to")
            return cls(span=Span(start, stop, _every(value)), of=_progress(value, start, stop))
        share = as_share(value)
        if share is not None:
            raise Wrong(
                f"{describe(value)} could mean two things: write {{from: {value}}} for every step from there on, "
                f"or {{at: [{value}]}} for that step alone"
            )
        raise Wrong(
            f"should be all, first, last, prefill, a step, a list of steps, {{from, to, every}} or {{at: [...]}}, "
            f"but is {describe(value)}"
        )

    def spelled(self) -> Any:
        """As a recipe spells it."""
        if self.exactly is None:
            of = {} if self.of == "steps" else {"of": self.of}
            return "all" if self.span == Span() and not of else self.span.spelled() | of
        alone = self.exactly in (("first",), ("last",), ("prefill",))
        return self.exactly[0] if alone else {"done" if self.done else "at": list(self.exactly)}

    @property
    def by_sample(self) -> bool:
        """Whether samples of a batch may differ in whether it fires."""
        return self.of == "committed"

    def fires(self, clock: Clock) -> bool:
        """Whether a pass of this clock is one of them, for some sample at least."""
        if self.exactly == ("prefill",):
            return clock.phase in (Phase.PREFILL, Phase.REFRESH)
        if self.of == "committed":
            return any(self._within(done) for done in clock.committed)
        if self.of == "blocks":
            return self._within(clock.block / clock.n_blocks)
        return self.includes(clock.step, clock.nominal_steps)

    def fires_for(self, clock: Clock, sample: int) -> bool:
        """Whether it is one of them for one sample of the batch."""
        return self._within(clock.committed[sample]) if self.of == "committed" else self.fires(clock)

    def _within(self, done: float) -> bool:
        return done >= self.span.start - 1e-9 and (self.span.stop is None or done < self.span.stop - 1e-9)

    def includes(self, step: int, nominal_steps: int) -> bool:
        """Whether `step` of `nominal_steps` is one of them."""
        if self.exactly is not None:
            return any(step == step_index(point, nominal_steps) - self.done for point in self.exactly)
        start = step_index(self.span.start, nominal_steps)
        if step < start or (step - start) % self.span.every:
            return False
        return self.span.stop is None or step < step_index(self.span.stop, nominal_steps)


def _progress(value: dict[str, Any], start: float, stop: float | None) -> Progress:
    """What shares are shares of; other measures than steps know no step numbers."""
    of = value.get("of", "steps")
    if of not in ("steps", "committed", "blocks"):
        raise Wrong(f"should be steps, committed or blocks, but is {describe(of)}", "of")
    if of != "steps":
        for key, point in (("from", start), ("to", stop)):
            if _is_index(point) and point != 0:
                raise Wrong(f"is a share of the {of}, such as 50%, not {point}", key)
        if "every" in value:
            raise Wrong("`every` counts steps; it goes without `of`", "every")
    return cast(Progress, of)


def step_index(point: float | str, nominal_steps: int) -> int:
    """The step that an index, a share, `first` or `last` means."""
    if isinstance(point, str):
        return 0 if point == "first" else nominal_steps - 1
    return first_step(point, nominal_steps) if isinstance(point, float) else point


def _exact(points: Any, *path: str | int) -> tuple[int | float | str, ...]:
    if not points:
        raise Wrong("is an empty list: the probe would never fire", *path)
    return tuple(
        p if isinstance(p, str) and p in ("first", "last") else _number_or_share(p, "a step", *path, i)
        for i, p in enumerate(points)
    )


@dataclass(frozen=True)
class Layers:
    """At which layers a probe attaches: a span of them, or exactly the named ones, in the order named."""

    exactly: tuple[int | float, ...] | None = None
    span: Span = Span()

    @classmethod
    def parse_one(cls, value: Any) -> Layers:
        """From what stands behind `layer:`."""
        if isinstance(value, Layers):
            return value
        if isinstance(value, list | tuple | dict) or value == "all":
            raise Wrong(f"is one layer, but {describe(value)} stands here; several go to `layers`")
        return cls(exactly=(_number_or_share(value, "a layer", negative=True),))

    @classmethod
    def parse(cls, value: Any) -> Layers:
        """From what stands behind `layers:`."""
        if isinstance(value, Layers):
            return value
        if value == "all":
            return cls()
        if isinstance(value, list | tuple):
            if not value:
                raise Wrong("is an empty list: the probe would attach nowhere")
            many = (_number_or_share(v, "a layer", i, negative=True) for i, v in enumerate(value))
            return cls(exactly=tuple(many))
        if isinstance(value, dict):
            _check_keys(value, ["from", "to", "every"])
            start = _number_or_share(value.get("from", 0), "a layer", "from", negative=True)
            end = value.get("to")
            stop = None if end is None else _number_or_share(end, "a layer", "to", negative=True)
            return cls(span=Span(start, stop, _every(value)))
        raise Wrong(f"should be all, a list of layers or {{from, to, every}}, but is {describe(value)}")

    def spelled(self) -> Any:
        """As a recipe spells it."""
        if self.exactly is not None:
            return list(self.exactly)
        return "all" if self.span == Span() else self.span.spelled()

    def spelled_one(self) -> Any:
        """As a recipe spells a single one."""
        return self.spelled()[0]

    def resolve(self, n_layers: int, owner: str) -> tuple[int, ...]:
        """The layer indices on a model of `n_layers`; a layer that it does not have raises `Wrong`."""
        have = f"{owner} has layers 0..{n_layers - 1}" if n_layers else f"{owner} has none"
        if self.exactly is not None:
            found = [_layer_index(x, n_layers) for x in self.exactly]
            for i, (layer, written) in enumerate(zip(found, self.exactly, strict=True)):
                if not 0 <= layer < n_layers:
                    raise Wrong(f"there is no layer {written}: {have}", i)
                if layer in found[:i]:
                    raise Wrong(f"names layer {layer} twice", i)
            return tuple(found)
        start = _layer_index(self.span.start, n_layers)
        stop = n_layers if self.span.stop is None else _layer_index(self.span.stop, n_layers, end=True)
        if not 0 <= start < n_layers or not 0 <= stop <= n_layers:
            raise Wrong(f"reaches beyond the model: {have}")
        if start >= stop:
            raise Wrong(f"is empty: it runs from layer {start} up to, but not including, layer {stop}")
        return tuple(range(start, stop, self.span.every))


def _layer_index(value: float, n_layers: int, *, end: bool = False) -> int:
    if isinstance(value, float):  # round half to even, and 100% is the last layer
        return min(round(round(value * n_layers, 9)), n_layers if end else n_layers - 1)
    return value + n_layers if value < 0 else value


StepsField = Annotated[Steps, PlainValidator(Steps.parse), PlainSerializer(Steps.spelled)]
LayerField = Annotated[Layers, PlainValidator(Layers.parse_one), PlainSerializer(Layers.spelled_one)]
LayersField = Annotated[Layers, PlainValidator(Layers.parse), PlainSerializer(Layers.spelled)]
