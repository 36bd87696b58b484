"""A recipe in plain words: what it will do on a model, without its weights."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from probe.compile import BoundProbe, Call, Vocabulary, compile_recipe
from probe.explain_encoder import ONCE, lasting, looks_at, patches_left
from probe.recipe import Recipe
from probe.recipe_at import Span, Steps
from probe.site import ModelFacts, Site, first_step

_SITES = {
    Site.IMAGES: "the sample's pictures, before they are cut into views",
    Site.ENCODER_LAYER_ATTENTION: "inside the image encoder: the attention of {layers}",
    Site.ENCODER_LAYER_AFTER_ATTENTION: "inside the image encoder: between attention and MLP of {layers}",
    Site.ENCODER_OUTPUT: "patch features as they leave the image encoder, before the projector",
    Site.PROJECTOR_OUTPUT: "projected patch features, before tiles are joined",
    Site.BEFORE_LM: "the assembled sequence, before layer 0",
    Site.PREFIX_CACHE: "the stored keys and values, before a pass reads them; it looks at those of {layers}",
    Site.LAYER_INPUT: "the input of {layers}",
    Site.LAYER_ATTENTION: "the attention of {layers}",
    Site.LAYER_AFTER_ATTENTION: "between attention and MLP of {layers}",
    Site.LAYER_OUTPUT: "the output of {layers}",
    Site.FINAL: "after the final norm",
    Site.LOGITS: "the logits of the answer slots",
}

_LEFT_OUT = {False: ("lasts",), True: ("lasts", "positions")}
"""Options of an operation that are said in words of their own, or mean nothing in the image encoder."""

WIDTH = 79
"""Columns of the text: a plain terminal's."""

_LASTS = {
    "forward": "this step only: at the next one the tokens are back, and are chosen anew wherever the probe acts",
    "generation": "the rest of the generation: later steps run without them, in every layer",
}


def explain(
    recipe: Recipe,
    facts: ModelFacts,
    n_visual: int | None = None,
    *,
    steps: int | None = None,
    vocabulary: Vocabulary | None = None,
) -> str:
    """What a recipe does on a model, probe by probe, in plain words.

    `n_visual` turns shares into numbers of tokens; `steps` is the number of denoising steps where the recipe itself
    leaves it to the task or the backbone.
    """
    nominal = recipe.generate.steps or steps
    table = compile_recipe(recipe, facts, vocabulary=vocabulary)
    lines = [_row("", recipe.name + (f": {recipe.about}" if recipe.about else ""))]
    if recipe.paper:
        lines.append(_row("paper: ", recipe.paper))
    length = f"{nominal} denoising steps" if nominal else "as many denoising steps as the task or the backbone sets"
    visual = "" if n_visual is None else f", {n_visual} visual tokens"
    model = f"{facts.name} (layers 0..{facts.layers - 1})"
    lines.append(_row("on ", f"{model}, {length}{visual}, data {recipe.data.source}"))
    if recipe.dial:
        used = set(recipe.dials_used)
        shown = (f"{k} = {_value(v)}" + ("" if k in used else " (used nowhere)") for k, v in recipe.dial.items())
        lines.append(_row("dials: ", ", ".join(shown)))
    if not table.probes:
        lines.append("no probes: the bare model runs")
    for number, (_, group) in enumerate(groupby(table.probes, key=lambda p: p.name), 1):
        lines += ["", *_probe(number, list(group), facts, nominal, n_visual)]
    return "\n".join(lines) + "\n"


