"""What a recipe may ask of the image encoder: checked when it is compiled, with the reason where a model cannot.

Pictures are encoded once, before the first denoising step, and view by view. So there are no steps to choose from,
nothing comes back later, patches have no rotary positions, and no position of the question or the answer can look.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from probe.errors import ProbeError
from probe.recipe_at import Span, Steps
from probe.registry import Entry
from probe.site import ModelFacts, Site

LOOKING = ("cls", "visual", "all")
"""Query sets that an encoder has: the class token, the view's patches, both."""

ONLY_IN_LM = ("mask", "recycle", "skip_layers", "reweight_attention")
"""Operations on the sequence of the language model."""

MEANINGLESS: dict[str, str] = {
    "positions": "patches carry their learnt positions with them, so there is nothing to keep or to renumber",
    "cache": "the encoder has no cache",
}
"""Options of an operation that an encoder has no use for, and why."""

Fail = Callable[..., ProbeError]
"""`fail(words, *path)`: an error with the place in the recipe."""


class _Call(Protocol):
    """A bound part of the recipe."""

    @property
    def entry(self) -> Entry: ...
    @property
    def constant(self) -> bool: ...
    @property
    def variants(self) -> tuple[dict[str, Any], ...]: ...


class _Spec(Protocol):
    """A probe as the recipe has it."""

    @property
    def at(self) -> Any: ...


def check_encoder(spec: _Spec, facts: ModelFacts, fail: Fail) -> None:
    """Refuse sites that the model's encoder lacks, and steps other than the whole generation."""
    site: Site = spec.at.site
    if not facts.encoder_layers and site not in dict(facts.refused):
        raise fail(f"{facts.name} has no image encoder", "at", "site")
    if site in dict(facts.refused):
        raise fail(f"{facts.name} has no `{site}`: {dict(facts.refused)[site]}", "at", "site")
    if not _from_the_start(spec.at.steps):
        raise fail(
            "pictures are encoded once, before the first step, and what the encoder loses is lost for the whole "
            "generation; leave `steps` out",
            *("at", "steps"),
        )


def _from_the_start(steps: Steps) -> bool:
    if steps.exactly is not None:
        return steps.exactly[0] in ("first", 0)
    return steps.span == Span(steps.span.start) and steps.span.start == 0


def check_edit(
    site: Site, layer: int | None, facts: ModelFacts, score: _Call | None, select: _Call, do: _Call, fail: Fail
) -> None:
    """Refuse what cannot be decided or done in an encoder."""
    for part, call in (("score", score), ("select", select), ("do", do)):
        if call is None:
            continue
        if not call.constant:
            raise fail("a schedule over the steps cannot act in the encoder, which runs before them", part)
        if "embedding" in call.entry.needs and call.variants[0].get("space", "embedding") == "embedding":
            raise fail(
                "embeddings of the language model do not exist yet in the encoder; use `space: hidden`",
                *(part, call.entry.name),
            )
        if "text" in call.entry.needs and not facts.text_tower:
            raise fail(
                f"`{call.entry.name}` compares patches with the question, but {facts.name} comes with no text tower; "
                "put one that shares the encoder's space into the folder `text_tower` of the checkpoint "
                "(docs/encoder.md)",
                part,
            )
    if do.entry.name in ONLY_IN_LM:
        raise fail(f"`{do.entry.name}` acts on the sequence of the language model, not in the encoder", "do")


def check_written(params: Mapping[str, Any], fail: Fail, name: str) -> None:
    """Refuse options that a recipe spells out although they mean nothing in the encoder."""
    for option, why in MEANINGLESS.items():
        if option in params:
            raise fail(f"has no meaning in the encoder: {why}", "do", name, option)
    if params.get("lasts", "generation") != "generation":
        raise fail("what the encoder loses is lost for the whole generation; leave `lasts` out", *("do", name, "lasts"))


def looking_error(
    layer: int | None, facts: ModelFacts, params: Mapping[str, Any], *, attends: bool
) -> tuple[str, str] | None:
    """Why the attention or the keys that a part's parameters name cannot be had in the encoder; None when they can.

    The first is the parameter at fault. A score's `layer` is relative to the probe's own; behind the layers that is the
    last one.
    """
    queries = str(params.get("queries", "all"))
    if attends and queries not in LOOKING:
        return "queries", (
            f"`{queries}` looks from the language model's sequence; in the encoder the class token (`cls`), the "
            "patches (`visual`) or all rows (`all`) can look"
        )
    if attends and queries == "cls" and not facts.class_token:
        return "queries", (
            f"the encoder of {facts.name} has no class token; `queries: all` averages over the patches instead"
        )
    named = params.get("layer", 0)
    if not isinstance(named, int):
        return None
    own = facts.encoder_layers - 1 if layer is None else layer
    if named > 0:
        return "layer", (
            f"is relative to encoder layer {own}, and layer {own + named} has not run then; use 0 or a negative number"
        )
    if own + named < 0:
        return "layer", f"is relative to encoder layer {own}, which has no layer {-named} before it"
    return None
