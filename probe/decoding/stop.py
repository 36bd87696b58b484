"""Stop strings as LLaDA-V looks for them: exact id subsequences of the generated part."""

from __future__ import annotations

from collections.abc import Sequence


def find(ids: Sequence[int], pattern: Sequence[int]) -> int | None:
    """Where `pattern` first occurs in `ids`; None when it does not (an empty pattern never does)."""
    n = len(pattern)
    if n == 0:
        return None
    for start in range(len(ids) - n + 1):
        if list(ids[start : start + n]) == list(pattern):
            return start
    return None


def search(ids: Sequence[int], patterns: Sequence[Sequence[int]], known: int | None) -> int | None:
    """The stop position after a step, given the one known before.

    Patterns are tried in order until a stop is known, so once there is one only the first pattern is looked for
    again; it can only move the stop forward (to an earlier place). That is the published rule, oddity included.
    """
    for pattern in patterns:
        place = find(ids, pattern)
        if place is not None and (known is None or place < known):
            known = place
        if known is not None:
            break
    return known
