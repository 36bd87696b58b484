"""Which inputs a part of the vocabulary may ask for by name. A misspelled one is found when a recipe is compiled."""

from __future__ import annotations

from probe.compile_call import Call
from probe.compile_fit import located
from probe.recipe_words import Wrong
from probe.registry import Entry, nearest
from probe.site import Site

GIVEN: dict[str, frozenset[str]] = {
    "any": frozenset((
        "n", "original", "progress", "layer_index", "generator", "noise", "hidden", "layer_input", "embedding",
        "image_features", "text_features", "keys", "received", "attended", "n_queries", "rotary_received",
        "text_hidden", "text_keys", "text_row", "row", "box", "view", "columns", "newline", "cls", "size",
    )),
    "score": frozenset(("group",)),
    "selection": frozenset((
        "score", "similarity", "features", "text_score", "count", "candidate", "alive", "budget", "protected", "group",
    )),
    "operation": frozenset(("kept", "into", "part", "parts", "score", "similarity", "features")),
}  # fmt: skip
"""Names by kind of part; those under `any` are for all of them (`probe.scores`, `probe.selections`,
`probe.operations` say what each is)."""

_HIDDEN = frozenset(("hidden", "row_role", "row_visual", "n_visual"))
_PATCHES = frozenset(("hidden", "patch_view", "alive"))

RECORDED: dict[Site, frozenset[str]] = {
    **dict.fromkeys(
        (Site.BEFORE_LM, Site.LAYER_INPUT, Site.LAYER_AFTER_ATTENTION, Site.LAYER_OUTPUT, Site.FINAL), _HIDDEN
    ),
    **dict.fromkeys((Site.ENCODER_LAYER_AFTER_ATTENTION, Site.ENCODER_OUTPUT, Site.PROJECTOR_OUTPUT), _PATCHES),
    Site.ENCODER_LAYER_ATTENTION: frozenset(("received", "patch_view", "alive")),
    Site.LAYER_ATTENTION: frozenset(("received", "key_role", "key_visual", "n_visual")),
    Site.LOGITS: frozenset(("logits", "confidence", "reference", "uncached")),
}
"""What a signal is given, by site (`probe.signals`, `probe.signals.encoder`)."""


def check_inputs(*parts: tuple[Call | None, str]) -> None:
    """Every name that a score, selection or operation asks for must be one that is given. Faults raise `Wrong`."""
    for part, top in parts:
        for call, path in () if part is None else located(part, (top, part.entry.name)):
            known = GIVEN["any"] | GIVEN[call.entry.kind]
            for name in call.entry.needs:
                if name not in known:
                    raise Wrong(_unknown(call.entry, name, known), *path)


def check_recorded(entry: Entry, site: Site) -> None:
    """Likewise for a signal at its site."""
    known = RECORDED.get(site, frozenset())
    for name in entry.needs:
        if name not in known:
            raise Wrong(_unknown(entry, name, known))


def _unknown(entry: Entry, name: str, known: frozenset[str]) -> str:
    where = getattr(entry.function, "__code__", None)
    place = "" if where is None else f" ({where.co_filename}:{where.co_firstlineno})"
    return (
        f"the {entry.kind} `{entry.name}`{place} asks for `{name}`, which nothing gives here; "
        f"{nearest(name, sorted(known))}; parameters that a recipe sets stand behind a `*`"
    )