def _probe(
    number: int, probes: list[BoundProbe], facts: ModelFacts, nominal: int | None, n_visual: int | None
) -> list[str]:
    first, inside = probes[0], probes[0].site.in_encoder
    layers = _layers([p.layer for p in probes if p.layer is not None], facts.encoder_layers if inside else facts.layers)
    rows = [
        ("where", _SITES[first.site].format(layers=layers)),
        ("when", ONCE if inside else _steps(first.steps, nominal)),
    ]
    if inside:
        rows += [("sees", looks_at(first))] if first.site is not Site.IMAGES else []
        n_visual = None
    if first.when:
        conditions = " and ".join(condition.in_words() for condition in first.when)
        rows.append(("only", f"for a sample from the pass on before which {conditions}"))
    if first.edit is None:
        for record in first.records:
            entry = record.signal.entry
            renamed = "" if record.name == entry.name else f" (the signal {entry.name})"
            about = entry.meta.get("long_name") or entry.summary
            rows.append(("records", f"{record.name}{renamed}: {about}{_options(record.signal)}"))
    else:
        edits = [(p.layer, p.edit) for p in probes if p.edit is not None]
        if first.site is Site.IMAGES:
            rows.append(("does", _each([(at, e.do) for at, e in edits], nominal)))
            return _titled(number, probes, rows)
        score = first.edit.score
        if score is not None:
            rows.append(("scores", _each([(at, e.score) for at, e in edits if e.score is not None], nominal)))
        kept = _kept([(at, e.select) for at, e in edits], nominal, n_visual)
        whose = "each view's patches" if first.group == "view" else "each picture's patches"
        rows.append(("keeps", kept.replace("the sample's original visual tokens", whose) if inside else kept))
        rows.append(("does", _each([(at, e.do) for at, e in edits], nominal, leave_out=_LEFT_OUT[inside])))
        lasts = {str(p["lasts"]): None for _, e in edits for p in e.do.variants if "lasts" in p}
        if inside:
            rows += [("leaves", left)] if (left := patches_left(probes, facts)) else []
            rows.append(("lasts", lasting(first)))
        elif lasts:
            rows.append(("lasts", "; or ".join(_LASTS.get(word, word) for word in lasts)))
    return _titled(number, probes, rows)


def _titled(number: int, probes: list[BoundProbe], rows: list[tuple[str, str]]) -> list[str]:
    """A probe's rows under its name."""
    first = probes[0]
    verb = "intervenes" if first.edit is not None else "records"
    title = textwrap.wrap(f"{number}. {first.name} ({verb})", WIDTH)
    return [*title, *(_row(f"   {name:<8}", words) for name, words in rows)]


def _row(head: str, words: str) -> str:
    return textwrap.fill(words, WIDTH, initial_indent=head, subsequent_indent=" " * len(head), break_long_words=False)


def _each(calls: Sequence[tuple[int | None, Call]], nominal: int | None, leave_out: Iterable[str] = ()) -> str:
    """A part with its options; per layer where they differ."""
    entry = calls[0][1].entry
    texts = [_options(call, nominal, leave_out) for _, call in calls]
    if len(set(texts)) == 1:
        return f"{entry.name}: {entry.summary}{texts[0]}"
    each = "; ".join(f"layer {layer}:{text}" for (layer, _), text in zip(calls, texts, strict=True))
    return f"{entry.name}: {entry.summary} {each}"


def _options(call: Call, nominal: int | None = None, leave_out: Iterable[str] = ()) -> str:
    """The parameters of a call in brackets, with their schedule if they have one."""

    fields = call.entry.params.model_fields
    quiet = call.entry.meta.get("quiet", ())

    def words(params: dict[str, Any]) -> str:
        shown = {k: v for k, v in params.items() if k not in leave_out and (k not in quiet or v != fields[k].default)}
        inside = [f"{k} {', '.join(_part(c, nominal) for c in calls)}" for k, calls in call.nested.items()]
        return ", ".join([f"{fields[k].alias or k} {_value(v)}" for k, v in shown.items()] + inside)

    if not words(call.variants[0]):
        return ""
    if call.constant:
        return f" [{words(call.variants[0])}]"
    return f" [{'; '.join(f'{_from(share, nominal)}: {words(params)}' for share, params in call.segments)}]"


def _part(call: Call, nominal: int | None) -> str:
    """A part that stands inside another one."""
    own = "" if call.score is None else f" by {_part(call.score, nominal)}"
    return f"{call.entry.name}{_options(call, nominal)}{own}"


