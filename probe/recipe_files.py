"""From recipe files to one document: finding a file or a shipped recipe, and `include`.

Everything here works on plain data with positions; what the parts of a recipe mean is `recipe`'s business.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probe.errors import ProbeError
from probe.recipe_dials import DIAL, TOP_KEYS, refs_in
from probe.recipe_words import describe
from probe.recipe_yaml import MAX_BYTES, Document, KeyPath, Place, list_of, read_yaml
from probe.registry import nearest

MAX_FILES = 64


@dataclass(frozen=True)
class RecipeInfo:
    """A recipe that comes with the package."""

    name: str
    path: Path
    about: str


def recipe_folder() -> Path:
    """The folder of the shipped recipes: inside an installed package, else beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def shipped_recipes() -> list[RecipeInfo]:
    """Every shipped recipe with its name (`prune/fastv`) and its one line, sorted by name."""
    return [RecipeInfo(name, path, _about(path)) for name, path in sorted(_shipped().items())]


def _shipped() -> dict[str, Path]:
    folder = recipe_folder()
    return {p.relative_to(folder).with_suffix("").as_posix(): p for p in folder.rglob("*.yaml")}


def _about(path: Path) -> str:
    data = read_yaml(read_bytes(path), str(path)).data
    return str(data.get("about") or "") if isinstance(data, dict) else ""


def read_bytes(path: Path) -> bytes:
    """The bytes of a recipe file; what is no readable file, or too long for a recipe, is a `ProbeError`."""
    try:
        if not path.is_file():
            raise ProbeError(f"{path}: is no file")
        if path.stat().st_size > MAX_BYTES:
            raise ProbeError(f"{path}: longer than {MAX_BYTES // 1024} KiB, which no recipe needs")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise ProbeError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long a name, or a NUL in it
        return False


def _shipped_named(name: str) -> Path | None:
    """A shipped recipe by its full name or its last part, with or without `.yaml` and a leading `recipes/`."""
    bare = re.sub(r"\.ya?ml$", "", name).removeprefix("./").removeprefix("recipes/")
    shipped = _shipped()
    hits = [path for full, path in shipped.items() if full.rsplit("/", 1)[-1] == bare]
    return shipped.get(bare) or (hits[0] if len(hits) == 1 else None)


def find_recipe(path_or_name: str | Path) -> Path:
    """The file that a path or a shipped recipe's name means."""
    path = Path(path_or_name)
    if _is_file(path):
        return path
    if found := _shipped_named(str(path_or_name)):
        return found
    shipped = sorted(_shipped())
    try:
        neighbours = [str(p) for p in sorted(path.parent.glob("*.y*ml"))] if path.parent.is_dir() else []
    except (OSError, ValueError):
        neighbours = []
    short = {name.rsplit("/", 1)[-1]: name for name in shipped}
    bare = re.sub(r"\.ya?ml$", "", str(path_or_name))
    hint = nearest(str(path_or_name), neighbours) if neighbours else ""
    if not hint.startswith("did"):
        hint = nearest(bare, shipped)
    if not hint.startswith("did"):
        hint = nearest(path.stem, list(short))
    if not hint.startswith("did"):
        hint = f"shipped recipes: {', '.join(shipped)}"
    raise ProbeError(f"there is no file and no shipped recipe `{path_or_name}`; {hint}")


def expand(document: Document, file: Path | None) -> Document:
    """The recipe with its includes: their probes first, their dials and generation settings below its own.

    `include` is gone.
    """
    root = file.resolve().parent if file else None
    return _Includes(root).merge(document, file)


