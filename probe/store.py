"""Stored keys and values of one batch, layer by layer: what a pass reads of rows that it does not compute.

The store always holds the latest keys and values that were computed of a row. Keys are kept after rotary, as the layers
hand them over. A layer's columns have a `Layout` of their own, because an edit inside a pass leaves deeper layers with
fewer rows; lengths change through `surgery` alone. It knows no model, no probe and no policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from probe.site import Fate, Plan
from probe.surgery import Layout, extend, hide, keep_places, narrow, put_columns, replan, take_columns


@dataclass
class _Layer:
    """`key`, `value (streams * batch, kv head, column, size)` and what stands in each column."""

    key: Tensor
    value: Tensor
    layout: Layout


class KeyStore:
    """The stored columns of every layer.

    `begin` says what a pass computes before it runs; `columns` what its queries will attend to at a layer; `write`
    puts a layer's fresh keys and values in and returns all of them.
    """

    def __init__(self, layers: int) -> None:
        self.layers: list[_Layer | None] = [None] * layers
        self._slots: frozenset[int] = frozenset()
        self._added = 0
        self._known = False
        self._columns: dict[int, tuple[Layout, Layout, Tensor | None]] = {}

    @property
    def empty(self) -> bool:
        """Whether nothing is stored."""
        return self.layers[0] is None

    def clear(self) -> None:
        """Forget everything."""
        self.layers = [None] * len(self.layers)
        self._slots = frozenset()

    def begin(self, slots: Sequence[int], *, prompt: bool, rows: int) -> None:
        """A pass that computes these places behind the prompt (and prompt rows, if `prompt`), `rows` in all, begins.

        Rows are stored together, so they are all known, all new, or the known ones come again with new ones behind.
        """
        now = frozenset(slots)
        self._added = len(now - self._slots)
        self._known = not self.empty and self._added < rows
        self._slots |= now
        self._columns.clear()

    @property
    def uneven(self) -> bool:
        """Whether layers differ in their columns, so that one mask or one set of positions cannot serve them all."""
        held = [x.layout for x in self.layers if x is not None]
        return any(x is not held[0] and not _alike(x, held[0]) for x in held[1:])

    def columns(self, layer: int, fresh: Layout) -> Layout:
        """What the queries of a pass attend to at a layer, once `fresh` rows have been written."""
        return self._joined(layer, fresh)[0]

    def _joined(self, layer: int, fresh: Layout) -> tuple[Layout, Tensor | None]:
        """The columns' layout, and where the fresh rows go in it (None: they are all the columns)."""
        held = self.layers[layer]
        if held is None:
            return fresh, None
        # layers that share a layout share the joined one, too
        known = self._columns.get(id(held.layout))
        if known is not None and known[1] is fresh:
            return known[0], known[2]
        joined = extend(held.layout, _last(fresh, self._added)) if self._added else held.layout
        place = joined.locate(fresh.row.clamp(min=0))
        self._columns[id(held.layout)] = (joined, fresh, place)
        return joined, place

    def write(self, layer: int, fresh: Layout, key: Tensor, value: Tensor, streams: int = 1) -> tuple[Tensor, Tensor]:
        """Store a layer's fresh `key`, `value (streams * batch, kv head, row, size)`; returns all columns."""
        held = self.layers[layer]
        joined, place = self._joined(layer, fresh)
        if held is None or place is None:
            self.layers[layer] = _Layer(key, value, fresh)
            return key, value
        if joined is not held.layout:
            added = joined.width - held.layout.width
            tail_key, tail_value = key[:, :, -added:], value[:, :, -added:]
            held.key, held.value = torch.cat([held.key, tail_key], 2), torch.cat([held.value, tail_value], 2)
            held.layout = joined
            self._columns[id(joined)] = (joined, fresh, place)
        if self._known:
            put_columns(held.key, place, key, streams)
            put_columns(held.value, place, value, streams)
        return held.key, held.value

    def cut(self, layer: int, plans: Sequence[Plan | None], said_of: Layout, streams: int = 1) -> None:
        """Remove the columns of visual tokens that the plans, over the alive tokens of `said_of`, do not keep."""
        held = self.layers[layer]
        if held is None:
            return
        new, index = cut_columns(held.layout, plans, said_of)
        if index is not None:
            held.key, held.value = take_columns(held.key, index, streams), take_columns(held.value, index, streams)
        held.layout = new

    def forget_appended(self, layer: int, first: int, streams: int = 1) -> None:
        """Remove the columns of tokens that were appended with row numbers from `first` on. Waits for the device."""
        held = self.layers[layer]
        if held is None:
            return
        rows = held.layout.row
        plans = [Plan((rows[b, seen] < first).nonzero()[:, 0]) for b, seen in enumerate(held.layout.visual_rows)]
        new, index = narrow(held.layout, plans)
        held.key, held.value = take_columns(held.key, index, streams), take_columns(held.value, index, streams)
        held.layout = new

    def keep(self, layer: int, places: Sequence[Tensor], streams: int = 1) -> None:
        """Each sample keeps the columns at its `places (n,)`, ascending."""
        held = self.layers[layer]
        assert held is not None
        held.layout, index = keep_places(held.layout, places)
        held.key, held.value = take_columns(held.key, index, streams), take_columns(held.value, index, streams)

    def place_answers(self, starts: Sequence[int]) -> None:
        """From now on answer slots stand at positions from `starts[b]` on, whatever the stored keys' own."""
        for held in self.layers:
            if held is not None:
                held.layout = replace(held.layout, answer_start=tuple(starts))


