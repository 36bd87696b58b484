"""Questions and pictures to Dimple's prompt: chat messages, ids with room for visual tokens, positions on 3 axes."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from probe.backbones.prompt import PLACE, USER
from probe.errors import ProbeError

Part = dict[str, str]
Grid = tuple[int, int]
"""Rows and columns of a picture's visual tokens."""

NAMED_PLACE = re.compile(r"<image (\d+)>")
"""Where an interleaved question names a picture, counted from 1."""


def user_turn(question: str, pictures: int, *, interleave: bool) -> tuple[list[Part], list[int]]:
    """The parts of the user's turn, and which picture each picture part shows.

    The mark `<image>` is deleted, wherever it stands. Pictures come first, or with `interleave` in the places
    `<image 1>`, `<image 2>`, ... of the question; a number beyond the pictures names the last one, and a picture that
    no place names is not shown. That is what the published evaluation does.
    """
    text = question.replace(PLACE, "")
    if not interleave:
        return [*_pictures(pictures), _text(text)], list(range(pictures))
    parts: list[Part] = []
    order: list[int] = []
    for i, piece in enumerate(NAMED_PLACE.split(text)):
        if i % 2 == 0:
            parts += [_text(piece)] if piece else []
        elif pictures:
            parts += _pictures(1)
            order.append((min(int(piece), pictures) - 1) % pictures)
    return parts, order


def _text(text: str) -> Part:
    return {"type": "text", "text": text}


def _pictures(count: int) -> list[Part]:
    return [{"type": "image"} for _ in range(count)]


def chat(parts: Sequence[Part]) -> list[dict[str, object]]:
    """One user turn as chat messages; the template puts its own system turn before it."""
    return [{"role": USER, "content": list(parts)}]


def make_room(ids: Sequence[int], grids: Sequence[Grid], image: int) -> list[int]:
    """Repeat the id `image`, which stands once per picture, as often as the picture has visual tokens."""
    found = list(ids).count(image)
    if found != len(grids):
        counted = f"{found} places for {len(grids)} pictures"
        raise ProbeError(f"the prompt has {counted}; a question must not contain the picture's own token")
    left = iter(grids)
    out: list[int] = []
    for token in ids:
        rows, columns = next(left) if token == image else (1, 1)
        out += [token] * (rows * columns)
    return out


def positions(ids: Tensor, grids: Sequence[Grid], image: int) -> Tensor:
    """M-RoPE positions `(length, 3)` int64 (time, row, column) of `ids (length,)` in which pictures have their room.

    Text counts up on all axes alike. A picture that begins at count c stands at time c, rows c, c+1, ... and columns
    c, c+1, ...; text after it goes on at the largest position so far plus one. Raises where the runs of `image` do
    not fit the grids.
    """
    places = (ids == image).cpu()
    count, at = 0, 0
    pieces: list[Tensor] = []
    for rows, columns in grids:
        text = int(places[at:].int().argmax()) if bool(places[at:].any()) else ids.shape[0] - at
        pieces.append(_count_up(count, text))
        count, at = count + text, at + text
        room = places[at : at + rows * columns]
        if room.shape[0] != rows * columns or not bool(room.all()):
            raise ProbeError(f"{int(room.sum())} places at {at} for a picture of {rows} x {columns} visual tokens")
        cell = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns))
        pieces.append(cell.view(-1, 3) + count)
        count, at = count + max(rows, columns), at + rows * columns
    if bool(places[at:].any()):
        raise ProbeError(f"places for visual tokens are left over at {at}, after {len(grids)} pictures")
    pieces.append(_count_up(count, ids.shape[0] - at))
    return torch.cat(pieces).to(ids.device)


def _count_up(first: int, length: int) -> Tensor:
    return torch.arange(first, first + length)[:, None].expand(length, 3)
