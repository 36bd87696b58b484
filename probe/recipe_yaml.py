"""Reading a recipe's YAML as plain data with a position for every key and value, and writing it back.

Nothing is constructed but dicts, lists, strings, numbers, booleans and nulls; the reader walks the parser's events, so
a hostile file cannot recurse, expand or run anything. Scalars follow YAML 1.2's core schema: `yes`, `no`, `on` and
`off` are words, `1e-3` is a number. This module knows nothing of recipes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml

from probe.errors import ProbeError

MAX_BYTES = 256 * 1024
MAX_DEPTH = 32
MAX_INT = 2**63 - 1

KeyPath = tuple[str | int, ...]
"""Where a value stands in the data: mapping keys and list indices from the top."""


@dataclass(frozen=True)
class Place:
    """Where something was written: a file (or `--set keep=2`), a line and a column, both counted from 1."""

    source: str
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}:{self.column}"


@dataclass
class Document:
    """Plain data and, per path, the place of its value and of its key."""

    data: Any
    values: dict[KeyPath, Place] = field(default_factory=dict)
    keys: dict[KeyPath, Place] = field(default_factory=dict)

    def place(self, path: KeyPath, *, key: bool = False) -> Place:
        """The place of the value at `path` (or of its key), else of the nearest thing around it."""
        if key and path in self.keys:
            return self.keys[path]
        for length in range(len(path), -1, -1):
            found = self.values.get(path[:length]) or self.keys.get(path[:length])
            if found:
                return found
        return Place("<recipe>")

    def below(self, path: KeyPath) -> Document:
        """The part of the document at `path` as a document of its own."""
        data = self.data
        for step in path:
            data = data[step]
        n = len(path)
        return Document(
            data,
            {p[n:]: place for p, place in self.values.items() if p[:n] == path},
            {p[n:]: place for p, place in self.keys.items() if p[:n] == path and len(p) > n},
        )

    def items(self, path: KeyPath) -> list[Document]:
        """The items of the list at `path`, each as a document of its own."""
        part = self.below(path)
        parts = [Document(item) for item in part.data or []]
        for p, place in part.values.items():
            if p:
                parts[int(p[0])].values[p[1:]] = place
        for p, place in part.keys.items():
            if len(p) > 1:
                parts[int(p[0])].keys[p[1:]] = place
        return parts

    def put(self, path: KeyPath, part: Document) -> None:
        """Note the places of `part`, which the caller has put into `data` at `path`, in place of what stood there."""
        n = len(path)
        self.values = {p: place for p, place in self.values.items() if p[:n] != path}
        self.keys = {p: place for p, place in self.keys.items() if p[:n] != path or len(p) == n}
        self.values.update({path + p: place for p, place in part.values.items()})
        self.keys.update({path + p: place for p, place in part.keys.items()})


def list_of(parts: list[Document], place: Place) -> Document:
    """Documents as the items of one list."""
    whole = Document([part.data for part in parts], {(): place})
    for i, part in enumerate(parts):
        whole.values.update({(i, *p): found for p, found in part.values.items()})
        whole.keys.update({(i, *p): found for p, found in part.keys.items()})
    return whole


def read_yaml(text: str | bytes, source: str) -> Document:
    """One YAML document as plain data with positions; every fault is a `ProbeError` that says where."""
    if len(text) > MAX_BYTES or (isinstance(text, str) and len(text.encode("utf-8", "replace")) > MAX_BYTES):
        raise ProbeError(f"{source}: longer than {MAX_BYTES // 1024} KiB, which no recipe needs")
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ProbeError(f"{source}: not UTF-8 text (byte {error.start}); a recipe is a YAML text file") from None
    text = text.removeprefix("\ufeff")
    try:
        return _Reader(text, source).read()
    except yaml.YAMLError as error:
        raise ProbeError(_syntax(error, source)) from None
    except (
        ValueError,
        OverflowError,
        IndexError,
    ) as error:  # impossible escapes and directives slip through PyYAML
        raise ProbeError(f"{source}: not valid YAML ({str(error)[:60]})") from None


def _syntax(error: yaml.YAMLError, source: str) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    where = Place(source, mark.line + 1, mark.column + 1) if mark else Place(source)
    parts = [getattr(error, "context", None), getattr(error, "problem", None)]
    words = ", ".join(p for p in parts if p) or getattr(error, "reason", None) or str(error).split("\n", 1)[0]
    hint = "; indent with spaces" if "'\\t'" in words else ""
    return f"{where}: not valid YAML: {words}{hint}"


class _Reader:
    """Builds the document out of PyYAML's events. Recursion is bounded by `MAX_DEPTH`."""

    def __init__(self, text: str, source: str) -> None:
        self.source = source
        self.events: Iterator[Any] = iter(yaml.parse(text, Loader=yaml.SafeLoader))
        self.document = Document(None)

    def read(self) -> Document:
        next(self.events)  # stream start
        event = next(self.events)
        if isinstance(event, yaml.StreamEndEvent):
            raise ProbeError(f"{self.source}: is empty; a recipe starts with `schema: 1`")
        self.document.data = self.node(next(self.events), (), 0)
        next(self.events)  # document end
        after = next(self.events)
        if not isinstance(after, yaml.StreamEndEvent):
            self.fail(after, "a second document starts here; a recipe is one YAML document")
        return self.document

    def at(self, event: Any) -> Place:
        return Place(self.source, event.start_mark.line + 1, event.start_mark.column + 1)

    def fail(self, event: Any, words: str) -> NoReturn:
        raise ProbeError(f"{self.at(event)}: {words}")

    def node(self, event: Any, path: KeyPath, depth: int) -> Any:
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            self.fail(event, "YAML anchors and aliases are not read; use a dial (`$name`) or `include`")
        if depth > MAX_DEPTH:
            self.fail(event, f"nested deeper than {MAX_DEPTH} levels")
        self.document.values[path] = self.at(event)
        if isinstance(event, yaml.ScalarEvent):
            return self.scalar(event)
        kind = "map" if isinstance(event, yaml.MappingStartEvent) else "seq"
        if event.tag not in (None, "!", f"tag:yaml.org,2002:{kind}"):
            self.fail(event, f"the tag `{event.tag}` is not read; a recipe is plain data")
        return self.mapping(path, depth) if kind == "map" else self.sequence(path, depth)

    def sequence(self, path: KeyPath, depth: int) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            items.append(self.node(event, (*path, len(items)), depth + 1))
        return items

    def mapping(self, path: KeyPath, depth: int) -> dict[str, Any]:
        items: dict[str, Any] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                self.fail(event, "a key must be a word; lists and mappings cannot be keys")
            if event.anchor:
                self.fail(event, "YAML anchors and aliases are not read; use a dial (`$name`) or `include`")
            value = self.scalar(event)
            if value is None or isinstance(value, bool):
                self.fail(event, f"`{event.value}` cannot be a key; quote it if it is meant as a word")
            key: str = value if isinstance(value, str) else event.value  # numbers (in schedules) stay as written
            if key in items:
                first = self.document.keys[(*path, key)].line
                self.fail(event, f"the key `{key}` stands twice (first in line {first}); keep one of them")
            self.document.keys[(*path, key)] = self.at(event)
            items[key] = self.node(next(self.events), (*path, key), depth + 1)
        return items

    def scalar(self, event: Any) -> Any:
        text: str = event.value
        if _NO_TEXT.search(text):
            self.fail(event, "the text holds a control character, or half of a surrogate pair")
        tag = (event.tag or "").removeprefix("tag:yaml.org,2002:")
        if tag in ("!", "str") or (not tag and event.style is not None):
            return text
        if tag not in ("", "null", "bool", "int", "float"):
            self.fail(event, f"the tag `{event.tag}` is not read; a recipe is plain data")
        try:
            value = plain_scalar(text)
        except ValueError as error:
            self.fail(event, str(error))
        wanted = {"null": type(None), "bool": bool, "int": int, "float": float}.get(tag)
        if wanted is float and type(value) is int:
            return float(value)
        if wanted is not None and type(value) is not wanted:
            self.fail(event, f"`{text}` is no {tag}")
        return value


