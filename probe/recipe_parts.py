"""The parts of a recipe as pydantic models: frozen, exact in their types, with messages for people.

What the words of the vocabulary mean (which scores there are, which parameters they take) is checked by `compile`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_serializer, model_validator

from probe.recipe_at import LayerField, Layers, LayersField, Steps, StepsField
from probe.recipe_when import WhenField
from probe.recipe_words import Wrong, check_keys, describe
from probe.registry import nearest
from probe.site import Site


class Section(BaseModel):
    """A part of a recipe: frozen, exact types (text is no number, 1 is no truth value), unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if not isinstance(data, cls):
            check_keys(cls, data)
        return data


class Part(BaseModel):
    """A named piece of vocabulary with its parameters: `drop`, or `{drop: {positions: keep}}`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    params: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _spelled(cls, value: Any) -> Any:
        if isinstance(value, str) and value:
            return {"name": value, "params": {}}
        if isinstance(value, dict) and len(value) == 1:
            ((name, params),) = value.items()
            if params is not None and not isinstance(params, dict):
                hint = f"; write `{name}`, or `{name}: {{parameter: value}}`"
                raise Wrong(f"the parameters should be a mapping, but are {describe(params)}{hint}", name)
            return {"name": name, "params": params or {}}
        if isinstance(value, dict) and len(value) > 1:
            raise Wrong(f"names {len(value)} things ({', '.join(map(str, value))}); one belongs here")
        raise Wrong(f"should be a name, or a name with parameters {{name: {{...}}}}, but is {describe(value)}")

    @model_serializer
    def _spell(self) -> Any:
        return {self.name: self.params} if self.params else self.name

    @property
    def variable(self) -> str:
        """Of a recorded signal: the name of its variable in the trace."""
        return str(self.params.get("as", self.name))


def _site(value: Any) -> Any:
    names = [site.value for site in Site]
    if isinstance(value, str) and value not in names:
        raise Wrong(f"there is no site `{value}`; {nearest(value, names)}")
    return Site(value) if isinstance(value, str) else value


class At(Section):
    """Where a probe attaches: a site, its layers, and the steps.

    In the image encoder also which views it sees, and whether each view or each whole picture is decided on its own.
    """

    site: Annotated[Site, BeforeValidator(_site)]
    layer: LayerField | None = None
    layers: LayersField | None = None
    steps: StepsField = Steps()
    when: WhenField = ()
    views: Literal["all", "base", "tiles"] = "all"
    group: Literal["view", "picture"] = "view"

    @model_validator(mode="after")
    def _layers_fit_the_site(self) -> Self:
        if self.layer is not None and self.layers is not None:
            raise Wrong("has both `layer` and `layers`; keep one of them", "layers")
        if self.site.has_layers and self.where is None:
            raise Wrong(f"the site {self.site} exists once per layer; add `layer: 2` or `layers: all`")
        if not self.site.has_layers and self.where is not None:
            key = "layer" if self.layer is not None else "layers"
            raise Wrong(f"the site {self.site} has no layers; remove `{key}`", key)
        for key in ("views", "group"):
            if key in self.model_fields_set and not self.site.in_encoder:
                where = ", ".join(site.value for site in Site if site.in_encoder)
                raise Wrong(f"means something only in the image encoder ({where}), not at {self.site}", key)
        return self

    @property
    def where(self) -> Layers | None:
        """The layers, whichever of the two keys named them."""
        return self.layer if self.layer is not None else self.layers


def _items(value: Any) -> Any:
    """A list as the tuple that a frozen model holds; one bare name stands for a list of it."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


class ProbeSpec(Section):
    """One probe of a recipe: signals to record, or an intervention (score, select, do)."""

    name: str = Field(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f-\x9f]+$")
    at: At
    score: Part | None = None
    select: Part | None = None
    do: Part | None = None
    record: Annotated[tuple[Part, ...] | None, BeforeValidator(_items)] = None

    @model_validator(mode="after")
    def _one_purpose(self) -> Self:
        edit = [key for key in ("score", "select", "do") if getattr(self, key) is not None]
        if self.record is not None and edit:
            raise Wrong(f"both records and intervenes (`{edit[0]}`); make two probes of it", edit[0])
        if self.record is None and not edit:
            raise Wrong("does nothing: give it `record`, or `select` and `do`")
        if self.record is not None and self.at.when:
            raise Wrong("`when` belongs to interventions; a probe that records does so at all its steps", "at", "when")
        if self.record is not None and not self.record:
            raise Wrong("is an empty list; name the signals to record", "record")
        if self.record is None and self.do is None:
            raise Wrong("an intervention needs `select` and `do`; `do` is missing")
        return self


MOST_STEPS = 65_536
"""No answer is longer, and none takes more steps: larger numbers are slips that would fill memory or never end."""


def _answer(value: Any) -> Any:
    """A text with `[MASK]` for open slots, or slot -> token (an id, or a text of one token)."""
    if isinstance(value, dict):
        slots = {int(k) if isinstance(k, str) and k.isdecimal() else k: v for k, v in value.items()}
        wrong = [k for k in slots if isinstance(k, bool) or not isinstance(k, int) or k < 0]
        if wrong:
            raise Wrong(f"names slots by their number, counted from 0, but {describe(wrong[0])} stands here", wrong[0])
        return slots
    return value


class Generate(Section):
    """The denoising loop's settings; what is unset is the task's or the backbone's own."""

    gen_length: int | None = Field(default=None, ge=1, le=MOST_STEPS)
    steps: int | None = Field(default=None, ge=1, le=MOST_STEPS)
    block_length: int | None = Field(default=None, ge=1, le=MOST_STEPS)
    temperature: float | None = Field(default=None, ge=0)
    remasking: str | None = None
    cfg_scale: float | None = Field(default=None, ge=0)
    stop: Annotated[tuple[str, ...] | None, BeforeValidator(_items)] = None
    suffix: str | None = None
    think: bool | None = None
    answer: Annotated[str | dict[int, int | str] | None, BeforeValidator(_answer)] = None
    unmask: Part | None = None
    cache: Part | None = None
    length: Part | None = None
    seed: int = Field(default=0, ge=0)


def _samples(value: Any) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if value != "all" and not (whole and value >= 0):
        raise Wrong(f"should be all or a whole number of at least 0, but is {describe(value)}")
    return value


class Trace(Section):
    """What the trace file holds besides the recorded signals."""

    samples: Annotated[int | Literal["all"], BeforeValidator(_samples)] = "all"
    pictures: bool = True


class Run(Section):
    """What a run does besides running the recipe."""

    baseline: bool = True
    time: bool = True


AXES = (
    "sample", "step", "layer", "head", "segment", "segment_key", "position", "visual", "encoder_layer", "view", "patch",
)  # fmt: skip
"""Names of the trace's axes; no recorded variable can have one of them."""
