"""Recipes as data: the models of a recipe, loading, overriding, hashing and writing back.

A recipe is probes, and optionally a backbone, data, generation, trace and run settings. It is plain data: nothing in
it can import or run code. Whether its scores, selections, operations and signals exist and fit together is checked by
`compile`, which knows the registries; this module knows only the format, described in docs/recipes.md.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    model_validator,
)

from probe.errors import ProbeError
from probe.recipe_at import Layers, Steps
from probe.recipe_data import Data
from probe.recipe_dials import apply_sets, substitute
from probe.recipe_files import RecipeInfo, expand, find_recipe, read_bytes, recipe_folder, shipped_recipes
from probe.recipe_parts import AXES, At, Generate, Part, ProbeSpec, Run, Trace
from probe.recipe_sweep import Sweep
from probe.recipe_words import Wrong, describe, first_fault, short
from probe.recipe_yaml import Document, KeyPath, dump_yaml, read_yaml
from probe.registry import nearest
from probe.site import Site

__all__ = [
    "At",
    "Data",
    "Generate",
    "Part",
    "ProbeSpec",
    "Recipe",
    "RecipeInfo",
    "Run",
    "Trace",
    "load_recipe",
    "parse_recipe",
    "recipe_folder",
    "shipped_recipes",
]


VARIABLE = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,99}")
"""What a variable of the trace can be called."""


PLACEMENT = ("device_map", "max_memory", "tp_plan")
"""Settings of `load` that say where a model is, not what it computes."""
GIVEN_BY_THE_RUN = {"device": "use --device, or `load.device_map`", "dtype": "use --dtype"}


class Recipe(BaseModel):
    """A whole recipe, checked, with every `$dial` replaced by its value."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_: Literal[1] = Field(alias="schema")
    name: str = Field(max_length=100, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_ .+=@,-]*(/[A-Za-z0-9_][A-Za-z0-9_ .+=@,-]*)*$")
    about: str | None = None
    paper: str | None = None
    dial: dict[str, Any] = {}
    calibrate: dict[str, Part] = {}
    backbone: str = Field(default="miniature", min_length=1)
    load: dict[str, Any] = {}
    data: Data = Data()
    generate: Generate = Generate()
    trace: Trace = Trace()
    run: Run = Run()
    sweep: Sweep | None = None
    probes: tuple[ProbeSpec, ...] = ()

    _document: Document = PrivateAttr(default_factory=lambda: Document({}))
    _refs: dict[KeyPath, str] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _from_data(cls, data: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Recipe:
        """Keep the recipe as it was written beside the recipe as it is meant."""
        if isinstance(data, cls):
            return data
        document: Document | None = (info.context or {}).get("document")
        if document is None:
            document = Document(_plain(data))
        resolved, refs = _resolved(document.data)
        recipe: Recipe = handler(resolved)
        recipe._document, recipe._refs = document, refs
        return recipe

    @model_validator(mode="after")
    def _loading_is_of_the_backbone(self) -> Self:
        for name in self.load:
            if name in GIVEN_BY_THE_RUN:
                words = f"`{name}` is the machine's business, not the recipe's; {GIVEN_BY_THE_RUN[name]}"
                raise Wrong(words, "load", name)
        return self

    @model_validator(mode="after")
    def _calibrations_are_of_dials(self) -> Self:
        for name in self.calibrate:
            if name not in self.dial:
                hint = nearest(name, sorted(self.dial)) if self.dial else "the recipe has no dials"
                raise Wrong(f"there is no dial `{name}` to calibrate; {hint}", "calibrate", name)
        return self

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names: set[str] = set()
        variables: dict[str, str] = {}
        for i, probe in enumerate(self.probes):
            if probe.name in names:
                raise Wrong(f"two probes are called `{probe.name}`; rename one of them", "probes", i, "name")
            names.add(probe.name)
            for j, part in enumerate(probe.record or ()):
                path = ("probes", i, "record", j)
                if not VARIABLE.fullmatch(part.variable) or part.variable in AXES:
                    raise Wrong(f"`{part.variable}` cannot name a variable of the trace; rename it with `as`", *path)
                if part.variable in variables:
                    other = variables[part.variable]
                    hint = f"give one of them another name: {{{part.name}: {{as: another_name}}}}"
                    raise Wrong(
                        f"the variable `{part.variable}` is already recorded by probe `{other}`; {hint}",
                        *path,
                    )
                variables[part.variable] = probe.name
        return self

    def __eq__(self, other: object) -> bool:
        """The same values (1 and 1.0 differ: a count and a share) and the same `$dials` in the same places."""
        if not isinstance(other, Recipe):
            return NotImplemented
        return self._canonical() == other._canonical() and self._refs == other._refs

    def __hash__(self) -> int:
        return hash(self._canonical())

    def _canonical(self, *leave_out: str, limit: bool = True) -> str:
        data = {k: v for k, v in self.model_dump(mode="json", by_alias=True).items() if k not in leave_out}
        data["load"] = {k: v for k, v in data["load"].items() if k not in PLACEMENT}
        if not data["load"]:
            del data["load"]
        if not limit:
            data["data"] = {k: v for k, v in data["data"].items() if k != "limit"}
        return json.dumps(data, sort_keys=True, ensure_ascii=False, separators=(",", ":"))

    @property
    def hash(self) -> str:
        """Sixteen hex digits of what the recipe does to a sample.

        Not its description, nor how its values came about or could be found, nor how many samples
        there are, nor where the model is: a longer run, or one on more devices, is the same.
        """
        text = self._canonical("about", "paper", "dial", "calibrate", "sweep", limit=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        """The recipe as one self-contained file: includes expanded, dials and `$dials` as they are."""
        return dump_yaml(self._document.data)

    def replace(self, **changes: Any) -> Recipe:
        """The recipe with some of its parts replaced, checked again: `recipe.replace(backbone="my/model")`."""
        document = Document(copy.deepcopy(self._document.data), self._document.values, self._document.keys)
        for key, value in _plain(changes).items():
            document.data[key] = value
            document.put((key,), Document(value))
        return _build(document)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Recipe:
        """As pydantic's, but an update is checked like a recipe, by `replace`."""
        return self.replace(**update) if update else super().model_copy(deep=deep)

    def with_sets(self, sets: Sequence[str]) -> Recipe:
        """The recipe with dials or values changed as on the command line: `["keep=0.25", "generate.steps=8"]`."""
        document = Document(copy.deepcopy(self._document.data), self._document.values, self._document.keys)
        apply_sets(document, sets)
        return _build(document)

    def written(self, key: str) -> dict[str, Any]:
        """A section as it was written, `$dials` and all; empty where it was left out."""
        return copy.deepcopy(dict(self._document.data.get(key) or {}))

    def point(self) -> Recipe:
        """The recipe without its sweep."""
        document = Document(copy.deepcopy(self._document.data), self._document.values, self._document.keys)
        document.data.pop("sweep", None)
        return _build(document)

    def with_probes_of(self, other: Recipe) -> Recipe:
        """The recipe with another one's probes behind its own; the other's are taken with the values of their dials."""
        own = copy.deepcopy(self._document.data.get("probes") or [])
        return self.replace(probes=[*own, *(_plain(probe) for probe in other.probes)])

    def without_interventions(self) -> Recipe:
        """The baseline: the same run with the probes that record, and none that intervenes."""
        name = self.name if self.name.endswith("/baseline") else f"{self.name[:91]}/baseline"
        return self._keeping(lambda probe: probe.record is not None, name)

    def without_recording(self) -> Recipe:
        """The recipe with the probes that intervene, and none that records: what is timed."""
        return self._keeping(lambda probe: probe.record is None, self.name)

    def _keeping(self, wanted: Callable[[ProbeSpec], bool], name: str) -> Recipe:
        data = copy.deepcopy({k: v for k, v in self._document.data.items() if k != "probes"}) | {"name": name}
        document = Document(data, self._document.values, self._document.keys)
        kept: list[Document] = []
        items = self._document.items(("probes",)) if self.probes else []
        for probe, item in zip(self.probes, items, strict=True):
            if wanted(probe):  # a default name depends on the neighbours, so it is written down
                item.data = {"name": probe.name} | copy.deepcopy(item.data)
                kept.append(item)
        data["probes"] = [item.data for item in kept]
        document.values = {p: at for p, at in document.values.items() if p[:1] != ("probes",)}
        document.keys = {p: at for p, at in document.keys.items() if p[:1] != ("probes",)}
        for i, item in enumerate(kept):
            document.put(("probes", i), item)
        return _build(document)

    def fault(self, path: KeyPath, words: str, *, key: bool = False) -> ProbeError:
        """An error about the value (or key) at `path`, with its place, its probe and the dial it came from."""
        return _fault(self._document, self._refs, path, words, key=key)

    def place(self, path: KeyPath) -> str:
        """Where the value at `path` was written: `file:line:column`."""
        return str(self._document.place(path))

    def line(self, path: KeyPath) -> int | None:
        """The line in which the value at `path` was written."""
        return self._document.place(path).line

    @property
    def dials_used(self) -> tuple[str, ...]:
        """The dials that stand for a value somewhere in the recipe."""
        return tuple(dict.fromkeys(self._refs.values()))

    def dial_at(self, path: KeyPath) -> str | None:
        """The dial that gave the value at `path`, if one did."""
        return _dial_at(self._refs, path)


def _plain(data: Any) -> Any:
    """Python objects as the data a recipe file would hold."""
    if isinstance(data, BaseModel):
        return _plain(data.model_dump(mode="json", by_alias=True, exclude_defaults=True))
    if isinstance(data, Steps | Layers):
        return data.spelled()
    if isinstance(data, dict):
        return {"schema" if k == "schema_" else k: _plain(v) for k, v in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(v) for v in data]
    return data.value if isinstance(data, Site) else data


def _resolved(data: Any) -> tuple[Any, dict[KeyPath, str]]:
    """Dials replaced by their values, and names given to the probes that have none."""
    if not isinstance(data, dict):
        raise Wrong(f"a recipe is a mapping, but this is {describe(data)}")
    resolved, refs = substitute(data)
    resolved = {k: v for k, v in resolved.items() if v is not None}
    probes = resolved.get("probes")
    if isinstance(probes, list):
        taken = {p["name"] for p in probes if isinstance(p, dict) and isinstance(p.get("name"), str)}
        counts: dict[str, int] = {}
        resolved["probes"] = [_named(p, taken, counts) for p in probes]
    return resolved, refs


def _named(probe: Any, taken: set[str], counts: dict[str, int]) -> Any:
    """A probe with its default name, `<site>@<layers>`, made unique by `#2`, `#3`, ... where several share it."""
    if not isinstance(probe, dict) or probe.get("name") is not None:
        return probe
    at: Any = probe["at"] if isinstance(probe.get("at"), dict) else {}
    where = at.get("layer", at.get("layers"))
    if isinstance(where, dict):
        where = f"{where.get('from', 0)}..{where.get('to', '')}"
    elif isinstance(where, list):
        where = ",".join(map(str, where))
    base = str(at.get("site", "probe")) + ("" if where is None else f"@{where}")
    base = "".join(c for c in base if c.isprintable())[:80]
    name = base
    while name in taken:
        counts[base] = counts.get(base, 1) + 1
        name = f"{base}#{counts[base]}"
    taken.add(name)
    return {"name": name} | {k: v for k, v in probe.items() if k != "name"}


def _dial_at(refs: dict[KeyPath, str], path: KeyPath) -> str | None:
    return next((refs[path[:n]] for n in range(len(path), 0, -1) if path[:n] in refs), None)


def _fault(document: Document, refs: dict[KeyPath, str], path: KeyPath, words: str, *, key: bool) -> ProbeError:
    shown = [short(p) if isinstance(p, str) else f"[{p}]" for p in path]
    head = ""
    if path[:1] == ("probes",) and len(path) > 1:
        name = _probe_name(document, path[1])
        head = f"probe {path[1]}: " if name is None else f"probe `{short(name)}`: "
        shown = shown[2:]
    where = ".".join(shown).replace(".[", "[")
    tail = ""
    if dial := _dial_at(refs, path):
        set_by = document.place(("dial", dial)).source
        tail = f" (`${dial}`{', from ' + set_by if set_by.startswith('--set') else ''})"
    return ProbeError(f"{document.place(path, key=key)}: {head}{where + ': ' if where else ''}{words}{tail}")


def _probe_name(document: Document, index: str | int) -> str | None:
    """What a probe is called, also where the recipe's dials do not resolve."""
    try:
        probes = _resolved(document.data)[0]["probes"]
    except Wrong:
        taken: set[str] = set()
        probes = [_named(p, taken, {}) for p in document.data["probes"]]
    known = isinstance(index, int) and index < len(probes) and isinstance(probes[index], dict)
    return str(probes[index]["name"]) if known else None


def _build(document: Document) -> Recipe:
    """The recipe of a document; every fault is a `ProbeError` with its place."""
    try:
        resolved, refs = _resolved(document.data)
    except Wrong as error:
        raise _fault(document, {}, error.path, str(error), key=False) from None
    try:
        return Recipe.model_validate(document.data, context={"document": document})
    except ValidationError as error:
        path, words = first_fault(error, resolved)
        raise _fault(document, refs, path, words, key=words.startswith("unknown key")) from None


def parse_recipe(text: str | bytes, *, source: str = "<string>", sets: Sequence[str] = ()) -> Recipe:
    """A recipe from YAML text. Its includes can only be shipped recipes; `source` names it in messages."""
    return _parse(text, source, None, sets)


def load_recipe(path_or_name: str | Path, sets: Sequence[str] = ()) -> Recipe:
    """A recipe from a file, or a shipped one by its name (`fastv`, `prune/fastv`), with `--set`s applied."""
    path = find_recipe(path_or_name)
    return _parse(read_bytes(path), str(path), path, sets)


def _parse(text: str | bytes, source: str, file: Path | None, sets: Sequence[str]) -> Recipe:
    document = expand(read_yaml(text, source), file)
    apply_sets(document, sets)
    return _build(document)
