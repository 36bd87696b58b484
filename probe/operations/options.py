"""What the options of operations may be."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

Lasts = Literal["forward", "generation"]
Ordering = Literal["raster", "score", "unmerged_first", "parts"]
AnswerPositions = Literal["original", "shrunk"]
OnCache = Literal["refresh", "columns"]
Protect = tuple[Literal["newline", "cls"], ...]

QUIET = ("answer_positions", "on_cache", "protect", "carry_size", "scale", "append", "neighbours")
"""Options that go without saying where they are at their default."""


def reading(*names: str) -> Callable[[Mapping[str, Any]], Collection[str]]:
    """What an operation reads: these names, and the parts of a combination where the tokens shall stand by them."""
    return lambda params: {*names, *(["part"] if params.get("order") == "parts" else [])}
