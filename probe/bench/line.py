"""One line of the table: what was measured, against what, and whether that is what was promised."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from probe.bench.turns import Spread

Kind = Literal["at most", "at least", "reported"]


@dataclass(frozen=True)
class Target:
    """A bound, and on which side of it a measurement must be. `reported`: there is no bound."""

    kind: Kind
    bound: float = float("nan")
    unit: str = "x"

    def met(self, value: float) -> bool | None:
        """Whether a value keeps to it; None where there is nothing to keep to."""
        if self.kind == "reported":
            return None
        return value <= self.bound if self.kind == "at most" else value >= self.bound

    def __str__(self) -> str:
        sign = {"at most": "≤ ", "at least": "≥ ", "reported": "reported"}[self.kind]
        return sign if self.kind == "reported" else f"{sign}{written(self.bound, self.unit)}"


@dataclass(frozen=True)
class Line:
    """A line of the table.

    `value` is the ratio (unit `x`), share (`%`) or number that the target is about, None where it was not measured for
    the reason in `note`; `cpu` the same by processor time. `equal` says which outputs were compared, and that they
    are equal: without it a line has no value. `shape` is what ran.
    """

    row: str
    what: str
    target: Target
    value: Spread | None = None
    cpu: Spread | None = None
    equal: str = ""
    shape: str = ""
    note: str = ""
    numbers: dict[str, float] = field(default_factory=dict)
    """Further numbers by name, for the file: seconds of each side, FLOPs."""

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None where nothing was measured or nothing was promised."""
        return None if self.value is None else self.target.met(self.value.median)

    def record(self) -> dict[str, Any]:
        """The line as data."""
        return asdict(self) | {"target": str(self.target), "met": self.met}


def written(value: float, unit: str) -> str:
    """A number with its unit, as the table has it."""
    match unit:
        case "%":
            return f"{100 * value:.2f}%" if abs(value) < 0.0995 else f"{100 * value:.1f}%"
        case "x":
            return f"{value:.3f}x" if value < 10 else f"{value:.1f}x"
        case _:
            return f"{value:.3g} {unit}"
