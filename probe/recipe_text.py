"""A recipe as a file that people read: comments in front, each paragraph wrapped, then its YAML."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from probe.recipe import Recipe

WIDTH = 120


def with_comments(recipe: Recipe, paragraphs: Sequence[str]) -> str:
    """The recipe's YAML behind these paragraphs as comments. Lines that are comments already stay as they are."""
    lines: list[str] = []
    for text in (t.strip("\n") for t in paragraphs if t.strip()):
        if text.startswith("#"):
            lines += [*text.splitlines(), "#"]
        else:
            lines += textwrap.wrap(text, WIDTH, initial_indent="# ", subsequent_indent="# ", break_long_words=False)
    return "\n".join([*lines, "", recipe.to_yaml()])


def opening_comment(text: str) -> str:
    """The comment lines that a recipe file begins with."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line)
    return "\n".join(lines)
