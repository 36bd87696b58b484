"""The state of one forward pass: the sequence as it shrinks, and the edits that shrink it.

Hooks (in `tracer`) call in here; everything that depends on the order of layers within a pass lives in this file.

Two layouts describe a layer: `layout`, the rows that the pass computes, and `keys`, the columns they attend to. In a
pass that computes every row they are one. In a cached pass visual tokens are mostly columns: an edit then cuts columns,
for this pass (`lasts: forward`) or out of the store (`lasts: generation`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from probe.backbones.base import Backbone
from probe.backbones.rows import Rows
from probe.canvas import Canvas
from probe.compile import BoundProbe, Edit, ProbeTable
from probe.conditions import Watch
from probe.cost import DecoderDims
from probe.decide import decide
from probe.decoding.policy import Delta
from probe.delta_cache import DeltaStore
from probe.errors import ProbeError
from probe.eviction import kept_places
from probe.finite import NONFINITE
from probe.inputs import asked, reads_prompt
from probe.ledger import Ledger
from probe.looking import Attended, Looking, Recorder, attended
from probe.loop import Pass
from probe.parallel import whole
from probe.pass_source import SampleSource
from probe.selections.counts import how_many
from probe.shadow import aligned, blind, with_shadow
from probe.site import Fate, Phase, Plan, Site
from probe.store import KeyStore, cut_columns
from probe.surgery import Layout, Positions, hide, narrow, put_values, replan, restore, select, take, take_columns
from probe.timing import Stopwatch


@dataclass(frozen=True)
class Kit:
    """What every pass of one batch works with."""

    backbone: Backbone
    table: ProbeTable
    dims: DecoderDims
    ledger: Ledger
    recorder: Recorder
    watch: Stopwatch
    seeds: tuple[int, ...]
    store: KeyStore
    deltas: DeltaStore
    watching: Watch
    evicted: dict[int, Tensor] = field(default_factory=dict)
    """By layer: `(batch, head, row)` bool over canvas numbers, the keys that each head still sees (`evict`)."""


class PassState:
    """What hooks read and change during one forward. `layout` is the sequence at the layer that runs now."""

    def __init__(self, kit: Kit, request: Pass, probes: Sequence[BoundProbe]) -> None:
        self.kit = kit
        self.clock = request.clock
        self.request = request
        self.batch = request.canvas.layout.batch
        self.streams = 2 if request.guided else 1
        self.canvas = request.canvas
        self.canvas_after = request.canvas
        self.layout: Layout = request.canvas.layout
        self.keys: Layout = self.layout
        self.cached = request.work.cached and not request.work.refresh and not kit.store.empty
        self.flops: dict[str, int] = {"backbone": 0, "probe": 0}
        self._changed = False
        self.rope: tuple[Tensor, Tensor] | None = None
        self._rope_start: tuple[int, ...] = ()
        self._between: Tensor | None = None
        self._mlp_out: Tensor | None = None
        self._long_width = 0
        self._cuts: list[tuple[Sequence[Plan | None], Layout]] = []
        self._key_index: dict[int, list[Tensor]] = {}
        self._late_cuts: list[tuple[int, Sequence[Plan | None], Layout]] = []
        self._passing: tuple[int, int] | None = None
        """From which layer and row number on tokens were appended for this pass alone."""
        self._shrunk = False
        self.entered: tuple[Tensor, Layout] | None = None
        """Hidden states as they entered the layer that runs now, and their layout."""
        self._carried: _Carried | None = None
        self._around: _Around | None = None
        self._skip_mlp: Sequence[Plan | None] | None = None
        self._layer_cuts: dict[int, list[tuple[Sequence[Plan | None], Layout]]] = {}
        self._made: list[Tensor | None] = [None] * self.batch
        self._masks: tuple[Tensor | None, ...] = ()
        self._ids: Tensor | None = None
        self._masked: Layout | None = None
        self._masked_rows: Layout | None = None
        self.looking = Looking(
            kit.backbone, kit.dims, kit.recorder, kit.watch, request, self.streams, probes, kit.watching
        )
        if request.work.evict is not None:
            self.looking.queries = self._take_queries
        self._queries: Tensor | None = None
        self._first_made = request.canvas.layout.length_at_start
        self.on_cache: str | None = None
        """How stored features are brought up to date with what was removed for good in this pass: `refresh` (the next
        pass computes everything) or `columns` (theirs are cut, and that is all); None: nothing stored was outdated."""
        self.rows: tuple[int, ...] = ()
        """Rows that the first layer computes of each sample."""
        self.chosen: Tensor | None = None
        """`(batch, slots)` bool: answer rows that the first layer computes, where layers choose them."""
        self._ordinal = {p.name: i for i, p in enumerate(kit.table.probes)}

    def _home(self, x: Tensor) -> Tensor:
        """A tensor where the sequence is looked after: layers may be on other devices."""
        return x.to(self.canvas.embeds.device)

    def _tables_home(self, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        cos, sin = tables
        return self._home(cos), self._home(sin)

    def timed(self) -> AbstractContextManager[None]:
        """Time spent inside belongs to the probes."""
        return self.kit.watch.section("probe")

    # -- the model's inputs -------------------------------------------------------------------------------------

    def model_inputs(self) -> dict[str, Any]:
        """Arguments of the language model for this pass, both streams under guidance."""
        work, backbone, store = self.request.work, self.kit.backbone, self.kit.store
        embeds = self.canvas.embeds
        if self.streams == 2:
            mask_embed = backbone.embed(torch.tensor(backbone.special.mask, device=embeds.device))
            embeds = torch.cat([embeds, self.canvas.unconditional(mask_embed)])
        self.layout = self.canvas.layout
        tail = self.request.tail
        if tail is not None:
            self.layout, index = select(self.layout, work.prompt, tail)
            embeds = take(embeds, index, self.streams)
        if self.request.shadow:
            self.layout, embeds = self._with_shadow(embeds)
        if work.cached:
            if work.refresh:
                store.clear()
            places = range(self.canvas.layout.tail[0]) if tail is None else sorted(set(tail.flatten().tolist()))
            store.begin(places, prompt=work.prompt == "all", rows=self.layout.width)
        self.keys = store.columns(0, self.layout) if self.cached else self.layout
        self._rope_start = self._start()
        self._masks = self._who_sees_whom()
        return {
            "inputs_embeds": self._conditioned(embeds),
            "position_ids": self._row_ids(),
            "attention_mask": self._masks[0] if len(self._masks) == 1 else self._masks,
            "past_key_values": _Columns(self) if work.cached else None,
            "use_cache": False,
        }

    def _with_shadow(self, embeds: Tensor) -> tuple[Layout, Tensor]:
        """The block's slots once more behind the sequence, as masks, both streams under guidance."""
        window = self.request.window
        mask_embed = self.kit.backbone.embed(torch.tensor(self.kit.backbone.special.mask, device=embeds.device))
        more = mask_embed.to(embeds.dtype).expand(embeds.shape[0], len(window[0]), -1)
        layout = with_shadow(self.layout, window)
        self._first_made = layout.length_at_start
        return layout, torch.cat([embeds, more], 1)

    def _conditioned(self, embeds: Tensor) -> Tensor:
        """Slots that show noise, as the model wants to see them; never written back to the canvas."""
        if not self.request.conditioned:
            return embeds
        places, previous = self.layout.locate(self.request.rows), self.request.previous_logits
        if self.streams == 2:  # both streams show the same, and were told the same
            places = places.repeat(2, 1)
            previous = None if previous is None else previous.repeat(2, 1, 1)
        rows = places[..., None].expand(-1, -1, embeds.shape[-1])
        seen = self.kit.backbone.condition(embeds.gather(1, rows), previous)
        self.flops["backbone"] += self.kit.dims.condition(places.numel(), told=previous is not None)
        return embeds.scatter(1, rows, seen.to(embeds.dtype))

    def _rows(self, layout: Layout, position: Tensor, place: Tensor | None) -> Rows:
        """Rows as the backbone is told of them; pictures and open rows only for one that looks at them."""
        picture, opened = layout.visual, layout.role
        if self.kit.backbone.reads_rows:
            picture = torch.full_like(layout.visual, -1)
            for b, pictures in enumerate(self.canvas.pictures):
                if pictures.shape[0]:
                    own = pictures.to(picture.device).long()[layout.visual[b].clamp(min=0)]
                    picture[b] = torch.where(layout.visual[b] >= 0, own, -1)
            edges = [(rows[0], rows[-1] + 1) if rows else (0, 0) for rows in self.request.window]
            edge = torch.tensor(edges or [(0, 0)] * self.batch, device=layout.row.device)
            opened = (layout.row >= edge[:, :1]) & (layout.row < edge[:, 1:])
        return Rows(position, picture, opened, layout.key_mask(), _places(layout) if place is None else place)

    def _query_rows(self) -> Rows:
        """The rows that this pass computes, as the backbone is told of them."""
        place = None
        if self.keys is not self.layout:
            place = self.keys.locate(self.layout.row.clamp(min=0))
        return self._rows(self.layout, self._positions(), place)

    def _ids_now(self) -> Tensor:
        return self._row_ids() if self.kit.backbone.reads_rows else self.layout.position

    def _row_ids(self) -> Tensor:
        """The layers' `position_ids`, both streams under guidance."""
        ids = self.kit.backbone.row_ids(self._query_rows())
        return ids if self.streams == 1 else torch.cat([ids] * self.streams, self.kit.backbone.ids_batch_axis)

    def _who_sees_whom(self) -> tuple[Tensor | None, ...]:
        """The masks of the sequence as it is now, one per kind of layer, both streams under guidance."""
        query = self._query_rows()
        keys = query if self.keys is self.layout else self._rows(self.keys, self.keys.position, None)
        masks = self.kit.backbone.sees(query, keys)
        if self.keys.size is not None:  # proportional attention: a merged token counts for what stands behind it
            bias = self.keys.size.log()[:, None, None, :].to(self.canvas.embeds.dtype)
            lowest = torch.finfo(bias.dtype).min / 2
            masks = tuple(bias if m is None else bias.masked_fill(~m, lowest) for m in masks)
        if self.request.shadow:
            masks = blind(masks, self.layout, self.request.window)
        return masks if self.streams == 1 else tuple(None if m is None else torch.cat([m] * 2) for m in masks)

    @property
    def uneven(self) -> bool:
        """Whether stored layers differ so that hooks must carry their masks and positions, probes or none."""
        return (self.cached and (bool(self._cuts) or self.kit.store.uneven)) or bool(self.kit.evicted)

    def _start(self) -> tuple[int, ...]:
        """Where answer slots begin for the layer that runs now: where its stored keys say so."""
        return self.keys.answer_start if self.cached else self.layout.answer_start

    def _positions(self) -> Tensor:
        """`(batch, row[, axes])` rotary positions of the computed rows at the layer that runs now."""
        position = self.layout.position
        moved = [a - b for a, b in zip(self._start(), self.layout.answer_start, strict=True)]
        if any(moved):
            by = torch.tensor(moved, device=position.device)
            position = position + by.reshape(-1, *[1] * (position.dim() - 1))
        return position

    def store_columns(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's attention hands over fresh keys and values: what it attends to."""
        key, value = self.kit.store.write(layer, self.layout, key, value, self.streams)
        for index in self._key_index.get(layer, ()):
            key, value = take_columns(key, index, self.streams), take_columns(value, index, self.streams)
        return key, value

    def count_all_layers(self) -> None:
        """FLOPs of a pass that no hook watches."""
        for layer in range(self.kit.dims.layers):
            self._count(layer, self.layout.width, self.keys.width, self.layout.width)

    def _count(self, layer: int, rows: int, keys: int, mlp_rows: int) -> None:
        dims = self.kit.dims.at(layer)
        cost = dims.attention(rows, keys) + dims.mlp_block(mlp_rows)
        self.flops["backbone"] += self.streams * self.batch * cost

    def leave_attention(self, layer: int) -> None:
        """A layer's attention has run."""
        self.looking.reduce(layer, self.keys)
        for queries, keep in self.looking.votes(layer):
            self._lose_by_head(layer, queries, keep)
        if self.request.work.evict is not None:
            self._evict(layer)

    def _lose_by_head(self, layer: int, key: Attended, keep: Any) -> None:
        """Every head that shares keys keeps the visual keys that its rows attend to most, in all later passes."""
        heads = self.kit.dims.at(layer).heads
        group = heads // self.kit.dims.at(layer).kv_heads
        width = self.canvas.layout.length_at_start
        seen = torch.ones(self.batch, heads, width + 1, dtype=torch.bool, device=self.keys.row.device)
        for b in range(self.batch):
            rows = self.keys.row[b].index_select(0, self.keys.visual_rows[b])
            rows = rows[rows < width] if self.keys.length_at_start > width else rows
            if rows.shape[0] == 0:
                continue
            votes = self.looking.received(key, b, rows, "evict")
            votes = votes.reshape(-1, group, votes.shape[1]).mean(1)
            count = how_many(keep, rows.shape[0], original=self.canvas.originals[b])
            gone = votes.nan_to_num(nan=-torch.inf).sort(dim=1, descending=True, stable=True).indices[:, count:]
            for g in range(votes.shape[0]):
                seen[b, g * group : (g + 1) * group, rows[gone[g]]] = False
        self.kit.evicted[layer] = seen

    def _take_queries(self, layer: int, query: Tensor) -> None:
        self._queries = self._home(query)

    def _evict(self, layer: int) -> None:
        """The cache policy looks at what the block attended to, and some columns leave this layer's store."""
        store, choose = self.kit.store, self.request.work.evict
        held = store.layers[layer]
        assert held is not None and choose is not None and self._queries is not None
        key = whole(self.kit.backbone.layers[layer].attention, held.key)
        block = [list(rows) for rows in self.request.window]
        if self.kit.backbone.shift:
            block = [[edge, *rows] for edge, rows in zip(self.request.edge, block, strict=True)]
        places, judged = kept_places(held.layout, self._queries, self._home(key), block, choose)
        store.keep(layer, places, self.streams)
        self._queries = None
        self.flops["backbone"] += self.kit.dims.at(layer).scored_rows(1, judged, "softmax")

    # -- layers that compute some of their rows (`delta_cache`) ----------------------------------------------------

    def note_rows(self, layer: int, rows: Tensor | None, delta: Delta | None) -> None:
        """A layer computes `rows (streams * batch, n)` (None: none); all of them where there is no `delta`."""
        if delta is not None:
            self._rows_at = self._mlp_rows = 0 if rows is None else rows.shape[1]
        if layer == 0:
            n_prompt = [n - t for n, t in zip(self.layout.length, self.layout.tail, strict=True)]
            t = self.layout.tail[0]
            if delta is None:
                self.rows = self.layout.length
                return
            k = t if delta.answer else int(t * delta.ratio)
            self.rows = tuple((n if delta.prompt else 0) + k for n in n_prompt)
            if not delta.answer:
                start = torch.tensor(n_prompt, device=self.layout.row.device)[:, None]
                places = start + torch.arange(t - self.canvas.suffix_length, device=start.device)
                own = self._home(rows[: self.batch]) if rows is not None else start[:, :0]
                self.chosen = (places[:, :, None] == own[:, None]).any(-1)

    def note_values(self, layer: int, rows: int) -> None:
        """A layer projected values of that many rows to see which have turned."""
        dims = self.kit.dims.at(layer)
        self.flops["backbone"] += self.streams * self.batch * 2 * rows * dims.width * dims.kv_heads * dims.head_size

    def note_queries(self, layer: int, rows: int) -> None:
        """A layer projected queries of that many rows for probes alone."""
        dims = self.kit.dims.at(layer)
        self.flops["probe"] += self.streams * self.batch * 2 * rows * dims.width * dims.heads * dims.head_size

    def finish(self) -> None:
        """The pass is over: what was removed for good leaves the layers of the store that had already run."""
        store = self.kit.store
        for first_layer, plans, said_of in self._late_cuts:
            for layer in range(first_layer):
                store.cut(layer, plans, said_of, self.streams)
        if self._passing is not None:
            first_layer, first_row = self._passing
            for layer in range(first_layer, self.kit.dims.layers):
                store.forget_appended(layer, first_row, self.streams)
        if self._shrunk and store.layers[0] is not None:
            held = store.layers[0].layout
            store.place_answers([n - t for n, t in zip(held.length, held.tail, strict=True)])

    # -- edits --------------------------------------------------------------------------------------------------

    def enter_layer(
        self, layer: int, hidden: Tensor, kwargs: dict[str, Any], probes: Sequence[BoundProbe]
    ) -> tuple[Tensor, dict[str, Any]]:
        """A layer begins: its `layer.input` probes act, give it the tables of the sequence as it is now."""
        if self.rope is None:
            self.rope = self._tables_home(kwargs["position_embeddings"])
        if self.cached:
            self._enter_columns(layer)
        else:
            hidden = self._to_stored(layer, hidden)
        self.entered = hidden, self.layout
        for probe in probes:
            hidden = self._act(probe, layer, hidden, first_layer=layer)
        if self._changed or self.cached or self.kit.evicted:
            kwargs = {
                **kwargs,
                "position_embeddings": self.rope,
                "attention_mask": self.mask_of(layer),
            }
        if self._changed and "position_ids" in kwargs:
            kwargs["position_ids"] = self._ids
        self.flops["probe"] += self.looking.ask(layer, self.layout, self.keys)
        self._rows_at = self._mlp_rows = hidden.shape[1]
        self._keys_at = self.keys.width
        return hidden, kwargs

    def _enter_columns(self, layer: int) -> None:
        """A layer of a cached pass begins: its own columns, without what was cut earlier in this pass."""
        self.keys, self._key_index[layer] = self._columns_at(layer)
        if self._start() != self._rope_start:
            self._rope_start = self._start()
            position = torch.cat([self._positions()] * self.streams)
            cos, _ = cast(tuple[Tensor, Tensor], self.rope)
            self.rope = self._tables_home(self.kit.backbone.rotary(cos, position))

    def _columns_at(self, layer: int) -> tuple[Layout, list[Tensor]]:
        """A layer's columns without what this pass cuts, and the gathers that take stored keys there."""
        keys = self.kit.store.columns(layer, self.layout)
        indices = []
        for plans, said_of in [*self._cuts, *self._layer_cuts.get(layer, ())]:
            keys, index = cut_columns(keys, plans, said_of)
            if index is not None:
                indices.append(index)
        return keys, indices

    def _chosen_from(self, layer: int, first_layer: int) -> Layout:
        """The tokens that an edit after `layer` decides about: in a cached pass those that the next layer stores."""
        if not self.cached:
            return self.layout
        if layer < first_layer < self.kit.dims.layers:
            following = self._columns_at(first_layer)[0]
            return self.keys if following.evicted else following
        return self.keys

    def _stored_plans(self, layer: int) -> list[Plan | None] | None:
        """Where a layer adds what it stored: the tokens that are alive but not stored there leave before it."""
        delta, held = self.request.work.delta, None
        if delta is not None and not delta.whole and layer < self.kit.dims.layers:
            held = self.kit.deltas.layers[layer]
        if held is None or held.layout is self.layout or held.layout.n_visual == self.layout.n_visual:
            return None
        plans: list[Plan | None] = []
        for b, rows in enumerate(self.layout.visual_rows):
            there = torch.isin(self.layout.row[b, rows], held.layout.row[b])
            kept = there.nonzero()[:, 0]
            plans.append(None if kept.shape[0] == rows.shape[0] else Plan(kept))
        return None if all(p is None for p in plans) else plans

    def _to_stored(self, layer: int, hidden: Tensor) -> Tensor:
        """The sequence as a layer has stored it (`delta_cache`)."""
        plans = self._stored_plans(layer)
        return hidden if plans is None else self._narrowed(hidden, plans, "keep")

    def cut_between(self, layer: int, hidden: Tensor, probes: Sequence[BoundProbe]) -> Tensor:
        """Between attention and MLP: the shortened residual stream, kept for `leave_layer`."""
        self._long_width = hidden.shape[1]
        short = hidden
        if self._skip_mlp is not None:
            plans, self._skip_mlp = self._skip_mlp, None
            self._carry(self.entered[0] if self.entered is not None else hidden, plans)
            short = take(short, cast(_Carried, self._carried).index, self.streams)
        for probe in probes:
            short = self._act(probe, layer, short, first_layer=layer + 1)
        short = short.to(hidden.device)  # the layer's own, where a model is spread over several
        self._between = short if short.shape[1] != self._long_width or short is not hidden else None
        self._mlp_rows = short.shape[1]
        return short

    def swallow_mlp(self, output: Tensor) -> Tensor:
        """The MLP ran on the short sequence: keep its output, report zeros of the length that the layer expects."""
        if self._between is None:
            return output
        self._mlp_out = output
        return output.new_zeros(()).expand(output.shape[0], self._long_width, output.shape[2])

    def leave_layer(self, layer: int, hidden: Tensor, probes: Sequence[BoundProbe]) -> Tensor:
        """A layer ends: its output on the sequence as it is now, after its `layer.output` probes."""
        if self._between is not None and self._mlp_out is not None:
            join = self.kit.backbone.layers[layer].join
            hidden = join(self._between, self._mlp_out, self._ids_now().to(self._between.device))
            self._between = self._mlp_out = None
        self._count(layer, self._rows_at, self._keys_at, self._mlp_rows)
        if self._carried is not None:
            hidden = self._bring_back(hidden)
        for probe in probes:
            hidden = self._act(probe, layer, hidden, first_layer=layer + 1)
        return hidden

    def _act(self, probe: BoundProbe, layer: int, hidden: Tensor, *, first_layer: int) -> Tensor:
        """A probe on the residual stream: record it as it is, or cut it. What it sees comes home for that."""
        hidden = self._home(hidden)
        if probe.edit is None:
            self._record(probe, layer, hidden)
            return hidden
        if probe.edit.do.entry.meta.get("changes") == "attention":
            return hidden  # the layer's attention is told of it (`Looking`)
        return self._cut(probe, layer, hidden, first_layer=first_layer)

    def _record(self, probe: BoundProbe, layer: int | None, hidden: Tensor) -> None:
        given = {
            "hidden": hidden[: self.batch],
            "row_role": self.layout.role,
            "row_visual": self.layout.visual,
            "n_visual": max(self.canvas.n_visual_at_start, default=0),
        }
        for record in probe.records:
            needed = (given[n] for n in record.signal.entry.needs)
            value = record.signal.entry.function(*needed, **record.signal.params(self.clock))
            self.kit.recorder.add(record.name, self.clock.pass_index, layer, value)

    def at_canvas(self, probe: BoundProbe) -> None:
        """A probe before layer 0. An edit there acts on the canvas itself, for good or for this pass."""
        if probe.edit is None:
            self._record(probe, None, self.canvas.embeds)
            return
        if (stored := self._stored_plans(0)) is not None:
            self.canvas = self.canvas.narrowed(stored, positions="keep")
            self.layout = self.keys = self.canvas.layout
        held = self.kit.store.layers[0] if self.cached else None
        before = self.canvas.layout if held is None else held.layout
        if before.n_visual == self.canvas.layout.n_visual and not before.evicted:
            before = self.canvas.layout
        plans, options = self._decide(probe, None, self.canvas.embeds, before)
        if plans is None:
            return
        lasting = options["lasts"] == "generation"
        self.kit.ledger.note(before, plans, 0, lasting=lasting)
        said: Sequence[Plan | None] = plans
        if before is not self.canvas.layout:  # what is not stored now could not be chosen
            now = self.canvas.layout
            said = [None if p is None else self._on_canvas(p, before, now, b, True) for b, p in enumerate(plans)]
        self.canvas = _edited(self.canvas, said, options)
        self.layout = self.keys = self.canvas.layout
        if lasting:
            self.canvas_after = self.canvas
            if self.request.work.partial:
                self._outdated(options)
        if self.cached:  # the rows are columns in the store by now
            if lasting:
                self._cut_store(0, plans, before, options)
            else:
                self._cuts.append((plans, before))

    def at_store(self, probe: BoundProbe) -> None:
        """An edit of what is stored, before a pass that reads it: columns leave every layer."""
        store = self.kit.store
        held = store.layers[probe.layer or 0]
        if not self.cached or held is None or probe.edit is None:
            return
        alive = held.layout
        plans, options = self._decide(probe, probe.layer, self.canvas.embeds, alive)
        if plans is None:
            return
        lasting = options["lasts"] == "generation"
        self.kit.ledger.note(alive, plans, 0, lasting=lasting)
        if not lasting:
            self._cuts.append((plans, alive))
            return
        self._edit_canvas_after(plans, options, alive)
        self._cut_store(0, plans, alive, options)
        self.finish()
        self._shrunk, self._late_cuts = False, []

    def at_final(self, probe: BoundProbe, hidden: Tensor) -> None:
        """A probe on final-normed states. An edit decided there takes effect with the next step."""
        if probe.edit is None:
            self._record(probe, None, hidden)
            return
        seen = self.keys if self.cached else self.layout
        plans, options = self._decide(probe, None, hidden, seen)
        if plans is not None:
            self._edit_canvas_after(plans, options, seen)
            self._outdated(options)
            self.kit.ledger.note(seen, plans, self.kit.dims.layers, lasting=True)
            self._late_cuts.append((self.kit.dims.layers, plans, seen))

    def _edit_canvas_after(self, plans: Sequence[Plan | None], options: dict[str, Any], said_of: Layout) -> None:
        """What is removed or merged for good inside a pass, said of the canvas that the next pass begins with."""
        target = self.canvas_after.layout
        stays = options.get("recycled", "generation") == "generation"
        said = [None if p is None else self._on_canvas(p, said_of, target, b, stays) for b, p in enumerate(plans)]
        self.canvas_after = _edited(self.canvas_after, said, options)
        self._shrunk |= options.get("answer_positions") == "shrunk"

    def _outdated(self, options: dict[str, Any]) -> None:
        """Stored features saw what is removed for good now; say how they shall be brought up to date."""
        work = self.request.work
        if (work.cached or work.delta is not None) and self.on_cache != "refresh":
            self.on_cache = str(options.get("on_cache", "columns"))

    def _on_canvas(self, plan: Plan, said_of: Layout, target: Layout, b: int, appended_stay: bool) -> Plan:
        """A plan over hidden states, said over the embeddings of the canvas: merged tokens are means of embeddings."""
        said = replan(plan, said_of, target, b)
        if plan.values is None or plan.into is None:
            return said
        means = self._means(plan, said_of, b)
        k = plan.kept.shape[0]
        rows = said_of.row[b, said_of.visual_rows[b]][plan.kept]
        on_canvas = rows < target.length_at_start
        kept, extra = means[:k][on_canvas], means[k:] if appended_stay else means[:0]
        size = None
        if plan.size is not None:
            size = torch.cat([plan.size[:k][on_canvas], plan.size[k:] if appended_stay else plan.size[:0]])
        return Plan(said.kept, plan.fate, None, torch.cat([kept, extra]), size, extra.shape[0])

    def _means(self, plan: Plan, said_of: Layout, b: int) -> Tensor:
        """`(k + m, width)`: the mean embedding of what stands behind each kept or appended token."""
        assert plan.into is not None and plan.values is not None
        embeds = self.embeddings(b, said_of.row[b, said_of.visual_rows[b]]).float()
        count = plan.values.shape[0]
        into = plan.into.where(plan.into >= 0, count)
        total = embeds.new_zeros(count + 1, embeds.shape[1]).index_add_(0, into, embeds)[:count]
        number = embeds.new_zeros(count + 1).index_add_(0, into, torch.ones_like(into, dtype=embeds.dtype))[:count]
        return (total / number.clamp(min=1)[:, None]).to(self.canvas.embeds.dtype)

    def _remember(self, before: Layout, plans: Sequence[Plan | None]) -> None:
        """Embeddings that stand for tokens which are appended now, by their number behind the canvas."""
        most = max((p.appended for p in plans if p is not None), default=0)
        if not most:
            return
        if self.request.work.delta is not None:
            raise ProbeError(
                "new tokens that an intervention appends inside a layer have no row in later passes, which "
                "`dllm_cache` needs; use another cache, or recycle none"
            )
        for b, plan in enumerate(plans):
            new = self.canvas.embeds.new_zeros(most, self.canvas.embeds.shape[-1])
            if plan is not None and plan.appended:
                new[: plan.appended] = self._means(plan, before, b)[plan.kept.shape[0] :]
            held = self._made[b]
            self._made[b] = new if held is None else torch.cat([held, new])

    def mask_of(self, layer: int) -> Tensor | None:
        """The mask of a layer for the sequence as it is now."""
        if self._masked is not self.keys or self._masked_rows is not self.layout:
            self._masked, self._masked_rows = self.keys, self.layout
            self._masks, self._ids = self._who_sees_whom(), self._row_ids()
        mask = self._masks[self.kit.backbone.layers[layer].kind]
        seen = self.kit.evicted.get(layer)
        return mask if seen is None else self._per_head(mask, seen)

    def _per_head(self, mask: Tensor | None, seen: Tensor) -> Tensor:
        """A layer's mask where heads differ in what they still see: `(streams * batch, head, 1 or row, key)`."""
        spare = seen.shape[2] - 1  # rows that came later are seen by all
        row = self.keys.row.where((self.keys.row >= 0) & (self.keys.row < spare), spare)
        own = seen.gather(2, row[:, None].expand(-1, seen.shape[1], -1))[:, :, None]
        own = torch.cat([own] * self.streams)
        if mask is None:
            return own
        if mask.dtype == torch.bool:
            return mask & own
        return mask.masked_fill(~own, torch.finfo(mask.dtype).min / 2)

    def _cut(self, probe: BoundProbe, layer: int, hidden: Tensor, *, first_layer: int) -> Tensor:
        if first_layer > layer:
            hidden = self._to_stored(first_layer, hidden)
        before = self._chosen_from(layer, first_layer)
        plans, options = self._decide(probe, layer, hidden, before)
        if plans is None:
            return hidden
        if _fate(plans) is Fate.SKIPPED:
            return self._skip(layer, hidden, plans, as_keys=bool(options["as_keys"]))
        lasting = options["lasts"] == "generation"
        self.kit.ledger.note(before, plans, first_layer, lasting=lasting)
        self._remember(before, plans)
        if lasting:
            self._edit_canvas_after(plans, options, before)
            self._outdated(options)
        if self.cached:
            if lasting:
                self._cut_store(first_layer, plans, before, options)
            else:
                self._cuts.append((plans, before))
            if first_layer == layer:
                self._enter_columns(layer)
            return hidden
        if lasting and self.request.work.cached:
            self._late_cuts.append((first_layer, plans, before))
            if options.get("recycled") == "forward" and self._passing is None:
                self._passing = first_layer, before.length_at_start
                self.kit.ledger.forget_appended(first_layer)
        self._changed = True
        if _fate(plans) is Fate.MASKED:
            self.layout = self.keys = hide(self.layout, plans)
            return hidden
        return self._narrowed(hidden, plans, options["positions"])

    def _narrowed(self, hidden: Tensor, plans: Sequence[Plan | None], positions: Positions) -> Tensor:
        """The sequence after the plans: hidden states, layout and rotary tables."""
        self._changed = True
        self.layout, index = narrow(self.layout, plans, positions=positions)
        if self.request.shadow and positions == "compact":
            self.layout = aligned(self.layout, self.request.window)
        self.keys = self.layout
        hidden = put_values(take(hidden, index, self.streams), self.layout, plans)
        if positions == "compact":
            self.rope = self._tables_home(
                self.kit.backbone.rotary(hidden, torch.cat([self._positions()] * self.streams))
            )
        else:
            cos, sin = cast(tuple[Tensor, Tensor], self.rope)
            self.rope = take(cos, index, self.streams), take(sin, index, self.streams)
        return hidden

    def _cut_store(
        self, first_layer: int, plans: Sequence[Plan | None], said_of: Layout, options: dict[str, Any]
    ) -> None:
        """Columns leave the store: at once in the layers still to run, after the pass in those that have."""
        store = self.kit.store
        for layer in range(first_layer, self.kit.dims.layers):
            store.cut(layer, plans, said_of, self.streams)
        self._late_cuts.append((first_layer, plans, said_of))
        self._shrunk |= options.get("answer_positions") == "shrunk"

    def _decide(
        self, probe: BoundProbe, layer: int | None, hidden: Tensor, alive: Layout
    ) -> tuple[list[Plan | None] | None, dict[str, Any]]:
        """Each sample's plan for its tokens in `alive`, and the operation's options; `(None, ...)`: nothing to do."""
        edit = probe.edit
        assert edit is not None
        options = edit.do.params(self.clock)
        if self.clock.phase is Phase.PREFILL and self._unseen(edit, layer):
            return None, options  # its query rows come with the first denoising pass
        if self.cached and reads_prompt(edit, probe.site, self.clock):
            return None, options  # it acted when the prompt was computed
        rows = self.canvas.layout if probe.site is Site.BEFORE_LM else self.layout
        rows = alive if probe.site is Site.PREFIX_CACHE else rows
        plans: list[Plan | None] = []
        doubts = list(hidden.new_zeros(self.batch, dtype=torch.int64))
        for b in range(self.batch):
            if not (probe.fires_for(self.clock, b) and self.kit.watching.allows(probe.when, b)):
                plans.append(None)
                continue
            source = SampleSource(self, probe, b, hidden, rows, alive)
            plans.append(decide(edit, source, self.clock))
            doubts[b] = source.doubts
        self.kit.recorder.add(f"{NONFINITE}.{probe.name}", self.clock.pass_index, layer, torch.stack(doubts))
        return (None if all(p is None for p in plans) else plans), options

    def _unseen(self, edit: Edit, layer: int | None) -> bool:
        """Whether an intervention reads attention from rows that this pass does not have."""
        if layer is None:
            return False
        for name, params in asked(edit, self.clock):
            if name not in ("received", "attended"):
                continue
            if params.get("projected"):
                if self.looking.absent(params["queries"], self.layout):
                    return True
                continue
            if not self.looking.has(attended(layer + params.get("layer", 0), params)):
                return True
        return False

    def embeddings(self, b: int, rows: Tensor) -> Tensor:
        """`(n, width)`: one sample's rows of the canvas as they entered the language model.

        A token that was appended inside the pass stands for the mean of what it was made of.
        """
        layout = self.canvas.layout
        made = self._made[b]
        known = rows if made is None else rows.clamp(max=layout.length_at_start - 1)
        out = self.canvas.embeds[b].index_select(0, layout.locate_in(b, known))
        if made is not None:
            late = rows >= layout.length_at_start
            out = torch.where(late[:, None], made[(rows - self._first_made).clamp(min=0)], out)
        return out

    def generator(self, probe: BoundProbe, b: int) -> torch.Generator:
        """Seeded by the run's seed, the sample, the probe and the step."""
        generator = torch.Generator()
        address = (self.kit.seeds[b], self._ordinal[probe.name], self.clock.step)
        seed = 0
        for part in address:  # a fixed mixing: the same address gives the same numbers on every machine
            seed = (seed * 6364136223846793005 + part + 1442695040888963407) % 2**63
        generator.manual_seed(seed)
        return generator

    # -- tokens that take another way ------------------------------------------------------------------------------

    def _carry(self, hidden: Tensor, plans: Sequence[Plan | None]) -> None:
        """Tokens go around the layer: the sequence without them, and what brings them back."""
        before, (cos, sin) = self.layout, cast(tuple[Tensor, Tensor], self.rope)
        last, everything = self._around, all(p is not None and p.kept.shape[0] == 0 for p in plans)
        if everything and last is not None and last.before is before and last.cos is cos:  # as around the layer before
            self.layout, self.rope, index = last.layout, last.rope, last.index
        else:
            self.layout, index = narrow(before, [None if p is None else Plan(p.kept) for p in plans])
            self.rope = take(cos, index, self.streams), take(sin, index, self.streams)
            self._around = _Around(before, cos, self.layout, self.rope, index) if everything else None
        self.keys = self.layout
        self._carried = _Carried(hidden, index, before, cos, sin)

    def _bring_back(self, short: Tensor) -> Tensor:
        """A layer that some tokens went around has ended: the whole sequence again, theirs as they were."""
        carried = cast(_Carried, self._carried)
        self._carried = None
        full = restore(carried.hidden.to(short.device), short, carried.index, self.streams)
        if any(n != self.layout.width for n in self.layout.length):  # padding of the short sequence points at row 0
            full[:, :1] = take(short, self.layout.locate(carried.before.row[:, :1]), self.streams)
        self.layout = self.keys = carried.before
        self.rope = carried.cos, carried.sin
        return full

    def _skip(self, layer: int, hidden: Tensor, plans: Sequence[Plan | None], *, as_keys: bool) -> Tensor:
        """Carry tokens around a layer; with `as_keys` its attention still sees (and computes) them."""
        if self.cached:
            if not as_keys:
                self._layer_cuts.setdefault(layer, []).append((plans, self.keys))
                self.kit.ledger.note_layers(self.keys, plans, [layer])
                self._enter_columns(layer)
            return hidden
        if as_keys:
            self._skip_mlp = plans
            return hidden
        self._changed = True
        self.kit.ledger.note_layers(self.layout, plans, [layer])
        self._carry(hidden, plans)
        return take(hidden, cast(_Carried, self._carried).index, self.streams)


@dataclass(frozen=True)
class _Carried:
    """What brings back the tokens that go around a layer: their states, and the sequence before."""

    hidden: Tensor
    index: Tensor
    before: Layout
    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class _Around:
    """A sequence that every visual token went around a layer of, and what is left of it in there."""

    before: Layout
    cos: Tensor
    layout: Layout
    rope: tuple[Tensor, Tensor]
    index: Tensor


def _fate(plans: Sequence[Plan | None]) -> Fate:
    return next(p.fate for p in plans if p is not None)


def _edited(canvas: Canvas, plans: Sequence[Plan | None], options: dict[str, Any]) -> Canvas:
    if _fate(plans) is Fate.MASKED:
        return canvas.hidden(plans)
    return canvas.narrowed(plans, positions=options["positions"])


def _places(layout: Layout) -> Tensor:
    """`(batch, length)`: every row's own place."""
    return torch.arange(layout.width, device=layout.row.device).expand_as(layout.row)


class _Columns:
    """What a layer's attention takes for a key-value cache: it stores through the state of the pass."""

    is_compileable = False

    def __init__(self, state: PassState) -> None:
        self._state = state

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Fresh keys (after rotary) and values of a layer in; all columns that its queries attend to out."""
        return self._state.store_columns(layer_idx, key, value)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions are always given explicitly, so nothing is counted from here."""
        return 0
