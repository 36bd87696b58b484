"""What a recipe may ask of the image encoder: checked when it is compiled, with the reason where a model cannot.

Pictures are encoded once, before the first denoising step, and view by view. So there are no steps to choose from,
nothing comes back later, patches have no rotary positions, and no position of the question or the answer can look.
Faults raise `Wrong`, with paths below the probe.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from probe.compile_call import Call
from probe.compile_fit import located
from probe.recipe_at import Span, Steps
from probe.recipe_words import Wrong
from probe.site import ModelFacts, Site

LOOKING = ("cls", "visual", "all")
"""Query sets that an encoder has: the class token, the view's patches, both."""

ONLY_IN_LM = ("mask", "recycle", "skip_layers", "reweight_attention")
"""Operations on the sequence of the language model."""

MEANINGLESS: dict[str, str] = {
    "answer_positions": "the encoder knows no answer",
    "on_cache": "the encoder has no cache",
}
"""Options of an operation that an encoder has no use for, and why."""

ABSENT: dict[str, str] = {
    "embedding": "embeddings of the language model do not exist yet in the encoder; use `space: hidden`",
    "text_hidden": "the encoder sees no text",
    "text_keys": "the encoder sees no text",
    "text_score": "the encoder sees no text",
    "text_row": "the encoder sees no text",
    "rotary_received": "the encoder has no rotary positions to correct for",
    "layer_input": "what enters an encoder layer is not kept",
    "attended": "attention rows of the encoder are averaged as they come; a rank cannot be counted",
    "noise": "tokens are not recycled in the encoder",
}
"""Inputs of scores, selections and operations that are not there, and why."""


def check_site(site: Site, steps: Steps, waits: bool, facts: ModelFacts) -> None:
    """Refuse sites that the model's encoder lacks, and times other than the whole generation (`waits`: for signals)."""
    refused = dict(facts.refused)
    if site in refused:
        raise Wrong(f"{facts.name} has no `{site}`: {refused[site]}", "at", "site")
    if not facts.encoder_layers:
        raise Wrong(f"{facts.name} has no image encoder", "at", "site")
    if waits:
        raise Wrong("pictures are encoded before the first pass, so no signal has been recorded yet", "at", "when")
    if steps.exactly is not None:
        whole = steps.exactly[0] in ("first", 0)
    else:
        whole = steps.span == Span(steps.span.start) and steps.span.start == 0
    if not whole:
        raise Wrong(
            "pictures are encoded once, before the first step, and what the encoder loses is lost for the whole "
            "generation; leave `steps` out",
            *("at", "steps"),
        )


def check_parts(
    layer: int | None,
    facts: ModelFacts,
    score: Call | None,
    select: Call,
    do: Call,
    written: Mapping[str, Any],
    group: str,
) -> None:
    """Refuse what cannot be decided or done in an encoder. `written` are the operation's options in the recipe."""
    for top, part in (("score", score), ("select", select), ("do", do)):
        for call, path in () if part is None else located(part, (top, part.entry.name)):
            if not call.constant:
                raise Wrong("a schedule over the steps cannot act in the encoder, which runs before them", *path)
            params = call.variants[0]
            for name in call.entry.reads(params):
                if name in ABSENT:
                    raise Wrong(f"`{call.entry.name}` needs `{name}`: {ABSENT[name]}", *path)
                if name == "text_features" and not facts.text_tower:
                    raise Wrong(_no_text_tower(call.entry.name, facts.name), *path)
                if name in ("received", "keys", "n_queries"):
                    check_looking(layer, facts, params, *path, attends=name != "keys")
    name = do.entry.name
    if name in ONLY_IN_LM:
        raise Wrong(f"`{name}` acts on the sequence of the language model, not in the encoder", "do")
    params = do.variants[0]
    if group == "picture" and (name == "append" or params.get("append", "none") != "none"):
        raise Wrong("a token can be added to one view only; decide with `group: view`", "at", "group")
    if group == "picture" and facts.class_token and "cls" in params.get("protect", ()):
        raise Wrong("every view has a class token of its own; `protect: [cls]` goes with `group: view`", "at", "group")
    for option, why in MEANINGLESS.items():
        if option in written:
            raise Wrong(f"has no meaning in the encoder: {why}", "do", name, option)
    if written.get("lasts", "generation") != "generation":
        raise Wrong("what the encoder loses is lost for the whole generation; leave `lasts` out", "do", name, "lasts")


def _no_text_tower(part: str, model: str) -> str:
    return (
        f"`{part}` compares patches with the question, but {model} comes with no text tower; put the one that its "
        "encoder was trained with into the folder `text_tower` of the checkpoint (docs/encoder.md)"
    )


def check_looking(
    layer: int | None, facts: ModelFacts, params: Mapping[str, Any], *path: str | int, attends: bool
) -> None:
    """Refuse attention or keys that cannot be had in the encoder.

    A part's `layer` is relative to the probe's own; behind the layers that is the last one.
    """
    queries = str(params.get("queries", "all"))
    if attends and queries not in LOOKING:
        raise Wrong(
            f"`queries: {queries}` looks from the language model's sequence; in the encoder the class token (`cls`), "
            "the patches (`visual`) or all rows (`all`) can look",
            *path,
        )
    if attends and queries == "cls" and not facts.class_token:
        raise Wrong(
            f"the encoder of {facts.name} has no class token; `queries: all` averages over the patches instead", *path
        )
    named = params.get("layer", 0)
    if not isinstance(named, int):
        return
    own = facts.encoder_layers - 1 if layer is None else layer
    if named > 0:
        raise Wrong(
            f"`layer: {named}` is relative to encoder layer {own}, and layer {own + named} has not run then; use 0 or "
            "a negative number",
            *path,
        )
    if own + named < 0:
        raise Wrong(
            f"`layer: {named}` is relative to encoder layer {own}, which has no layer {-named} before it", *path
        )
