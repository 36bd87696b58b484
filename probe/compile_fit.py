"""Whether the parts of an intervention fit each other, and the place where it stands. Faults raise `Wrong`.

Paths are below the probe: `select.union.of[0].top_k`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from probe.compile_call import Call, layer_error
from probe.recipe_words import Wrong
from probe.recipe_yaml import KeyPath
from probe.registry import nearest
from probe.site import QuerySet, Site

_KIND_OF = {"score": "per_token", "similarity": "pairwise", "features": "features"}
"""Which kind of score a selection reads under which name."""

_WORDS = {
    "per_token": "one number per token (such as `attention`)",
    "pairwise": "one number per pair of tokens (such as `similarity`)",
    "features": "vectors to compare tokens by (such as `features`)",
}

_HIDDEN = {"hidden", "layer_input", "text_hidden"}
"""Inputs that need hidden states at the probe's place."""

_IN_LAYER = {"attention", "received", "attended", "rotary_received", "n_queries", "keys", "text_keys"}
"""Inputs that a layer's attention has to have computed."""


def kinds(score: Call | None) -> set[str]:
    """What a score may give, over all its parameters in time."""
    if score is None:
        return set()
    kind = score.entry.meta.get("kind", "per_token")
    return {str(kind(params) if callable(kind) else kind) for params in score.variants}


def located(call: Call, path: KeyPath) -> Iterator[tuple[Call, KeyPath]]:
    """A call and all calls inside it, each with its place in the recipe; `path` ends with the call's own name."""
    yield call, path
    for name, calls in call.nested.items():
        for i, inner in enumerate(calls):
            many = call.entry.slots[name].many
            yield from located(inner, (*path, name, *([i] if many else []), inner.entry.name))
    if call.score is not None:
        yield from located(call.score, (*path, "score", call.score.entry.name))


_GIVES = {
    "into": "a selection that says who joins whom, such as `bipartite` (others go with `assign: kept`)",
    "part": "a combination of selections, such as `then`",
}
"""What an operation may read of a selection besides which tokens stay."""


def check_choice(select: Call, do: Call) -> None:
    """An operation that reads more of a selection than which tokens stay must get it."""
    for params in do.variants:
        for name in do.entry.reads(params):
            if name in _GIVES and name not in select.entry.meta.get("gives", ()):
                raise Wrong(
                    f"the operation `{do.entry.name}` needs {_GIVES[name]} here; `{select.entry.name}` is none",
                    "select",
                )


def check_scores(score: Call | None, select: Call, do: Call) -> None:
    """Every part that reads a score must be given one of the kind it reads, and a score must be read by someone."""
    keeps = [params.get("keep") for params in select.variants]
    if words := [str(keep) for keep in keeps if getattr(keep, "rule", "") in ("rest", "budget")]:
        raise Wrong(
            f"`{words[0]}` speaks of the `keep` of a combination around the selection, and there is none",
            *("select", select.entry.name, "keep"),
        )
    if score is not None:
        for call, path in located(score, ("score", score.entry.name)):
            _check(call, path[:-1], path, score, select)
    read = False
    for part, top in ((select, "select"), (do, "do")):
        for call, path in located(part, (top, part.entry.name)):
            read |= _check(call, path[:-1], path, score, select)
    if score is not None and not read:
        raise Wrong(f"the selection `{select.entry.name}` looks at no score; remove `score`", "score")


def _check(call: Call, place: KeyPath, path: KeyPath, score: Call | None, select: Call) -> bool:
    """Whether a call reads a score; `Wrong` where it does not get the one it reads."""
    for name, slot in call.entry.slots.items():
        for inner in call.nested.get(name, ()) if slot.kind == "score" else ():
            for given in kinds(inner) - {slot.gives}:
                what, said = _WORDS[slot.gives], _WORDS[given].split(" (")[0]
                raise Wrong(f"`{name}` needs {what}, but `{inner.entry.name}` gives {said} here", *path, name)
    if call.entry.kind == "score":
        return False
    names = {n for params in call.variants for n in call.entry.reads(params) if n in _KIND_OF}
    counted = {n for params in call.variants for n in getattr(params.get("keep"), "reads", ())}
    if "rank" in counted and (score is None or "received" not in score.entry.needs):
        raise Wrong("`rank` is that of attention rows: the probe's `score` must be `attention`", *path, "keep")
    names |= counted & set(_KIND_OF)
    own = kinds(call.score)
    needed = {_KIND_OF[n] for n in names} - own
    if not needed:
        return bool(names or counted)
    what = f"the {call.entry.kind} `{call.entry.name}`"
    if score is None:
        raise Wrong(f"{what} needs a `score` with {_WORDS[min(needed)]}", *place)
    for kind in sorted(needed):
        for given in kinds(score) - {kind}:
            gives = _WORDS[given].split(" (")[0]
            raise Wrong(f"{what} needs {_WORDS[kind]}, but `{score.entry.name}` gives {gives} here", "score")
    return True


def check_layers(site: Site, layer: int | None, score: Call | None, select: Call, do: Call) -> None:
    """Attention and keys that a part reads must be known where the probe stands."""
    parts = [(part, top) for part, top in ((score, "score"), (select, "select"), (do, "do")) if part is not None]
    for part, top in parts:
        for call, path in located(part, (top, part.entry.name)):
            for params in call.variants:
                reads = set(call.entry.reads(params))
                if site is Site.PREFIX_CACHE and (reads := reads & (_IN_LAYER | _HIDDEN) - {"keys"}):
                    what = "attention" if reads & _IN_LAYER else f"`{min(reads)}`"
                    raise Wrong(
                        f"{what} is not to be had from stored keys and values; score by keys, such as "
                        "`similarity: {space: keys}`",
                        *path,
                    )
                if reads & {"received", "attended"}:
                    _check_rows(params, path)
                if _IN_LAYER & reads:
                    _check_layer(site, layer, params, path, "layer" in call.written)


def _check_rows(params: dict[str, Any], path: KeyPath) -> None:
    """Rows that look must be rows of the language model's sequence, whatever a part's own annotation allows."""
    queries, known = str(params.get("queries")), [name for name in get_args(QuerySet) if name != "cls"]
    if queries not in known:
        why = "is a row of the image encoder" if queries == "cls" else "is no set of rows"
        hint = f"known: {', '.join(known)}" if queries == "cls" else nearest(queries, known)
        raise Wrong(f"`queries: {queries}` {why}; {hint}", *path, "queries")


def _check_layer(site: Site, layer: int | None, params: dict[str, Any], path: KeyPath, written: bool) -> None:
    relative = params.get("layer", 0)
    if params.get("projected"):
        if site is not Site.LAYER_INPUT or relative != 0:
            raise Wrong(
                "`projected` looks at the layer that is about to run: at `layer.input`, with `layer: 0`",
                *path,
                "projected",
            )
        return
    if isinstance(relative, int) and (words := layer_error(site, layer, relative)):
        raise Wrong(words, *path, *(["layer"] if written else []))