def _kept(calls: Sequence[tuple[int | None, Call]], nominal: int | None, n_visual: int | None) -> str:
    """How many tokens a selection keeps, over the layers and steps."""
    entry = calls[0][1].entry
    if calls[0][1].variants[0].get("keep") is None:
        return f"{entry.name}: {entry.summary}{_options(calls[0][1])}"
    texts = []
    for _, call in calls:
        parts = [_tokens(params, n_visual) for params in call.variants]
        if len(set(parts)) == 1:
            texts.append(parts[0])
        else:
            timed = zip(call.segments, parts, strict=True)
            texts.append(", ".join(f"{_from(share, nominal)} {part}" for (share, _), part in timed))
    others = _options(calls[0][1], nominal, leave_out=("keep", "round"))
    if len(set(texts)) == 1:
        return f"{texts[0]}, chosen by {entry.name}{others}"
    each = "; ".join(f"layer {layer}: {text}" for (layer, _), text in zip(calls, texts, strict=True))
    return f"{each}; chosen by {entry.name}{others}"


def _tokens(params: dict[str, Any], n_visual: int | None) -> str:
    from probe.selections import token_count  # imports torch

    keep, rounding = params["keep"], params.get("round", "floor")
    if not isinstance(keep, int | float):
        return f"visual tokens counted by {keep}"
    if isinstance(keep, float):
        share = f"{_percent(keep)} of the sample's original visual tokens"
        if n_visual is None:
            return share
        return f"{token_count(keep, n_visual, rounding)} of {n_visual} visual tokens ({_percent(keep)})"
    return f"{keep} visual tokens" + (
        "" if n_visual is None else f" (of {n_visual})" if keep <= n_visual else f" (all {n_visual})"
    )


def _layers(layers: Sequence[int], count: int) -> str:
    if len(layers) == count and count > 1:
        return f"every layer (0..{count - 1})"
    name = "layer " if len(layers) == 1 else "layers "
    return name + _ranges(layers)


def _ranges(numbers: Sequence[int]) -> str:
    """`2, 4..7, 9`: runs of neighbours in short."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    words = [str(r[0]) if len(r) == 1 else f"{r[0]}..{r[-1]}" if len(r) > 2 else f"{r[0]}, {r[1]}" for r in runs]
    return ", ".join(words if len(words) <= 12 else [*words[:10], "...", words[-1]])


def _steps(steps: Steps, nominal: int | None) -> str:
    if steps.exactly == ("prefill",):
        return "when the prompt is computed for a cache"
    if steps.of != "steps":
        start = _percent(float(steps.span.start))
        share = "all along" if not steps.span.start else f"from {start} of the {steps.of} on"
        return share + ("" if steps.span.stop is None else f", up to {_percent(float(steps.span.stop))}")
    if nominal is None:
        return _steps_in_words(steps)
    fired = [step for step in range(nominal) if steps.includes(step, nominal)]
    if not fired:
        return f"never within the {nominal} nominal steps: {_steps_in_words(steps)}"
    late = [p for p in steps.exactly or () if isinstance(p, int) and p >= nominal]
    beyond = f"; {_ranges(late)} beyond the nominal steps, reached only if the decoder runs longer" if late else ""
    if len(fired) == nominal:
        return f"every step (0..{nominal - 1})"
    name = "step" if len(fired) == 1 else "steps"
    return f"{_steps_in_words(steps)}: {name} {_ranges(fired)} ({len(fired)} of {nominal}){beyond}"


def _steps_in_words(steps: Steps) -> str:
    if steps.exactly is not None:
        points = [f"the {p} one" if isinstance(p, str) else _point(p) for p in steps.exactly]
        return f"exactly at {', '.join(points)}"
    span: Span = steps.span
    every = "every step" if span.every == 1 else f"one step in {span.every}"
    start = f" from {_point(span.start)} on" if span.start or span.every > 1 else ""
    stop = "" if span.stop is None else f" before {_point(span.stop)}"
    return every + start + stop


def _point(point: int | float) -> str:
    return f"{_percent(point)} of the steps" if isinstance(point, float) else f"step {point}"


def _from(share: float, nominal: int | None) -> str:
    if nominal is None:
        return f"from {_percent(share)} of the steps on"
    return f"from step {first_step(share, nominal)} on"


def _percent(share: float) -> str:
    return f"{100 * share:.6g}%"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_value(v)}" for k, v in value.items()) + "}"
    return "null" if value is None else str(value)