def cut_columns(layout: Layout, plans: Sequence[Plan | None], said_of: Layout) -> tuple[Layout, Tensor | None]:
    """A layer's columns without what the plans, over the alive visual tokens of `said_of`, do not keep.

    Returns the layout and the gather index; None for an index where columns are hidden instead of removed: masking
    plans, and layouts whose alive tokens are others than those that the plans speak of.
    """
    same = layout is said_of or layout.visual_rows is said_of.visual_rows
    if not same and (layout.evicted or said_of.evicted):
        return _cut_evicted(layout, plans, said_of)
    if not same and layout.n_visual != said_of.n_visual:
        return _hidden_where(layout, plans, said_of), None
    said = [
        None
        if p is None
        else Plan(p.kept, p.fate)
        if layout.visual_rows[b] is said_of.visual_rows[b]
        else replan(p, said_of, layout, b)
        for b, p in enumerate(plans)
    ]
    if any(p is not None and p.fate is Fate.MASKED for p in plans):
        return hide(layout, said), None
    # stored keys carry the rotation of their position: they cannot be renumbered
    return narrow(layout, said, positions="keep")


def _cut_evicted(layout: Layout, plans: Sequence[Plan | None], said_of: Layout) -> tuple[Layout, Tensor | None]:
    """Of columns that a cache chose itself, those leave that the plans do not keep; waits for the device."""
    hidden = _hidden_where(layout, plans, said_of).hidden_key
    assert hidden is not None
    gone = hidden if layout.hidden_key is None else hidden & ~layout.hidden_key
    if any(p is not None and p.fate is Fate.MASKED for p in plans):
        alive = [rows[~hidden[b, rows]] for b, rows in enumerate(layout.visual_rows)]
        unseen = [rows[hidden[b, rows]] for b, rows in enumerate(layout.visual_rows)]
        others = tuple(torch.cat([a, b]) for a, b in zip(layout.other_rows, unseen, strict=True))
        return replace(layout, hidden_key=hidden, visual_rows=tuple(alive), other_rows=others), None
    return keep_places(layout, [(~gone[b, :n]).nonzero()[:, 0] for b, n in enumerate(layout.length)])


def _hidden_where(layout: Layout, plans: Sequence[Plan | None], said_of: Layout) -> Layout:
    """`layout` with the tokens hidden that the plans do not keep; how many that are is only known on the device."""
    hidden = torch.zeros_like(layout.row, dtype=torch.bool) if layout.hidden_key is None else layout.hidden_key.clone()
    for b, plan in enumerate(plans):
        if plan is None:
            continue
        keeps = torch.zeros(
            max(layout.length_at_start, said_of.length_at_start) + 1, dtype=torch.bool, device=hidden.device
        )
        keeps[said_of.row[b, said_of.visual_rows[b][plan.kept]]] = True
        rows = layout.visual_rows[b]
        hidden[b, rows] |= ~keeps[layout.row[b, rows]]
    return replace(layout, hidden_key=hidden)


def _last(fresh: Layout, n: int) -> Layout:
    """The last `n` rows of a pass: those that are not stored yet (policies store slots from left to right)."""
    if n == fresh.width:
        return fresh
    at = slice(fresh.width - n, None)
    rows = torch.arange(n, device=fresh.row.device)
    none = torch.empty(0, dtype=torch.int64, device=fresh.row.device)
    return replace(
        fresh,
        row=fresh.row[:, at],
        role=fresh.role[:, at],
        position=fresh.position[:, at],
        visual=fresh.visual[:, at],
        visual_rows=(none,) * fresh.batch,
        other_rows=(rows,) * fresh.batch,
        length=(n,) * fresh.batch,
        tail=(n,) * fresh.batch,
        hidden_key=None if fresh.hidden_key is None else fresh.hidden_key[:, at],
        pristine=False,
    )


def _alike(a: Layout, b: Layout) -> bool:
    """Whether two layouts need the same mask and the same positions of answers."""
    plain = a.hidden_key is None and b.hidden_key is None
    return plain and a.length == b.length and a.width == b.width and a.answer_start == b.answer_start
