"""From a recipe to the table of what fires where: names become functions, layers become indices, all is checked.

A recipe is compiled once per backbone, against the backbone's sizes and without its weights. Everything that can be
known to be wrong is said here, with the place in the recipe's file. The tracer asks the table, once per step, which
probes fire.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from probe.compile_call import Call, bind
from probe.compile_encoder import check_looking, check_parts, check_site
from probe.compile_fit import check_choice, check_layers, check_scores
from probe.compile_inputs import check_inputs, check_recorded
from probe.errors import ProbeError
from probe.recipe import Part, ProbeSpec, Recipe
from probe.recipe_at import Layers, Steps
from probe.recipe_when import Condition
from probe.recipe_words import Wrong
from probe.recipe_yaml import KeyPath
from probe.registry import Entry, Registry, nearest
from probe.site import EDIT_SITES, Clock, ModelFacts, Site

__all__ = ["BoundProbe", "Call", "Edit", "ProbeTable", "Record", "Vocabulary", "compile_recipe"]


@dataclass(frozen=True)
class Edit:
    """An intervention: what the visual tokens are worth, which of them stay, what becomes of the others."""

    score: Call | None
    select: Call
    do: Call


@dataclass(frozen=True)
class Record:
    """A signal to record, under the name of its variable in the trace."""

    signal: Call
    name: str


@dataclass(frozen=True)
class BoundProbe:
    """One probe of a recipe at one layer of a model. `place` is where the recipe says so: `file:line:column`.

    At sites of the image encoder `layer` is one of the encoder's, `views` says which views the probe sees, and `group`
    whether each view or each whole picture is decided on its own.
    """

    name: str
    site: Site
    layer: int | None
    edit: Edit | None
    records: tuple[Record, ...]
    steps: Steps
    place: str
    line: int | None
    when: tuple[Condition, ...] = ()
    views: str = "all"
    group: str = "view"

    def fires(self, clock: Clock) -> bool:
        """Whether the probe acts in a pass of this step."""
        return self.steps.fires(clock)

    def fires_for(self, clock: Clock, sample: int) -> bool:
        """Whether it acts on this sample of the batch, in a pass in which it fires (but for `when`)."""
        return self.steps.fires_for(clock, sample)


@dataclass(frozen=True)
class ProbeTable:
    """All probes of a recipe, one per (probe, layer), in the recipe's order."""

    probes: tuple[BoundProbe, ...]
    _by_step: dict[tuple[int, int], tuple[BoundProbe, ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def at(self, clock: Clock) -> tuple[BoundProbe, ...]:
        """The probes that fire in the language model at the clock's step, in the recipe's order."""
        if any(p.steps.of != "steps" or p.steps.exactly == ("prefill",) for p in self.probes):
            return tuple(p for p in self.probes if not p.site.in_encoder and p.fires(clock))
        key = (clock.step, clock.nominal_steps)
        if key not in self._by_step:
            self._by_step[key] = tuple(p for p in self.probes if not p.site.in_encoder and p.fires(clock))
        return self._by_step[key]

    @property
    def encoder(self) -> tuple[BoundProbe, ...]:
        """The probes that act while pictures are encoded, once per sample, in the recipe's order."""
        return tuple(p for p in self.probes if p.site.in_encoder)

    def shown(self, size: tuple[int, int]) -> tuple[int, int]:
        """The (width, height) at which the encoder is shown a picture, for its own: less where probes shrink it."""
        for probe in self.probes:
            if probe.site is Site.IMAGES and probe.edit is not None:
                do = probe.edit.do
                size = do.entry.function(size, **do.variants[0])
        return size

    @property
    def edits(self) -> tuple[BoundProbe, ...]:
        """The probes that intervene."""
        return tuple(p for p in self.probes if p.edit is not None)

    @property
    def variables(self) -> tuple[str, ...]:
        """Names of the recorded variables, in the recipe's order, each once."""
        return tuple(dict.fromkeys(r.name for p in self.probes for r in p.records))


@dataclass(frozen=True)
class Vocabulary:
    """The registries that a recipe's words are looked up in."""

    scores: Registry
    selections: Registry
    operations: Registry
    signals: Registry

    @classmethod
    def installed(cls) -> Vocabulary:
        """Everything built in and everything that installed packages add."""
        import probe.vocabulary  # noqa: F401  (registers the built-in parts; imports torch, so only when needed)
        from probe.registry import operations, scores, selections, signals

        return cls(scores, selections, operations, signals)


def compile_recipe(recipe: Recipe, facts: ModelFacts, *, vocabulary: Vocabulary | None = None) -> ProbeTable:
    """Check a recipe against a model's sizes and the vocabulary, and lay out what fires where."""
    words = vocabulary or Vocabulary.installed()
    probes: list[BoundProbe] = []
    for i, spec in enumerate(recipe.probes):
        probes += _Compiler(recipe, facts, words, spec, ("probes", i)).probes()
    return ProbeTable(tuple(probes))


class _Compiler:
    """Compiles one probe of a recipe. Every method either returns what was asked or raises with its place."""

    def __init__(self, recipe: Recipe, facts: ModelFacts, words: Vocabulary, spec: ProbeSpec, path: KeyPath) -> None:
        self.recipe = recipe
        self.facts = facts
        self.words = words
        self.spec = spec
        self.path = path
        self.site = spec.at.site

    def fail(self, words: str, *path: str | int) -> ProbeError:
        return self.recipe.fault(self.path + path, words)

    def probes(self) -> list[BoundProbe]:
        if self.site.in_encoder:
            try:
                check_site(self.site, self.spec.at.steps, bool(self.spec.at.when), self.facts)
            except Wrong as error:
                raise self.fail(str(error), *error.path) from None
        layers = self.layers()
        edits: list[Edit | None] = [None] * len(layers)
        records: list[tuple[Record, ...]] = [()] * len(layers)
        if self.spec.record is not None:
            signals = self.records()
            records = [signals] * len(layers)
        else:
            edits = list(self.edits(layers))
        at = (self.recipe.place(self.path), self.recipe.line(self.path))
        return [
            BoundProbe(
                self.spec.name,
                self.site,
                layer,
                edit,
                record,
                self.spec.at.steps,
                *at,
                when=self.spec.at.when,
                views=self.spec.at.views,
                group=self.spec.at.group,
            )
            for layer, edit, record in zip(layers, edits, records, strict=True)
        ]

    def layers(self) -> tuple[int | None, ...]:
        where: Layers | None = self.spec.at.where
        if where is None:
            return (None,)
        key = "layer" if self.spec.at.layer is not None else "layers"
        have, owner = self.facts.layers, self.facts.name
        if self.site.in_encoder:
            have, owner = self.facts.encoder_layers, f"the encoder of {owner}"
        try:
            return where.resolve(have, owner)
        except Wrong as error:
            inside = error.path if key == "layers" else ()
            raise self.fail(str(error), "at", key, *inside) from None

    # --- words --------------------------------------------------------------------------------------------------

    def entry(self, registry: Registry, part: Part, *path: str | int) -> Entry:
        if part.name not in registry:
            hint = nearest(part.name, registry.names()) if registry.names() else "none is registered"
            raise self.fail(f"there is no {registry.kind} `{part.name}`; {hint}", *path)
        return registry[part.name]

    def call(self, entry: Entry, part: Part, layers: int, *path: str | int, varies: bool = True) -> list[Call]:
        """The call of a part, once per layer of the probe."""
        params = {k: v for k, v in part.params.items() if k != "as" or entry.kind != "signal"}
        inside = (*path, part.name)
        try:
            inside_of = {"score": self.words.scores, "selection": self.words.selections}
            return [bind(entry, params, i, layers, varies=varies, words=inside_of) for i in range(layers)]
        except Wrong as error:
            words = str(error)
            raise self.recipe.fault(
                (*self.path, *inside, *error.path), words, key=words.startswith("unknown")
            ) from None

    # --- signals ------------------------------------------------------------------------------------------------

    def records(self) -> tuple[Record, ...]:
        assert self.spec.record is not None
        found = []
        for j, part in enumerate(self.spec.record):
            entry = self.entry(self.words.signals, part, "record", j)
            sites = entry.meta.get("site")
            sites = () if sites is None else (sites,) if isinstance(sites, Site) else tuple(sites)
            if self.site not in sites:
                where = " or ".join(f"`{s}`" for s in sites)
                raise self.fail(f"`{part.name}` is recorded at {where}, not at `{self.site}`", "record", j)
            (call,) = self.call(entry, part, 1, "record", j, varies=False)
            try:
                check_recorded(entry, self.site)
            except Wrong as error:
                raise self.fail(str(error), "record", j) from None
            if self.site is Site.ENCODER_LAYER_ATTENTION:
                try:
                    check_looking(0, self.facts, call.variants[0], attends=True)
                except Wrong as error:
                    raise self.fail(str(error), "record", j, part.name) from None
            found.append(Record(call, part.variable))
        return tuple(found)

    # --- interventions ------------------------------------------------------------------------------------------

    def edits(self, layers: tuple[int | None, ...]) -> list[Edit]:
        spec, n = self.spec, len(layers)
        assert spec.do is not None
        operation = self.entry(self.words.operations, spec.do, "do")
        sites = operation.meta.get("sites")
        if sites is None and self.site not in EDIT_SITES:
            allowed = ", ".join(f"`{s}`" for s in EDIT_SITES if s.in_encoder == self.site.in_encoder)
            own = [f"`{e.name}`" for e in self.words.operations if self.site in e.meta.get("sites", ())]
            what = f"takes {' and '.join(own)} alone" if own else "can only be recorded"
            other = "others attach" if own else "an intervention attaches"
            raise self.fail(f"`{self.site}` {what}; {other} at {allowed}", "at", "site")
        if sites is not None and self.site not in sites:
            allowed = " or ".join(f"`{s}`" for s in sites)
            raise self.fail(f"`{spec.do.name}` acts at {allowed}, not at `{self.site}`", "do")
        selected = spec.select
        if selected is not None and operation.meta.get("changes"):
            raise self.fail(f"`{spec.do.name}` looks at no selection; remove `select`", "select")
        if selected is None:
            default = operation.meta.get("default_select")
            if default is None:
                raise self.fail(f"`{spec.do.name}` needs `select`: which visual tokens shall stay?")
            selected = Part.model_validate(default)
        selection = self.entry(self.words.selections, selected, "select")
        score = None if spec.score is None else self.entry(self.words.scores, spec.score, "score")
        dos = self.call(operation, spec.do, n, "do")
        selects = self.call(selection, selected, n, "select")
        scores: list[Call | None] = [None] * n
        if spec.score is not None and score is not None:
            scores = list(self.call(score, spec.score, n, "score"))
        for layer, given, select, do in zip(layers, scores, selects, dos, strict=True):
            try:
                check_inputs((given, "score"), (select, "select"), (do, "do"))
                check_scores(given, select, do)
                check_choice(select, do)
                if self.site.in_encoder:
                    check_parts(layer, self.facts, given, select, do, spec.do.params, spec.at.group)
                else:
                    check_layers(self.site, layer, given, select, do)
            except Wrong as error:
                raise self.fail(str(error), *error.path) from None
            self.check_duration(do)
        return [Edit(a, b, c) for a, b, c in zip(scores, selects, dos, strict=True)]

    def check_duration(self, do: Call) -> None:
        if self.site is Site.FINAL and any(p.get("lasts", "generation") == "forward" for p in do.variants):
            raise self.fail(
                "at `final` the step is over, so it can only change the next ones: set `lasts: generation`",
                *("do", do.entry.name, "lasts"),
            )