_NO_TEXT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")
_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


def plain_scalar(text: str) -> bool | int | float | str | None:
    """What an unquoted YAML scalar means. Raises ValueError for numbers that would surprise."""
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _INT.fullmatch(text):
        digits = text.lstrip("+-")
        if len(digits) > 1 and digits.startswith("0"):
            raise ValueError(
                f"`{text[:30]}` starts with a zero; write the number without it, or quote it if it is a word"
            )
        if len(digits) > 19 or abs(int(text)) > MAX_INT:
            raise ValueError("a whole number beyond 64 bits")
        return int(text)
    if _FLOAT.fullmatch(text):
        number = float(text)
        if math.isinf(number):
            raise ValueError("a number larger than a recipe can hold")
        return number
    if _NOT_FINITE.fullmatch(text):
        raise ValueError(f"`{text}`: numbers in a recipe are finite")
    return text


class _Dumper(yaml.SafeDumper):
    """Writes plain what `plain_scalar` reads as the same value, and quotes every other string."""

    def ignore_aliases(self, data: Any) -> bool:
        """The reader refuses aliases, so a value that occurs twice is written twice."""
        return True


_Dumper.yaml_implicit_resolvers = {}
_Dumper.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(rf"^({_NULL.pattern})$"), [*"~nN", ""])
_Dumper.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(rf"^({_BOOL.pattern})$"), [*"tTfF"])
_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(rf"^({_INT.pattern})$"), [*"+-0123456789"])
_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(rf"^({_FLOAT.pattern}|{_NOT_FINITE.pattern})$"), [*"+-.0123456789"]
)


def dump_yaml(data: Any) -> str:
    """Plain data as YAML that `read_yaml` reads back as the same data; short mappings and lists stay on one line."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)
    return text
