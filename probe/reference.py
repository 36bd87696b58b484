"""The reference of the vocabulary, written from the registries: every word with its parameters and what it does.

`python -m probe.reference` writes docs/reference.md anew; `python -m probe.reference -` prints it. A test compares the
page with what would be written, so it cannot fall behind the code.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Literal, get_args, get_origin, get_type_hints

import probe.vocabulary  # noqa: F401  (registers the built-in parts)
from probe import operations as operation_parts
from probe import registry
from probe import scores as score_parts
from probe import selections as selection_parts
from probe import signals as signal_parts
from probe.registry import Entry, Registry
from probe.selections import counts
from probe.site import EDIT_SITES, Site

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference.md"
HEAD = """# Reference

Every word that a recipe may use, written from the code by `python -m probe.reference`: do not change it by hand.
[recipes.md](recipes.md) says how the words go together, [backbones.md](backbones.md) which decoder is whose,
[python.md](python.md) how to add words of one's own.

In a signature, what stands before `*` is given by the engine; what stands behind it may be set in a recipe.
"""
CHAPTERS: tuple[tuple[str, str, Registry, ModuleType | None], ...] = (
    ("Scores", "`score`: what each visual token is worth.", registry.scores, score_parts),
    ("Selections", "`select`: which visual tokens stay.", registry.selections, selection_parts),
    ("Operations", "`do`: what becomes of the others.", registry.operations, operation_parts),
    ("Signals", "`record`: what is kept in the trace.", registry.signals, signal_parts),
    ("Unmasking", "`generate.unmask`: which slots are decided in a pass, and how.", registry.unmaskings, None),
    ("Caches", "`generate.cache`: which rows a pass computes anew.", registry.cachings, None),
    ("Lengths", "`generate.length`: whether answer slots come or go.", registry.lengths, None),
)


def page() -> str:
    """The whole page."""
    parts = [HEAD, _sites(), "## Counts\n\n`keep`, wherever a selection takes it.\n\n" + _table(counts)]
    for title, about, words, module in CHAPTERS:
        parts.append(f"## {title}\n\n{about}\n" + ("" if module is None else "\n" + _inputs(module)))
        parts += [_entry(entry) for entry in words if entry.function.__module__.startswith("probe.")]
    return "\n".join(part.rstrip() + "\n" for part in parts)


def _sites() -> str:
    """The places of `at.site`, with the comments that stand beside them in the source."""
    said = dict(re.findall(r'^    [A-Z_]+ = "([\w.]+)"(?:  # (.*))?$', inspect.getsource(Site), re.MULTILINE))
    rows = [f"| `{s}` | {said.get(s.value, '')} | {'yes' if s in EDIT_SITES else ''} |" for s in Site]
    head = "## Sites\n\n`at.site`: where a probe attaches; whether tokens can be taken away there.\n\n"
    return head + "| site | what is there | edits |\n|---|---|---|\n" + "\n".join(rows) + "\n"


def _doc(thing: object) -> str:
    return inspect.cleandoc(getattr(thing, "__doc__", None) or "")


def _table(module: ModuleType) -> str:
    """The table in a module's docstring."""
    return "\n".join(line for line in _doc(module).splitlines() if line.startswith("|")) + "\n"


def _inputs(module: ModuleType) -> str:
    """What a module's docstring says behind its first line: what its functions are given."""
    return _doc(module).split("\n", 1)[-1].strip() + "\n"


def _entry(entry: Entry) -> str:
    """One word: its signature, where it belongs, and its docstring."""
    told = [text for key, text in _told(entry) if key]
    lines = [f"### {entry.name}", "", "```text", _signature(entry), "```", ""]
    return "\n".join([*lines, *(f"{text}\n" for text in told), _doc(entry.function)]) + "\n"


def _told(entry: Entry) -> Iterator[tuple[bool, str]]:
    meta = entry.meta
    kind = meta.get("kind")
    yield kind in ("pairwise", "features"), f"Gives: {kind}."
    sites = meta.get("sites", meta.get("site"))
    places = [sites] if isinstance(sites, Site) else list(sites or ())
    yield bool(places), "At: " + ", ".join(f"`{s}`" for s in places) + "."
    yield bool(meta.get("units")), f"{meta.get('long_name', '')}; unit {meta.get('units')}.".lstrip("; ")
    dims = meta.get("dims")
    yield isinstance(dims, tuple) and bool(dims), f"Axes: {', '.join(dims or ()) if isinstance(dims, tuple) else ''}."
    default = meta.get("default_select")
    yield bool(default), f"Without `select`: `{default}`."


def _signature(entry: Entry) -> str:
    """`name(given, *, parameter: type = default)`, types and defaults as the source has them."""
    fields = entry.params.model_fields
    found, hints = inspect.signature(entry.function), get_type_hints(entry.function)
    given = [p.name for p in found.parameters.values() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    free = [
        f"{fields[p.name].alias or p.name if p.name in fields else p.name}: {_type(p.annotation, hints.get(p.name))}"
        + ("" if p.default is inspect.Parameter.empty else f" = {_default(p.default)}")
        for p in found.parameters.values()
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    inside = [*given, *(["*"] if free else []), *free]
    line = f"{entry.name}({', '.join(inside)})"
    if len(line) <= 100:
        return line
    head = [", ".join([*given, "*"] if free else given)] if given or free else []
    return f"{entry.name}(\n" + "".join(f"    {part},\n" for part in [*head, *free]) + ")"


def _default(value: object) -> str:
    """A default as the source spells it; one that is made anew each time has no short spelling."""
    return "..." if repr(value).startswith("<") else repr(value)


def _type(annotation: object, hint: object) -> str:
    """The type as the source spells it; the choices where there are some."""
    if get_origin(hint) is Literal:
        return " | ".join(map(repr, get_args(hint)))
    if isinstance(annotation, str) and (bare := re.fullmatch(r"Annotated\[(.+?), \w+\(.*\)\]", annotation)):
        return bare[1]
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def main() -> None:
    """Write the page, or print it where `-` is asked for."""
    if sys.argv[1:] == ["-"]:
        print(page(), end="")
    else:
        PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
