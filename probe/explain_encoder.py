"""What a probe in the image encoder does, in plain words and in numbers of tokens per view."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from probe.compile import BoundProbe
from probe.site import ModelFacts

ONCE = "once, while the pictures are encoded: before the first step"
FOR_GOOD = (
    "the rest of the generation. Without a grid of patches tiles are not joined: what is left of every view stands "
    "without newlines, one view after the other, a picture's base view first; "
)
PLACES = {
    "compact": "positions are numbered anew",
    "keep": "everything keeps the position that it has in the unpruned sequence",
}


_EXACT = ("bipartite", "deduplicate", "greedy_diverse", "stride", "then", "top_k")
"""Selections that keep as many as `keep` says, whatever the picture."""


def looks_at(probe: BoundProbe) -> str:
    """Which views a probe sees, and which tokens it decides on together."""
    views = {"all": "every view", "base": "base views alone", "tiles": "tiles alone"}[probe.views]
    together = "each view for itself" if probe.group == "view" else "all views of a picture together"
    return f"{views}, {together}"


def lasting(probe: BoundProbe) -> str:
    """For how long, and where the rest stands."""
    assert probe.edit is not None
    return FOR_GOOD + PLACES[probe.edit.do.variants[0].get("positions", "keep")]


def patches_left(probes: Sequence[BoundProbe], facts: ModelFacts) -> str:
    """How many tokens of a view are left after each layer, where the recipe alone says so; else nothing."""
    if not facts.patches or probes[0].group != "view":
        return ""
    n, after = facts.patches, []
    for probe in sorted(probes, key=lambda p: -1 if p.layer is None else p.layer):
        assert probe.edit is not None
        left = _left(probe.edit.select.entry.name, probe.edit.select.variants[0], n, facts.patches)
        if left is None:
            return ""
        n = left + (1 if probe.edit.do.entry.name == "append" else 0)
        after.append(n)
    whole = f"of a view's {facts.patches} patches"
    if probes[0].layer is None:
        return f"{after[0]} tokens {whole}"
    if len(after) == 1:
        return f"{after[0]} tokens {whole} after layer {probes[0].layer}"
    layers = sorted(p.layer for p in probes if p.layer is not None)
    named = f"{layers[0]}..{layers[-1]}" if layers == list(range(layers[0], layers[-1] + 1)) else _series(layers)
    return f"{_series(after)} tokens {whole} after layers {named}"


def _series(numbers: Sequence[int], most: int = 8) -> str:
    words = [str(n) for n in numbers]
    return ", ".join(words if len(words) <= most else [*words[: most - 2], "...", words[-1]])


def _left(selection: str, params: dict[str, Any], n: int, patches: int) -> int | None:
    """Tokens that a selection leaves of n; None where that depends on the picture."""
    from probe.selections import token_count  # imports torch

    if selection == "none":
        return 0
    if isinstance(params.get("r"), int):
        return n - min(params["r"], n // 2)
    keep = params.get("keep")
    if selection in _EXACT and isinstance(keep, int | float):
        return min(n, token_count(keep, patches, params.get("round", "floor")))
    return None
