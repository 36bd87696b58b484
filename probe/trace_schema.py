"""What a trace holds, as plain data: variables, the record of one sample, the header. Knows nothing of HDF5."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from probe.errors import ProbeError
from probe.registry import nearest

CONVENTIONS = "probe-trace-1"

DTYPES: tuple[str, ...] = ("float32", "float64", "int64", "int32", "int16", "int8", "uint8")
"""Number types that HDF5, netCDF4 and xarray all read alike (so neither float16 nor bool)."""

TEXTS: dict[str, str] = {
    "sample_id": "name of the sample in its data set",
    "task": "task that the sample belongs to",
    "question": "what was asked",
    "reference": "accepted answers, as a JSON list of strings",
    "prediction": "what the model answered",
    "metric": "how the score was computed",
    "failed": "why the sample failed; empty if it did not",
}
"""The text variables of every trace, (sample,), and what they hold."""

RESERVED: frozenset[str] = frozenset({"sample", "score", "pictures", "checksums", *TEXTS})
"""Names that a declared variable cannot have."""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_TIME_UNITS = {"seconds": "s", "milliseconds": "ms", "microseconds": "us", "nanoseconds": "ns"}


@dataclass(frozen=True)
class Variable:
    """One recorded quantity. `dims` are its axes without the leading `sample`, e.g. `("step", "layer", "visual")`.

    `fill` stands where a sample has no value (it is shorter than another, it failed, nothing was recorded): by
    default NaN for floats, -1 for signed and 0 for unsigned integers. Only floats declare it as `_FillValue`;
    readers would turn integers (token ids) into floats if they did.
    """

    name: str
    dims: tuple[str, ...]
    units: str
    long_name: str
    formula: str = ""
    probe: str = ""
    dtype: str = "float32"
    flags: Mapping[str, int] | None = None
    fill: float | int | None = None

    def __post_init__(self) -> None:
        """Refuse what netCDF tools could not read."""
        here = f"trace variable `{self.name}`"
        for name in (self.name, *self.dims):
            if not _NAME.fullmatch(name):
                raise ProbeError(f"{here}: `{name}` is no name; use letters, digits and _, and begin with a letter")
        if self.name in RESERVED or (self.name.startswith("n_") and self.name[2:] in self.dims):
            raise ProbeError(f"{here}: every trace already has a variable of this name; choose another")
        if self.name in self.dims:
            raise ProbeError(f"{here}: a variable cannot be called like one of its axes {self.dims}")
        if "sample" in self.dims or len(set(self.dims)) < len(self.dims):
            raise ProbeError(
                f"{here}: axes {self.dims} must differ from each other and leave out `sample` (it always leads); "
                "for two axes of one kind, name the second e.g. `segment_key`"
            )
        if self.dtype not in DTYPES:
            raise ProbeError(f"{here}: dtype `{self.dtype}` cannot be stored; {nearest(self.dtype, list(DTYPES))}")
        # xarray turns numbers in "seconds" into timedelta64; the SI symbol leaves them numbers
        object.__setattr__(self, "units", _TIME_UNITS.get(self.units, self.units))
        object.__setattr__(self, "dims", tuple(self.dims))

    @property
    def is_float(self) -> bool:
        """Whether values are floats (and missing ones NaN)."""
        return self.dtype.startswith("float")

    @property
    def fill_value(self) -> float | int:
        """What stands where a sample has no value."""
        if self.fill is not None:
            return self.fill
        return float("nan") if self.is_float else 0 if self.dtype.startswith("u") else -1


@dataclass(frozen=True, eq=False)
class SampleRecord:
    """Everything about one sample. `sample` counts in the run's data, before sharding; `score` is NaN if there is
    no reference; `arrays` maps variable names to arrays with exactly the axes of their `Variable`, of any length;
    `picture` is a PNG. A failed sample has a reason and no arrays.
    """

    sample: int
    sample_id: str = ""
    task: str = ""
    question: str = ""
    references: tuple[str, ...] = ()
    prediction: str = ""
    metric: str = ""
    score: float = float("nan")
    failed: str = ""
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    picture: bytes | None = None

    def texts(self) -> dict[str, str]:
        """The text variables (`TEXTS`) as they are stored."""
        references = json.dumps(list(self.references), ensure_ascii=False)
        values = (self.sample_id, self.task, self.question, references, self.prediction, self.metric, self.failed)
        return {name: storable(value) for name, value in zip(TEXTS, values, strict=True)}


@dataclass(frozen=True)
class TraceHeader:
    """What is true of the whole run. `created` is ISO 8601. `coords` names the places of axes of fixed length, such
    as `{"segment": ["answer"], "phase": ["prefill", "denoise"]}`; all other axes may differ from sample to sample.
    """

    recipe_name: str
    recipe_yaml: str
    recipe_hash: str
    backbone: str
    weights_revision: str = ""
    dtype: str = ""
    attention_kernel: str = ""
    device: str = ""
    seed: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str = ""
    command: str = ""
    coords: Mapping[str, Sequence[str]] = field(default_factory=dict)
    extra: Mapping[str, str | int | float] = field(default_factory=dict)

    def attributes(self) -> dict[str, str | int | float]:
        """The root attributes of the file (all but `coords`, which are variables there)."""
        own: dict[str, str | int | float] = {
            "Conventions": CONVENTIONS,
            "recipe_name": storable(self.recipe_name),
            "recipe": storable(self.recipe_yaml),
            "recipe_hash": self.recipe_hash,
            "backbone": self.backbone,
            "weights_revision": self.weights_revision,
            "dtype": self.dtype,
            "attention_kernel": self.attention_kernel,
            "device": self.device,
            "seed": int(self.seed),
            "environment": json.dumps(dict(self.versions), sort_keys=True),
            "created": self.created,
            "command": storable(self.command),
        }
        taken = sorted({*own, *INTERNAL_ATTRIBUTES} & set(self.extra))
        if taken:
            raise ProbeError(f"trace header: extra attributes {taken} already mean something else; rename them")
        for name, value in self.extra.items():
            if not isinstance(value, str | int | float):
                kind = type(value).__name__
                raise ProbeError(f"trace header: extra attribute `{name}` is a {kind}; give a text or a number")
            own[name] = storable(value) if isinstance(value, str) else int(value) if isinstance(value, int) else value
        return own

    @classmethod
    def from_attributes(cls, attrs: Mapping[str, Any], coords: Mapping[str, Sequence[str]]) -> TraceHeader:
        """The inverse of `attributes`; missing ones are empty (a damaged file must still be showable)."""
        get = {k: v.item() if isinstance(v, np.generic) else v for k, v in attrs.items()}
        known = {**{n: n for n in cls.__dataclass_fields__}, "recipe_yaml": "recipe", "versions": "environment"}
        for name in ("coords", "extra"):
            del known[name]
        try:
            versions = json.loads(get.get("environment", "{}"))
        except (TypeError, ValueError):
            versions = {"unreadable": str(get.get("environment"))}
        extra = {k: v for k, v in get.items() if k not in {*known.values(), *INTERNAL_ATTRIBUTES}}
        plain: dict[str, Any] = {field_: get.get(name, "") for field_, name in known.items() if field_ != "versions"}
        plain["seed"] = int(plain["seed"] or 0)
        return cls(**plain, versions=versions, coords=dict(coords), extra=extra)


INTERNAL_ATTRIBUTES: tuple[str, ...] = ("Conventions", "trace_id", "header_crc32", "_NCProperties")
"""Root attributes that the writer sets by itself."""


def storable(text: str) -> str:
    """Text that HDF5 can hold: strings end at NUL there, and must be valid UTF-8. NUL becomes the picture of it."""
    return text.replace("\0", "\N{SYMBOL FOR NULL}").encode("utf-8", "backslashreplace").decode("utf-8")


def check_array(variable: Variable, array: Any, where: str) -> np.ndarray:
    """The array as it will be stored (dtype of the variable, C order, little endian), if nothing is lost by it."""
    given = np.asarray(array)
    if given.ndim != len(variable.dims):
        raise ProbeError(
            f"{where}: `{variable.name}` has shape {given.shape}, but its axes are {variable.dims}: "
            f"{len(variable.dims)} dimensions, not {given.ndim}"
        )
    if given.dtype.kind not in "biuf":
        raise ProbeError(f"{where}: `{variable.name}` holds {given.dtype}; only numbers can be stored")
    wanted = np.dtype(variable.dtype).newbyteorder("<")
    with np.errstate(all="ignore"):
        stored = np.ascontiguousarray(given, dtype=wanted).reshape(given.shape)
    if not variable.is_float and given.dtype != wanted and not np.array_equal(stored, given):
        raise ProbeError(
            f"{where}: `{variable.name}` holds values that {variable.dtype} cannot (from {given.min()} to "
            f"{given.max()}); store integers in range, or declare another dtype"
        )
    return stored


def check_declarations(variables: Sequence[Variable], coords: Mapping[str, Sequence[str]], where: str) -> None:
    """Refuse variables, axes and extents that would need one name."""
    names = [v.name for v in variables]
    axes = {axis for v in variables for axis in v.dims} | set(coords)
    extents = {f"n_{axis}" for axis in axes - set(coords)}
    twice = [n for n in names if names.count(n) > 1]
    clash = sorted({n for n in names if n in axes | extents} | (axes & RESERVED) | set(twice))
    if clash:
        raise ProbeError(
            f"{where}: `{clash[0]}` is the name of two things (variables, axes, the extents n_AXIS); rename one"
        )


def extents_of(
    arrays: Mapping[str, np.ndarray],
    variables: Mapping[str, Variable],
    coords: Mapping[str, Sequence[str]],
    where: str,
) -> dict[str, int]:
    """The length of every axis of one sample; arrays of one sample must agree on every axis that they share."""
    extents: dict[str, int] = {axis: len(names) for axis, names in coords.items()}
    source: dict[str, str] = {}
    for name, array in arrays.items():
        for axis, length in zip(variables[name].dims, array.shape, strict=True):
            if extents.setdefault(axis, length) != length:
                told = f"`{source[axis]}` has" if axis in source else "the header names"
                raise ProbeError(
                    f"{where}: axis `{axis}` has {length} places in `{name}` {array.shape}, but {told} {extents[axis]}"
                )
            source.setdefault(axis, name)
    return extents


def record_crc(record: SampleRecord, extents: Mapping[str, int]) -> int:
    """CRC-32 of what is not an array: number, texts, score, extents."""
    score = np.float64(record.score).tobytes().hex()
    content = [int(record.sample), record.texts(), score, sorted((a, int(n)) for a, n in extents.items())]
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def header_crc(attributes: Mapping[str, Any], coords: Mapping[str, Sequence[str]], names: Iterable[Variable]) -> int:
    """CRC-32 of the root attributes, the coordinates and the declared variables."""
    own = {k: str(v) for k, v in attributes.items() if k not in ("trace_id", "header_crc32", "_NCProperties")}
    declared = sorted(describe(v) for v in names)
    return zlib.crc32(json.dumps([own, {k: list(v) for k, v in coords.items()}, declared], sort_keys=True).encode())


def describe(variable: Variable) -> list[Any]:
    """A variable as plain comparable data, in the order in which two of them should be compared."""
    flags = sorted((k.lower(), int(v)) for k, v in (variable.flags or {}).items())
    return [
        variable.name, list(variable.dims), variable.dtype, variable.units, variable.long_name, variable.formula,
        variable.probe, repr(float(variable.fill_value)), flags,
    ]  # fmt: skip


def differences(
    old: TraceHeader, old_variables: Iterable[Variable], new: TraceHeader, new_variables: Iterable[Variable]
) -> list[str]:
    """Why samples of two runs cannot stand in one file, one phrase each. No variables at all differ from none."""
    found = [
        f"{name} was `{getattr(old, name)}` and is now `{getattr(new, name)}`"
        for name in ("recipe_hash", "backbone", "weights_revision", "dtype")
        if getattr(old, name) != getattr(new, name)
    ]
    for axis in sorted({*old.coords, *new.coords}):
        was, now = list(old.coords.get(axis, ())), list(new.coords.get(axis, ()))
        if was != now:
            found.append(f"axis `{axis}` was {was} and is now {now}")
    a, b = {v.name: describe(v) for v in old_variables}, {v.name: describe(v) for v in new_variables}
    for name in sorted({*a, *b}) if a else ():
        if name not in a or name not in b:
            found.append(f"variable `{name}` is {'new' if name in b else 'gone'}")
        elif a[name] != b[name]:
            was, now = next((x, y) for x, y in zip(a[name], b[name], strict=True) if x != y)
            found.append(f"variable `{name}` was declared with `{was}` and is now with `{now}`")
    return found
