"""A forecast in words."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from probe.forecast import Forecast

WIDTH = 79


def render(found: Forecast) -> str:
    """A forecast in words."""
    s = found.setting
    rows = [
        ("tokens", _tokens(found.tokens)),
        (
            "kept",
            f"{found.nominal:.1%} at the least (nominal), {found.layer_average:.1%} over the layers of the first step "
            f"that lacks some, {found.trajectory_average:.1%} over layers and steps (trajectory)",
        ),
    ]
    if found.flops is not None:
        rows.append(
            (
                "FLOPs",
                f"{found.flops:.0%} of the unpruned run's, in the decoder and its head, without what scoring costs"
                + ("" if found.closed_form is None else f"; {found.closed_form:.0%} by the study's equation (8)"),
            )
        )
    else:
        rows.append(("FLOPs", "not foreseen for this decoder or its cache; `probe budget` counts them in a run"))
    rows += [("unsure", f"`{name}`: {why}") for name, why in found.unsure.items()]
    rows += [("cannot", why) for why in found.limits]
    cache = "" if s.cache == "none" else f", cache `{s.cache}`"
    head = (
        f"forecast for {s.visual} visual tokens, {s.steps} steps, {s.slots} answer slots, about {s.text} positions of "
        f"text{cache}"
    )
    lines = textwrap.wrap(head, WIDTH)
    for name, words in rows:
        lines += textwrap.wrap(
            words, WIDTH, initial_indent=f"   {name:<8}", subsequent_indent=" " * 11, break_long_words=False
        )
    return "\n".join(lines) + "\n"


def _tokens(tokens: np.ndarray) -> str:
    """`steps 0..11: 192 in layers 0..5; ...`: runs of equal steps, and in them runs of equal layers."""
    parts, step = [], 0
    for row, group in groupby(map(tuple, tokens.tolist())):
        n = len(list(group))
        parts.append(f"{_run('step', step, n)}: {_by_layer(row)}")
        step += n
    if len(parts) > 6:
        parts = [*parts[:3], "...", parts[-1]]
    return "; ".join(parts)


def _by_layer(row: Sequence[int]) -> str:
    if len(set(row)) == 1:
        return f"{row[0]} in every layer"
    out, layer = [], 0
    for count, group in groupby(row):
        n = len(list(group))
        out.append(f"{count} in {_run('layer', layer, n)}")
        layer += n
    return ", ".join(out)


def _run(what: str, first: int, n: int) -> str:
    return f"{what} {first}" if n == 1 else f"{what}s {first}..{first + n - 1}"
