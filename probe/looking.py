"""Attention rows of one pass: who wants them, which rows they are, what they reduce to.

Rows are averaged over the queries as their chunks arrive, so a request costs memory for one row per head, whatever
the number of its queries. The same (layer, queries, form) is computed once, whoever asks for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from probe.attend import Reweighting, RowRequest, ask, forget
from probe.backbones.base import Backbone
from probe.compile import BoundProbe, Call
from probe.conditions import Watch
from probe.cost import DecoderDims
from probe.errors import ProbeError
from probe.inputs import asked
from probe.loop import Pass
from probe.scores.raters import raters
from probe.site import Form, QuerySet, Reweight, Role
from probe.surgery import Layout
from probe.timing import Stopwatch
from probe.upload import upload

Attended = tuple[int, QuerySet, Form]
"""Attention of one layer, from one set of query rows, in one form."""


BLOCK = 64
"""Values of a variable that are allocated together on a CPU."""


class Recorder:
    """Recorded values on the device, by variable: `(pass, layer or None) -> (batch, ...)`."""

    def __init__(self) -> None:
        self.values: dict[str, dict[tuple[int, int | None], Tensor]] = {}
        self._blocks: dict[tuple[str, torch.Size, torch.dtype], tuple[Tensor, int]] = {}

    def add(self, name: str, pass_index: int, layer: int | None, value: Tensor) -> None:
        """Keep a value until the sample ends."""
        kept = self._packed(name, value) if value.device.type == "cpu" else value
        self.values.setdefault(name, {})[pass_index, layer] = kept

    def _packed(self, name: str, value: Tensor) -> Tensor:
        """The value in a block of many: the C library's heap would grow by megabytes around each small one that stays
        while large ones come and go beside it.
        """
        key = name, value.shape, value.dtype
        block, used = self._blocks.get(key, (value[None], BLOCK))
        if used == BLOCK:
            block, used = value.new_empty(BLOCK, *value.shape), 0
        self._blocks[key] = block, used + 1
        return block[used].copy_(value)


@dataclass
class _Gathering:
    """Attention rows being averaged as their chunks arrive: `(batch, head, key)` over the query rows."""

    rows: Tensor
    weight: Tensor
    total: Tensor | None = None
    each: list[Tensor] | None = None
    """Of a bounded set of queries, where a score wants them: every row, averaged over the heads."""

    def receive(self, weights: Tensor, first: int) -> None:
        if self.each is not None:
            self.each.append(weights[: self.weight.shape[0]].mean(1))
        share = self.weight[:, first : first + weights.shape[2]].to(weights.device)
        part = (share[:, None, None] @ weights[: share.shape[0]])[:, :, 0]
        self.total = part if self.total is None else self.total + part


class Looking:
    """The attention that the firing probes of one pass want, asked for layer by layer."""

    def __init__(
        self,
        backbone: Backbone,
        dims: DecoderDims,
        recorder: Recorder,
        watch: Stopwatch,
        request: Pass,
        streams: int,
        probes: Sequence[BoundProbe],
        watching: Watch,
    ) -> None:
        self._backbone = backbone
        self._dims = dims
        self._recorder = recorder
        self._watch = watch
        self._request = request
        self._streams = streams
        self._wanted: dict[int, set[Attended]] = {}
        self._records: dict[Attended, list[tuple[str, Call]]] = {}
        self._scored: set[Attended] = set()
        self._under_way: dict[Attended, _Gathering] = {}
        self._received: dict[Attended, tuple[_Gathering, Layout]] = {}
        self._each: set[Attended] = set()
        self._votes: dict[int, list[tuple[Attended, Any]]] = {}
        self._spent = 0
        self._keys_wanted: set[int] = set()
        self._keys: dict[int, tuple[Tensor, Layout]] = {}
        self._reweight: dict[int, list[Reweight]] = {}
        self._rows: dict[QuerySet, tuple[Layout, tuple[Tensor, Tensor] | None]] = {}
        self._rated: dict[bool, list[tuple[Tensor, Tensor]] | None] = {}
        for probe in probes:
            self._note(probe)
        self._watching = watching
        self.queries: Callable[[int, Tensor], None] | None = None
        """Who wants every layer's queries `(layer, (streams * batch, head, row, size))`."""
        for condition, layers in watching.layers.items():
            for layer in layers:
                key: Attended = (layer, cast(QuerySet, condition.source), "softmax")
                self._wanted.setdefault(layer, set()).add(key)

    def _note(self, probe: BoundProbe) -> None:
        clock = self._request.clock
        if probe.layer is None:
            return
        for record in probe.records:
            if "received" in record.signal.entry.needs:
                key = attended(probe.layer, record.signal.params(clock))
                self._wanted.setdefault(probe.layer, set()).add(key)
                self._records.setdefault(key, []).append((record.name, record.signal))
        if probe.edit is None:
            return
        if probe.edit.do.entry.name == "evict":
            options = probe.edit.do.params(clock)
            voted: Attended = (probe.layer, options["queries"], "softmax")
            self._wanted.setdefault(probe.layer, set()).add(voted)
            self._scored.add(voted)
            self._votes.setdefault(probe.layer, []).append((voted, options["keep"]))
            return
        if probe.edit.do.entry.meta.get("changes") == "attention":
            change = probe.edit.do.entry.function(**probe.edit.do.params(clock))
            self._reweight.setdefault(probe.layer, []).append(change)
            return
        for name, params in asked(probe.edit, clock):
            layer = probe.layer + params.get("layer", 0)
            if name in ("keys", "text_keys"):
                self._keys_wanted.add(layer)
            elif name in ("received", "attended", "n_queries") and not params.get("projected"):
                for at in range(layer + 1) if params.get("layers") == "so_far" else [layer]:
                    key = attended(at, params)
                    self._wanted.setdefault(at, set()).add(key)
                    self._scored.add(key)
                    if name == "attended":
                        self._each.add(key)

    def timed(self) -> AbstractContextManager[None]:
        """Time spent inside belongs to the probes."""
        return self._watch.section("probe")

    def ask(self, layer: int, layout: Layout, keys: Layout) -> int:
        """Put this layer's requests for rows of `layout` to its attention module.

        Returns their FLOPs against the columns `keys`, for the whole batch.
        """
        requests, flops = [], 0
        for key in sorted(self._wanted.get(layer, ())):
            found = self._query_rows(key[1], layout)
            if found is None:
                continue
            gathering = _Gathering(*found, each=[] if key in self._each else None)
            self._under_way[key] = gathering
            rows = gathering.rows.repeat(self._streams, 1)
            requests.append(RowRequest(rows, key[2], gathering.receive))
            scored = self._dims.at(layer).scored_rows(rows.shape[1], keys.width, key[2])
            averaged = self._dims.at(layer).averaged_rows(rows.shape[1], keys.width, key[2])
            flops += layout.batch * (self._streams * scored + averaged)
        flops, self._spent = flops + self._spent, 0
        reweighting = self._reweighting(layer, layout, keys)
        again = sum(self._dims.at(layer).reweighted(r.rows.shape[1], keys.width) for r in reweighting)
        flops += layout.batch * self._streams * again
        wants_keys = layer in self._keys_wanted
        if requests or reweighting or wants_keys or self.queries is not None:
            attention = self._backbone.layers[layer].attention
            take = partial(self._take_keys, layer, keys) if wants_keys else None
            queries = None if self.queries is None else partial(self.queries, layer)
            ask(attention, requests, self.timed, keys=take, queries=queries, reweighting=reweighting)
        return flops

    def _take_keys(self, layer: int, layout: Layout, key: Tensor) -> None:
        self._keys[layer] = key[: layout.batch].to(layout.row.device), layout

    def _reweighting(self, layer: int, layout: Layout, keys: Layout) -> list[Reweighting]:
        """What `reweight_attention` does at this layer, both streams under guidance."""
        out = []
        for change in self._reweight.get(layer, ()):
            bias = torch.zeros_like(keys.row, dtype=torch.float32)
            for name in change.target:
                bias = bias.masked_fill(self._is(name, keys), math.log(change.factor))
            found = [self._query_rows(cast(QuerySet, name), layout) for name in change.source]
            parts = [rows for rows in found if rows is not None]
            for rows, _ in parts:
                out.append(Reweighting(rows.repeat(self._streams, 1), bias.repeat(self._streams, 1)))
        return out

    def _is(self, name: str, keys: Layout) -> Tensor:
        """`(batch, key)` bool: columns of a role, or of answer slots that are masked or filled."""
        if name not in ("masked", "filled"):
            return keys.role == int(Role[name.upper()])
        rows = getattr(self._request, name)
        width = max(1, *(len(r) for r in rows))
        padded = upload([[*r, *[-2] * (width - len(r))] for r in rows], keys.row.device)
        return (keys.row[:, :, None] == padded[:, None]).any(-1)

    def reduce(self, layer: int, keys: Layout) -> None:
        """The layer's attention has run: hand what was asked of it to the recorder, keep what scores need."""
        if self.queries is not None:
            forget(self._backbone.layers[layer].attention)
        if layer not in self._wanted and layer not in self._keys_wanted and layer not in self._reweight:
            return
        with self.timed():
            forget(self._backbone.layers[layer].attention)
            n_visual = max(self._request.canvas.n_visual_at_start, default=0)
            for key in sorted(self._wanted.get(layer, ())):
                gathering = self._under_way.pop(key, None)
                if gathering is None or gathering.total is None:
                    continue
                received, hidden = gathering.total.to(keys.row.device), keys.hidden_key
                gathering.total = received
                given = {
                    "received": received,
                    "key_role": keys.role,
                    "key_visual": keys.visual if hidden is None else keys.visual.masked_fill(hidden, -1),
                    "n_visual": n_visual,
                }
                clock = self._request.clock
                for name, signal in self._records.get(key, ()):
                    needed = (given[n] for n in signal.entry.needs)
                    value = signal.entry.function(*needed, **signal.params(clock))
                    self._recorder.add(name, clock.pass_index, layer, value)
                if key in self._scored:
                    self._received[key] = gathering, keys
                for condition in self._watching.wanted(layer):
                    if key[1:] == (condition.source, "softmax"):
                        target = (keys.role == int(Role[condition.target.upper()])).to(received.dtype)
                        self._watching.note_attention(condition, (received.mean(1) * target).sum(1))

    def votes(self, layer: int) -> list[tuple[Attended, Any]]:
        """Attention by which keys are evicted head by head at a layer, where its rows were there, and how many stay."""
        return [(key, keep) for key, keep in self._votes.get(layer, ()) if key in self._received]

    def has(self, key: Attended) -> bool:
        """Whether rows of this kind were there to look."""
        return key in self._received

    def received(self, key: Attended, sample: int, rows: Tensor, probe: str) -> Tensor:
        """`(head, n)`: what one sample's tokens in these rows of the canvas received."""
        gathering, keys = self._gathered(key, probe)
        assert gathering.total is not None
        return gathering.total[sample].index_select(1, keys.locate_in(sample, rows))

    def attended_rows(self, key: Attended, sample: int, rows: Tensor, probe: str) -> Tensor:
        """`(query, n)`: the same of every query row by itself, averaged over the heads."""
        gathering, keys = self._gathered(key, probe)
        each = torch.cat(gathering.each or [], 1)[sample].to(keys.row.device)
        each = each[gathering.weight[sample] > 0]
        return each.index_select(1, keys.locate_in(sample, rows))

    def n_queries(self, key: Attended, sample: int) -> Tensor:
        """How many rows looked, `()`."""
        return (self._received[key][0].weight[sample] > 0).sum()

    def absent(self, queries: QuerySet, layout: Layout) -> bool:
        """Whether none of these rows are in this layout."""
        return self._query_rows(queries, layout) is None

    def query_rows(self, queries: QuerySet, layout: Layout, sample: int) -> tuple[Tensor, Tensor]:
        """`(query,)` rows of one sample in this layout, and their weights."""
        found = self._query_rows(queries, layout)
        if found is None:
            raise ProbeError(f"step {self._request.clock.step}: there are no `{queries}` rows to look")
        return found[0][sample], found[1][sample]

    def keys(self, layer: int, sample: int, rows: Tensor, probe: str) -> Tensor:
        """`(kv head, n, size)`: keys of one sample's rows of the canvas, as a layer attended to them."""
        if layer not in self._keys:
            raise ProbeError(
                f"probe `{probe}` at step {self._request.clock.step}: the keys of layer {layer} are not known"
            )
        key, layout = self._keys[layer]
        return key[sample].index_select(1, layout.locate_in(sample, rows))

    def _gathered(self, key: Attended, probe: str) -> tuple[_Gathering, Layout]:
        if key not in self._received:
            step = self._request.clock.step
            raise ProbeError(f"probe `{probe}` at step {step}: there are no `{key[1]}` rows to score with")
        return self._received[key]

    def release(self) -> None:
        """Forget what an interrupted forward left on the attention modules."""
        everywhere = range(len(self._backbone.layers)) if self.queries is not None else ()
        for layer in {*self._wanted, *self._keys_wanted, *self._reweight, *everywhere}:
            forget(self._backbone.layers[layer].attention)

    def _query_rows(self, queries: QuerySet, layout: Layout) -> tuple[Tensor, Tensor] | None:
        """`(rows (batch, q), weight (batch, q))` in this layout; weights sum to 1. None if a set is empty."""
        known = self._rows.get(queries)
        if known is None or known[0] is not layout:
            self._rows[queries] = known = (layout, self._find_rows(queries, layout))
        return known[1]

    def _find_rows(self, queries: QuerySet, layout: Layout) -> tuple[Tensor, Tensor] | None:
        device = layout.row.device
        behind = len(self._request.window[0]) if self._request.shadow else 0  # the shadow's rows are no rows of it
        if queries == "visual":
            per_sample = list(layout.visual_rows)
        elif queries == "all":
            per_sample = [torch.arange(n - behind, device=device) for n in layout.length]
        elif queries in ("raters", "raters_answer"):
            return self._raters(layout, with_answer=queries == "raters_answer")
        elif queries == "last":
            per_sample = [upload([n - behind - 1], device) for n in layout.length]
        else:
            start = [_start_rows(queries, self._request, b, self._backbone.shift) for b in range(layout.batch)]
            if any(not rows for rows in start):
                return None
            width = max(len(rows) for rows in start)
            padded = upload([rows + rows[-1:] * (width - len(rows)) for rows in start], device)
            located = layout.locate(padded)
            per_sample = [located[b, : len(rows)] for b, rows in enumerate(start)]
        if any(rows.shape[0] == 0 for rows in per_sample):
            return None
        rows = torch.nn.utils.rnn.pad_sequence(per_sample, batch_first=True)
        weight = torch.nn.utils.rnn.pad_sequence(
            [torch.full((r.shape[0],), 1 / r.shape[0], device=device) for r in per_sample], batch_first=True
        )
        return rows, weight

    def _raters(self, layout: Layout, *, with_answer: bool) -> tuple[Tensor, Tensor] | None:
        """Rows of the text behind the picture, weighted so that only raters count (all where none stands out)."""
        if with_answer not in self._rated:  # the canvas is one throughout a pass
            self._rated[with_answer] = self._rate(with_answer=with_answer)
        rated = self._rated[with_answer]
        if rated is None:
            return None
        pad = torch.nn.utils.rnn.pad_sequence
        rows = [layout.locate_in(b, uids) for b, (uids, _) in enumerate(rated)]
        return pad(rows, batch_first=True), pad([weight for _, weight in rated], batch_first=True)

    def _rate(self, *, with_answer: bool) -> list[tuple[Tensor, Tensor]] | None:
        """Of every sample the rows that may be raters, by their number on the canvas, and their weights."""
        request = self._request
        if request.work.prompt != "all":
            return None
        canvas, out = request.canvas, []
        for b in range(canvas.layout.batch):
            text = canvas.rows_of(Role.QUESTION, b) + (request.computed[b] if with_answer else [])
            if not text or not canvas.layout.n_visual[b]:
                return None
            uids = upload(text, canvas.layout.row.device, torch.int64)
            embeds = canvas.embeds[b]
            seen = embeds.index_select(0, canvas.layout.visual_rows[b])
            self._spent += 2 * seen.shape[0] * len(text) * embeds.shape[1]
            chosen = raters(seen, embeds.index_select(0, canvas.layout.locate_in(b, uids)))
            chosen = chosen | ~chosen.any()
            out.append((uids, chosen.float() / chosen.sum()))
        return out


def attended(layer: int, params: dict[str, Any]) -> Attended:
    """The attention that a score or signal with these parameters reads."""
    return layer, params["queries"], params["form"]


def _start_rows(queries: QuerySet, request: Pass, b: int, shift: int) -> list[int]:
    """Rows of the canvas, by number, of a query set that the host knows; only those that the pass computes."""
    canvas, prompt = request.canvas, request.work.prompt
    last_prompt = canvas.prompt_length[b] - 1
    match queries:
        case "masked":
            return request.masked[b]
        case "filled":
            return request.filled[b]
        case "answer":
            return request.computed[b]
        case "predicting":
            return request.predicting[b] if shift else request.masked[b]
        case "last_prompt":
            return [last_prompt] if prompt != "none" else []
        case "question":
            return canvas.rows_of(Role.QUESTION, b) if prompt == "all" else []
        case "system":
            return canvas.rows_of(Role.SYSTEM, b) if prompt == "all" else []
        case _:
            raise ProbeError(f"`{queries}` is no set of rows")
