"""The named values of a recipe: `--set keep=0.25` changes them, and `$keep` stands for them anywhere in the recipe.

Everything here works on plain data with positions; what the parts of a recipe mean is `recipe`'s business.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from probe.errors import ProbeError
from probe.recipe_words import Wrong, describe
from probe.recipe_yaml import Document, KeyPath, Place, read_yaml
from probe.registry import nearest

TOP_KEYS = [
    *(
        "schema",
        "name",
        "about",
        "paper",
        "include",
        "dial",
        "calibrate",
        "backbone",
        "load",
        "data",
        "generate",
        "trace",
        "run",
        "sweep",
        "probes",
    )
]
MAX_VALUES = 100_000
_INSTEAD_OF = {"file": "task", "task": "file", "layer": "layers", "layers": "layer"}
DIAL = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def apply_sets(document: Document, sets: Iterable[str]) -> None:
    """Change the document as `keep=0.25` (a dial) or `generate.steps=8` (a path) say, in order."""
    for text in sets:
        name, equals, value = text.partition("=")
        source = f"--set {text}"
        path: KeyPath = tuple(name.strip().split("."))
        if not equals or not all(path):
            raise ProbeError(f"{source}: write name=value, for example keep=0.25")
        part = read_yaml(value.strip() or "~", source)
        part.values = {p: Place(source) for p in part.values}
        part.keys = {p: Place(source) for p in part.keys}
        if len(path) == 1 and (path[0] not in ("backbone", "name") or path[0] in (document.data.get("dial") or {})):
            path = ("dial", path[0])
        _put(document, path, part, source)


def _put(document: Document, path: KeyPath, part: Document, source: str) -> None:
    dials = document.data.get("dial") or {}
    if path[0] == "dial" and (len(path) != 2 or path[1] not in dials):
        name = ".".join(map(str, path[1:]))
        if name in TOP_KEYS:
            hint = f"`{name}` is a part of the recipe; its values are set as {name}.key=value"
        else:
            hint = nearest(name, sorted(dials)) if dials else "the recipe has no dials"
        raise ProbeError(f"{source}: the recipe has no dial `{name}`; {hint}")
    if path[0] == "dial" and (refs := refs_in(part.data)):
        raise ProbeError(f"{source}: a dial holds a value, not another dial (`${refs[0]}`)")
    if path[0] not in TOP_KEYS or path[0] in ("schema", "include"):
        known = [k for k in TOP_KEYS if k not in ("schema", "include")]
        raise ProbeError(f"{source}: the recipe has no `{path[0]}` to set; {nearest(str(path[0]), known)}")
    data: Any = document.data
    done: KeyPath = ()
    for i, step in enumerate(path):
        last = i == len(path) - 1
        if isinstance(data, list):
            step = _index(data, str(step), source)
        elif not isinstance(data, dict):
            raise ProbeError(f"{source}: `{'.'.join(map(str, path[:i]))}` is {describe(data)} and holds no `{step}`")
        done = (*done, step)
        if last:
            if isinstance(data, dict):  # setting one of two that exclude each other takes the place of the other
                data.pop(_INSTEAD_OF.get(str(step), ""), None)
            data[step] = part.data
        elif isinstance(data, dict) and data.get(step) is None:
            data[step] = {}
        data = data[step]
    document.put(done, part)
    document.keys.setdefault(done, Place(source))


def _index(items: list[Any], step: str, source: str) -> int:
    """The item of a list by its number, or (a probe) by its name."""
    named = [i for i, item in enumerate(items) if isinstance(item, dict) and item.get("name") == step]
    if named:
        return named[0]
    if step.isascii() and step.isdigit() and len(step) < 6 and int(step) < len(items):
        return int(step)
    names = [str(item["name"]) for item in items if isinstance(item, dict) and "name" in item]
    hint = nearest(step, names) if names else f"it has {len(items)} items, counted from 0"
    raise ProbeError(f"{source}: there is no item `{step}`; {hint}")


def refs_in(value: Any) -> Sequence[str]:
    """Names of the dials that stand somewhere in a value."""
    if isinstance(value, dict):
        return [r for v in value.values() for r in refs_in(v)]
    if isinstance(value, list | tuple):
        return [r for v in value for r in refs_in(v)]
    return [value[1:]] if isinstance(value, str) and value[:1] == "$" and DIAL.fullmatch(value[1:]) else []


def _size(value: Any) -> int:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return 1 + sum(map(_size, items))


def substitute(data: dict[str, Any]) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    """The data with every `$dial` replaced by its value, and which dial stood where. `$$word` means the text `$word`.

    An unknown dial raises `Wrong`.
    """
    dials = data.get("dial") or {}
    sizes = {name: _size(value) for name, value in dials.items()}
    refs: dict[KeyPath, str] = {}
    room = MAX_VALUES

    def walk(value: Any, path: KeyPath) -> Any:
        nonlocal room
        if isinstance(value, dict):
            return {k: walk(v, (*path, k)) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [walk(v, (*path, i)) for i, v in enumerate(value)]
        if isinstance(value, str) and value.startswith("$"):
            if value.startswith("$$") and DIAL.fullmatch(value[2:]):
                return value[1:]
            if DIAL.fullmatch(value[1:]):
                if value[1:] not in dials:
                    hint = nearest(value[1:], sorted(dials)) if dials else "the recipe has no dials"
                    raise Wrong(f"there is no dial `{value}`; {hint}", *path)
                refs[path] = value[1:]
                room -= sizes[value[1:]]
                if room < 0:
                    raise Wrong(f"the dials unfold to more than {MAX_VALUES} values, which no recipe needs", *path)
                return dials[value[1:]]
        return value

    return {k: v if k == "dial" else walk(v, (k,)) for k, v in data.items()}, refs
