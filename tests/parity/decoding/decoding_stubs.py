"""Stub models that hand out saved logits, and the record that they keep of being called.

A canvas of embeddings one number wide, the token's id, goes through the project's own loop; what a pass was fed is read
back from it. Places are absolute: the prompt's rows first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probe.backbones.base import Prompt
from probe.canvas import Canvas
from probe.decoding.draw import Draw
from probe.loop import Pass, PassResult
from probe.site import Clock, Role


def embed(ids: Tensor) -> Tensor:
    """`(...)` ids to `(..., 1)` embeddings: the id itself."""
    return ids[..., None].float()


def prompt_of(ids: Sequence[int]) -> Prompt:
    """A text prompt of these ids (negative ones stand for embeddings that are no token's)."""
    n = len(ids)
    return Prompt(
        ids=torch.tensor(ids),
        embeds=embed(torch.tensor(ids)),
        role=torch.full((n,), int(Role.QUESTION), dtype=torch.int8),
        visual=torch.full((n,), -1),
        box=torch.empty(0, 4),
        view=torch.empty(0, dtype=torch.int16),
        picture=torch.empty(0, dtype=torch.int16),
    )


def tokens_of(canvas: Canvas) -> list[list[int]]:
    """The ids on a canvas, sample by sample."""
    rows = canvas.embeds[..., 0].long().tolist()
    return [row[:n] for row, n in zip(rows, canvas.layout.length, strict=True)]


class Saved(Draw):
    """Saved numbers in the place of a generator's; every kind is taken pass by pass, in order."""

    def __init__(self, sample: int, tensors: dict[str, Tensor]) -> None:
        self.sample, self.tensors = sample, tensors
        self.used = dict.fromkeys(tensors, 0)

    def _next(self, name: str) -> Tensor:
        self.used[name] += 1
        return self.tensors[name][self.used[name] - 1]

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        drawn = self._next("uniform")
        drawn = drawn[self.sample] if drawn.dim() > 1 else drawn
        assert len(shape) == 1 and (drawn[shape[0] :] < 0).all(), "more numbers were saved than asked for"
        return drawn[: shape[0]]

    def uniform_rows(self, length: int, rows: Tensor, width: int) -> Tensor:
        drawn = self._next("noise")[self.sample]
        assert drawn.shape == (length, width)
        return drawn[rows]

    def permutation(self, n: int) -> Tensor:
        drawn = self._next("randperm")
        assert (drawn[:n] >= 0).all() and (drawn[n:] < 0).all()
        return drawn[:n]


@dataclass
class Table:
    """The row of slot p in pass c is `table[c mod C, p]`, whatever was fed. `table (C, N, V)` or `(C, batch, N, V)`."""

    table: Tensor
    shift: int = 0
    prefill: Tensor | None = None
    """`(P, V)`: what a prefill hands out; it is not counted as a call."""
    rows: list[list[list[int]]] = field(default_factory=list)
    """Per call and sample: the places that were computed."""
    inputs: list[list[list[int]]] = field(default_factory=list)
    work: list[Any] = field(default_factory=list)
    unconditional: list[list[list[int]]] = field(default_factory=list)

    def logits_at(self, call: int, sample: int, places: Tensor, tokens: Tensor) -> Tensor:
        """`(c, V)` rows of these places; `tokens (N,)` is what was fed."""
        now = self.table[call % len(self.table)]
        return (now if now.dim() == 2 else now[sample])[places]

    def __call__(self, request: Pass) -> PassResult:
        layout = request.canvas.layout
        places = layout.locate(request.rows)
        read = places
        if self.shift:
            assert (request.previous >= 0).all(), "a wanted slot whose predicting row is not computed"
            read = layout.locate(request.previous)
        if not any(request.computed):
            assert self.prefill is not None or not request.rows.numel()
            logits = self.prefill[read] if self.prefill is not None else torch.empty(len(read), 0, 1)
            return PassResult(logits.clone(), request.canvas, tuple(layout.length), places)
        call = len(self.rows)
        self.rows.append([self._computed(request, b) for b in range(layout.batch)])
        self.inputs.append(tokens_of(request.canvas))
        self.work.append(request.work)
        streams = [request.canvas.embeds[..., 0].long()]
        if request.guided:
            streams.append(request.canvas.unconditional(embed(torch.tensor(self.mask_id)))[..., 0].long())
            self.unconditional.append(streams[1].tolist())
        logits = torch.stack([self.logits_at(call, b, read[b], fed[b]) for fed in streams for b in range(layout.batch)])
        if request.shadow:
            width = len(request.window[0])
            behind = layout.length[0] + torch.arange(width)
            shadow = torch.stack([self.logits_at(call, b, behind, streams[0][b]) for b in range(layout.batch)])
            logits = torch.cat([logits, shadow], 1)
        return PassResult(logits.clone(), request.canvas, tuple(layout.length), places)

    mask_id: int = 23

    def wants_every_row(self, clock: Clock) -> str | None:
        return None

    @staticmethod
    def _computed(request: Pass, sample: int) -> list[int]:
        """Places that the pass computes, prompt rows included."""
        layout, work = request.canvas.layout, request.work
        prompt = layout.length[sample] - layout.tail[sample]
        first = {"all": 0, "last": prompt - 1, "none": prompt}[work.prompt]
        tail = np.arange(layout.tail[sample]) if request.tail is None else request.tail[sample]
        return [*range(first, prompt), *sorted({prompt + int(t) for t in tail})]


@dataclass
class Context(Table):
    """`TA[p] + TBl[token before] + TBr[token behind] + TCc[token]`, in this order; a missing neighbour adds nothing."""

    left: Tensor | None = None
    right: Tensor | None = None
    own: Tensor | None = None

    def logits_at(self, call: int, sample: int, places: Tensor, tokens: Tensor) -> Tensor:
        assert self.left is not None and self.right is not None and self.own is not None
        nothing = torch.zeros(1, self.left.shape[1])
        before = torch.cat([nothing, self.left[tokens[:-1]]])
        behind = torch.cat([self.right[tokens[1:]], nothing])
        return (self.table + before + behind + self.own[tokens])[places]


@dataclass
class Sparse(Table):
    """`vals (C, N, K)` at `table (C, N, K)` (ids), and a background elsewhere."""

    values: Tensor | None = None
    background: float = 0.0
    vocabulary: int = 0

    def logits_at(self, call: int, sample: int, places: Tensor, tokens: Tensor) -> Tensor:
        assert self.values is not None
        at = call % len(self.table)
        out = torch.full((len(places), self.vocabulary), self.background)
        return out.scatter_(1, self.table[at, places], self.values[at, places])
