"""`when:` as a recipe writes it: a scalar of a sample, and what it must be for an intervention to act. No tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import PlainSerializer, PlainValidator

from probe.recipe_at import Layers
from probe.recipe_words import Wrong, describe
from probe.registry import nearest
from probe.site import SEGMENTS

Test = Literal["above", "below", "rising", "falling"]
TESTS: tuple[Test, ...] = ("above", "below", "rising", "falling")
LOGIT_SIGNALS = ("confidence", "entropy", "margin")
SIGNALS = ("attention_mass", *LOGIT_SIGNALS, "committed")


@dataclass(frozen=True)
class Condition:
    """A scalar of a sample, and a test on it.

    `attention_mass` is the share of attention that rows of `source` pay to keys of `target`, averaged over `layers`;
    `confidence`, `entropy`, `margin` are means over the slots that could be committed; `committed` is the share of the
    answer that holds a token. `above` and `below` compare with `value`; `rising` and `falling` compare the change since
    the pass before with it.
    """

    signal: str
    test: Test
    value: float
    source: str = "answer"
    target: str = "visual"
    layers: Layers = field(default_factory=Layers)
    once: bool = True

    @classmethod
    def parse(cls, given: Any) -> Condition:
        """From one entry of `when:`."""
        if isinstance(given, Condition):
            return given
        if not isinstance(given, dict):
            raise Wrong(f"should be a mapping such as {{signal: confidence, above: 0.9}}, but is {describe(given)}")
        known = ["signal", "from", "to", "layers", "once", *TESTS]
        for key in given:
            if key not in known:
                raise Wrong(f"unknown key `{key}`; {nearest(str(key), known)}", key)
        signal = given.get("signal")
        if signal not in SIGNALS:
            raise Wrong(f"`{signal}` is no signal to wait for; {nearest(str(signal), list(SIGNALS))}", "signal")
        tests = [t for t in TESTS if t in given]
        if len(tests) != 1:
            raise Wrong(f"needs exactly one of {', '.join(TESTS)}, with a number")
        value = given[tests[0]]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise Wrong(f"should be a number, but is {describe(value)}", tests[0])
        if signal != "attention_mass" and (extra := [k for k in ("from", "to", "layers") if k in given]):
            raise Wrong(f"`{extra[0]}` belongs to the signal attention_mass, not to {signal}", extra[0])
        source, target = given.get("from", "answer"), given.get("to", "visual")
        if source not in SOURCES:
            raise Wrong(f"there are no rows `{source}`; {nearest(str(source), list(SOURCES))}", "from")
        if target not in SEGMENTS:
            raise Wrong(f"there is no segment `{target}`; {nearest(str(target), list(SEGMENTS))}", "to")
        once = given.get("once", True)
        if not isinstance(once, bool):
            raise Wrong(f"should be true or false, but is {describe(once)}", "once")
        return cls(signal, tests[0], float(value), source, target, Layers.parse(given.get("layers", "all")), once)

    def spelled(self) -> dict[str, Any]:
        """As a recipe spells it."""
        out: dict[str, Any] = {"signal": self.signal}
        if self.signal == "attention_mass":
            out |= {"from": self.source, "to": self.target, "layers": self.layers.spelled()}
        return out | {self.test: self.value} | ({} if self.once else {"once": False})

    def in_words(self) -> str:
        """For `probe check`."""
        what = self.signal
        if self.signal == "attention_mass":
            layers = "" if self.layers == Layers() else f" of layers {self.layers.spelled()}"
            what = f"the attention{layers} from {self.source} to {self.target}"
        change = {"rising": "rises by at least", "falling": "falls by at least"}.get(self.test, f"is {self.test}")
        return f"{what} {change} {self.value:g}"

    def holds(self, history: Sequence[float]) -> bool:
        """Whether the last of a sample's values passes the test. NaN never does."""
        if not history:
            return False
        now = history[-1]
        if self.test in ("above", "below"):
            return now > self.value if self.test == "above" else now < self.value
        if len(history) < 2:
            return False
        change = now - history[-2]
        return change >= self.value if self.test == "rising" else -change >= self.value


SOURCES = ("answer", "masked", "filled", "predicting", "last", "last_prompt", "question", "system")
"""Rows whose attention a condition can wait for."""


def parse_when(given: Any) -> tuple[Condition, ...]:
    """From what stands behind `when:`: one condition, or a list of which all must hold."""
    if isinstance(given, tuple) and all(isinstance(c, Condition) for c in given):
        return given
    if isinstance(given, list):
        if not given:
            raise Wrong("is an empty list: name at least one condition")
        out = []
        for i, item in enumerate(given):
            try:
                out.append(Condition.parse(item))
            except Wrong as error:
                raise Wrong(str(error), i, *error.path) from None
        return tuple(out)
    return (Condition.parse(given),)


def _spelled(conditions: tuple[Condition, ...]) -> Any:
    return [c.spelled() for c in conditions]


WhenField = Annotated[tuple[Condition, ...], PlainValidator(parse_when), PlainSerializer(_spelled)]