class _Includes:
    """One run over a recipe and what it includes. A file that is reached on two ways counts once."""

    def __init__(self, root: Path | None) -> None:
        self.root = root
        self.seen: set[Path] = set()

    def merge(self, document: Document, file: Path | None, stack: tuple[Path, ...] = ()) -> Document:
        _check_top(document)
        here = (*stack, file.resolve()) if file else stack
        parts = [self.load(name, place, file, here) for name, place in _included(document)]
        merged = Document({k: v for k, v in document.data.items() if k != "include"}, document.values, document.keys)
        self._dials(merged, [p for p in parts if p.data.get("dial")])
        self._generate(merged, [p for p in parts if p.data.get("generate")])
        if any(part.data.get("probes") for part in parts):
            items = [item for part in [*parts, document] if part.data.get("probes") for item in part.items(("probes",))]
            whole = list_of(items, document.place(("probes",)))
            merged.data["probes"] = whole.data
            merged.put(("probes",), whole)
        return merged

    def load(self, name: str, place: Place, file: Path | None, stack: tuple[Path, ...]) -> Document:
        path = self.find(name, place, file)
        if path.resolve() in stack:
            raise ProbeError(f"{place}: includes `{name}`, which includes this recipe again; break the circle")
        if path.resolve() in self.seen:
            return Document({})
        self.seen.add(path.resolve())
        if len(self.seen) > MAX_FILES:
            raise ProbeError(f"{place}: more than {MAX_FILES} included files")
        return self.merge(read_yaml(read_bytes(path), str(path)), path, stack)

    def find(self, name: str, place: Place, file: Path | None) -> Path:
        if Path(name).is_absolute() or re.match(r"[A-Za-z]:[\\/]|\\\\", name):
            raise ProbeError(f"{place}: includes the absolute path `{name}`; name it relative to this recipe")
        if file is not None and self.root is not None:
            path = file.resolve().parent / name
            if _is_file(path):
                inside = any(path.resolve().is_relative_to(top) for top in (self.root, recipe_folder().resolve()))
                if not inside:
                    raise ProbeError(f"{place}: `{name}` lies outside the recipe's folder; includes stay within it")
                return path
        if ".." not in Path(name).parts and (found := _shipped_named(name)):
            return found
        close = nearest(re.sub(r"\.ya?ml$", "", name), sorted(_shipped()))
        raise ProbeError(f"{place}: includes `{name}`, but there is no such file and no such shipped recipe; {close}")

    @staticmethod
    def _generate(merged: Document, parts: list[Document]) -> None:
        """How the parts decode, setting by setting, below what the including recipe says itself."""
        own = merged.data.get("generate") or {}
        if not parts or not isinstance(own, dict):
            return
        settled: dict[str, Any] = {}
        places = Document(None, {(): merged.place(("generate",))})
        for part in parts:
            if not isinstance(part.data["generate"], dict):
                found = describe(part.data["generate"])
                raise ProbeError(f"{part.place(('generate',))}: `generate` should be a mapping, but is {found}")
            for name, value in part.data["generate"].items():
                if name in settled and name not in own and repr(settled[name]) != repr(value):
                    raise ProbeError(
                        f"{part.place(('generate', name))}: generate.{name} has another value in "
                        f"{places.place((name,))}; set it in the including recipe's own `generate`"
                    )
                settled[name] = value
                places.put((name,), part.below(("generate", name)))
        for name, value in own.items():
            settled[name] = value
            places.put((name,), merged.below(("generate", name)))
        merged.data["generate"] = settled
        merged.put(("generate",), places)

    @staticmethod
    def _dials(merged: Document, parts: list[Document]) -> None:
        """Put the dials of the parts below the recipe's own."""
        if not parts:
            return
        own = merged.data.get("dial") or {}
        dials: dict[str, Any] = {}
        owner: dict[str, Document] = {}
        for part in parts:
            for name, value in part.data["dial"].items():
                if name in dials and name not in own and repr(dials[name]) != repr(value):
                    raise ProbeError(
                        f"{part.place(('dial', name))}: the dial `{name}` has another value in "
                        f"{owner[name].place(('dial', name))}; set it in the including recipe's own `dial`"
                    )
                dials[name], owner[name] = value, part
        for name, value in own.items():
            dials[name], owner[name] = value, merged
        whole = Document(dials, {(): merged.place(("dial",))})
        for document in [*parts, merged]:
            section = document.below(("dial",)) if document.data.get("dial") else Document({})
            mine = {name for name in section.data if owner[name] is document}
            whole.values.update({p: at for p, at in section.values.items() if p and p[0] in mine})
            whole.keys.update({p: at for p, at in section.keys.items() if p and p[0] in mine})
        merged.data["dial"] = dials
        merged.put(("dial",), whole)


def _check_top(document: Document) -> None:
    """What must hold of every recipe file before it can be merged into another."""
    data = document.data

    def fail(path: KeyPath, words: str, *, key: bool = False) -> None:
        raise ProbeError(f"{document.place(path, key=key)}: {words}")

    if not isinstance(data, dict):
        fail((), f"a recipe is a mapping that starts with `schema: 1`, but this is {describe(data)}")
    for key in data:
        if key not in TOP_KEYS:
            fail((key,), f"unknown key `{key}`; {nearest(key, TOP_KEYS)}", key=True)
    if data.get("schema") != 1 or not isinstance(data.get("schema"), int) or isinstance(data.get("schema"), bool):
        said = f", but is {describe(data['schema'])}" if "schema" in data else " and is missing"
        fail(("schema",), f"`schema` should be 1 (this program reads no other){said}")
    for key, kind in (("dial", dict), ("probes", list)):
        if data.get(key) is not None and not isinstance(data[key], kind):
            wanted = "a list of probes" if kind is list else "a mapping of names to values"
            fail((key,), f"`{key}` should be {wanted}, but is {describe(data[key])}")
    for name, value in (data.get("dial") or {}).items():
        if not DIAL.fullmatch(name):
            fail(("dial", name), f"`{name}` is no name for a dial; use letters, digits and _", key=True)
        if refs := sorted(set(refs_in(value))):
            fail(
                ("dial", name),
                f"the dial `{name}` stands for `${refs[0]}`; a dial holds a value, not another dial",
            )


def _included(document: Document) -> list[tuple[str, Place]]:
    value = document.data.get("include")
    names = [value] if isinstance(value, str) else value or []
    if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
        raise ProbeError(f"{document.place(('include',))}: `include` should be a list of recipe files or names")
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ProbeError(f"{document.place(('include', i))}: includes `{name}` twice")
    return [(name, document.place(("include", i))) for i, name in enumerate(names)]
