"""Pydantic's complaints about a recipe as sentences that a user can act on, each with the path that it is about."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError

from probe.recipe_yaml import KeyPath
from probe.registry import nearest


class Wrong(ValueError):
    """A fault found by a validator: a sentence, and where it is, relative to the value that was validated."""

    def __init__(self, sentence: str, *path: str | int) -> None:
        super().__init__(sentence)
        self.path: KeyPath = path


def short(text: str) -> str:
    """A text on one line and of bounded length, for a message."""
    line = text.replace("\n", "\\n").replace("\r", "\\r")
    return line if len(line) <= 60 else line[:57] + "..."


def describe(value: Any) -> str:
    """A value as a reader of the recipe would call it."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text `{short(value)}`"
    return "a mapping" if isinstance(value, dict) else "a list"


def names_of(model: type[BaseModel]) -> list[str]:
    """The keys that a model accepts, as they are spelled in a recipe."""
    return [f.alias or name for name, f in model.model_fields.items()]


def check_keys(model: type[BaseModel], data: Any) -> None:
    """Raise `Wrong` when a mapping is not one or has a key that the model does not know."""
    if not isinstance(data, dict):
        raise Wrong(f"should be a mapping with the keys {', '.join(names_of(model))}, but is {describe(data)}")
    for key in data:
        if key not in names_of(model):
            raise Wrong(f"unknown key `{short(str(key))}`; {nearest(key, names_of(model))}", key)


def first_fault(error: ValidationError, data: Any) -> tuple[KeyPath, str]:
    """The fault to show: the deepest of the first place that is wrong, all alternatives of a union in one sentence."""
    faults: dict[KeyPath, list[str]] = {}
    for item in error.errors(include_url=False):
        path, value = _walk(item["loc"], data)
        sentence = _sentence(item, value)
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, Wrong):
            path += cause.path
        if item["type"] == "missing":
            path += (str(item["loc"][-1]),)
        if sentence not in faults.setdefault(path, []):
            faults[path].append(sentence)
    first = next(iter(faults))
    path = max((p for p in faults if p[: len(first)] == first), key=len)
    wanted = [s.removeprefix("should be ") for s in faults[path]]
    if len(wanted) > 1 and all(s.startswith("should be ") for s in faults[path]):
        *heads, last = wanted
        *_, value = _walk(path, data)
        wishes = [head.split(", but is ")[0] for head in heads]
        return (
            path,
            f"should be {', '.join(wishes)} or {last.split(', but is ')[0]}, but is {describe(value)}",
        )
    return path, faults[path][0]


def _walk(loc: tuple[str | int, ...], data: Any) -> tuple[KeyPath, Any]:
    """Follow a pydantic location through the data; names of union members in it are no keys and are skipped."""
    path: KeyPath = ()
    for step in loc:
        inside = isinstance(data, dict) and step in data
        if inside or (isinstance(data, list | tuple) and isinstance(step, int) and step < len(data)):
            data = data[step]
            path = (*path, step)
    return path, data


_WANTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "tuple": "a list",
    "set": "a list",
    "dict": "a mapping",
    "model": "a mapping",
    "none_required": "empty",
    "int_from_float": "a whole number",
}


def _sentence(item: Any, value: Any) -> str:
    kind, context = item["type"], item.get("ctx", {})
    if kind == "missing":
        return "is missing"
    if kind == "extra_forbidden":
        return "unknown key"
    if kind in ("literal_error", "enum"):
        choices = [c.strip(" '\"") for c in str(context["expected"]).replace(" or ", ", ").split(",")]
        return f"{describe(value)} is none of the choices; {nearest(str(value), choices)}"
    if kind == "value_error":
        return str(context["error"])
    if kind == "string_pattern_mismatch":
        allowed = "letters, digits, spaces and _ . + = @ , - (and / between parts)"
        return f"cannot be a name: use {allowed}, but is {describe(value)}"
    bare = kind.removesuffix("_type").removesuffix("_parsing")
    if bare in _WANTED:
        hint = ""
        if bare == "bool" and str(value).lower() in ("yes", "no", "on", "off"):
            hint = " (yes, no, on and off are words here)"
        if bare == "string" and isinstance(value, int | float):
            hint = "; put it in quotes"
        return f"should be {_WANTED[bare]}, but is {describe(value)}{hint}"
    words = {
        "greater_than": "more than {gt}",
        "greater_than_equal": "at least {ge}",
        "less_than": "less than {lt}",
        "less_than_equal": "at most {le}",
    }
    if kind in words:
        return f"should be {words[kind].format(**context)}, but is {describe(value)}"
    return f"{item['msg'][0].lower()}{item['msg'][1:]}, but is {describe(value)}"
