"""The state of one forward pass: the sequence as it shrinks, the attention rows under way, the edits decided.

Hooks (in `tracer`) call in here; everything that depends on the order of layers within a pass lives in this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from probe.attend import Form, RowRequest, ask, forget
from probe.canvas import Canvas
from probe.compile import BoundProbe, Call
from probe.errors import ProbeError
from probe.loop import Pass
from probe.selections import token_count
from probe.site import Fate, Plan, QuerySet, Role
from probe.surgery import Layout, hide, narrow, replan, take

if TYPE_CHECKING:
    from probe.tracer import Tracer

Attended = tuple[int, QuerySet, Form]
"""Attention of one layer, from one set of query rows, in one form: computed once, whoever asks for it."""


class Recorder:
    """Recorded values on the device, by variable: `(pass, layer or None) -> (batch, ...)`."""

    def __init__(self) -> None:
        self.values: dict[str, dict[tuple[int, int | None], Tensor]] = {}

    def add(self, name: str, pass_index: int, layer: int | None, value: Tensor) -> None:
        """Keep a value until the sample ends."""
        self.values.setdefault(name, {})[pass_index, layer] = value


@dataclass
class _Gathering:
    """Attention rows being averaged as their chunks arrive: `(batch, head, key)` over the query rows."""

    rows: Tensor
    weight: Tensor
    total: Tensor | None = None

    def receive(self, weights: Tensor, first: int) -> None:
        share = self.weight[:, first : first + weights.shape[2]]
        part = (share[:, None, None] @ weights[: share.shape[0]])[:, :, 0]
        self.total = part if self.total is None else self.total + part


class PassState:
    """What hooks read and change during one forward. `layout` is the sequence at the layer that runs now."""

    def __init__(self, tracer: Tracer, request: Pass) -> None:
        self.tracer = tracer
        self.request = request
        self.clock = request.clock
        self.batch = request.canvas.layout.batch
        self.streams = 2 if request.guided else 1
        self.canvas = request.canvas
        self.canvas_after = request.canvas
        self.layout: Layout = request.canvas.layout
        self.flops: dict[str, int] = {"backbone": 0, "probe": 0}
        self._changed = False
        self._rope: tuple[Tensor, Tensor] | None = None
        self._between: Tensor | None = None
        self._mlp_out: Tensor | None = None
        self._long_width = 0
        self._wanted: dict[int, set[Attended]] = {}
        self._records: dict[Attended, list[tuple[str, Call]]] = {}
        self._under_way: dict[Attended, _Gathering] = {}
        self._scored: set[Attended] = set()
        self._received: dict[Attended, Tensor] = {}
        self._rows: dict[QuerySet, tuple[Layout, tuple[Tensor, Tensor] | None]] = {}
        self._ordinal = {p.name: i for i, p in enumerate(tracer.table.probes)}

    def timed(self) -> AbstractContextManager[None]:
        """Time spent inside belongs to the probes."""
        return self.tracer.watch.section("probe")

    # -- the model's inputs -------------------------------------------------------------------------------------

    def model_inputs(self) -> dict[str, Any]:
        """Arguments of the language model for this pass, both streams under guidance."""
        embeds = self.canvas.embeds
        if self.streams == 2:
            mask_embed = self.tracer.backbone.embed(
                torch.tensor(self.tracer.backbone.special.mask, device=embeds.device)
            )
            embeds = torch.cat([embeds, self.canvas.unconditional(mask_embed)])
        self.layout = self.canvas.layout
        mask = self.layout.key_mask()
        return {
            "inputs_embeds": embeds,
            "position_ids": self.layout.position.repeat(self.streams, 1),
            "attention_mask": None if mask is None else mask.repeat(self.streams, 1),
            "use_cache": False,
        }

    def count_all_layers(self) -> None:
        """FLOPs of a pass that no hook watches."""
        for _ in range(self.tracer.dims.layers):
            self._count(self.layout.width, self.layout.width)

    def _count(self, rows: int, mlp_rows: int) -> None:
        dims = self.tracer.dims
        self.flops["backbone"] += self.streams * self.batch * (dims.attention(rows, rows) + dims.mlp_block(mlp_rows))

    # -- attention rows -----------------------------------------------------------------------------------------

    def plan_requests(self, probes: Sequence[BoundProbe]) -> None:
        """Find out which attention the firing probes need from which layer."""
        for probe in probes:
            if probe.layer is None:
                continue
            for record in probe.records:
                if "received" in record.signal.entry.needs:
                    key = _attended(probe.layer, record.signal.params(self.clock))
                    self._wanted.setdefault(probe.layer, set()).add(key)
                    self._records.setdefault(key, []).append((record.name, record.signal))
            if probe.edit is not None and probe.edit.score is not None:
                score = probe.edit.score
                if "received" in score.entry.needs:
                    params = score.params(self.clock)
                    layer = probe.layer + params.get("layer", 0)
                    self._wanted.setdefault(layer, set()).add(_attended(layer, params))
                    self._scored.add(_attended(layer, params))

    def _query_rows(self, queries: QuerySet) -> tuple[Tensor, Tensor] | None:
        """`(rows (batch, q), weight (batch, q))` in the current layout; weights sum to 1. None if a set is empty."""
        known = self._rows.get(queries)
        if known is None or known[0] is not self.layout:
            self._rows[queries] = known = (self.layout, self._find_rows(queries))
        return known[1]

    def _find_rows(self, queries: QuerySet) -> tuple[Tensor, Tensor] | None:
        layout, canvas = self.layout, self.canvas
        device = layout.row.device
        if queries == "visual":
            per_sample = list(layout.visual_rows)
        elif queries == "all":
            per_sample = [torch.arange(n, device=device) for n in layout.length]
        else:
            start = [_start_rows(queries, canvas, self.request, b) for b in range(self.batch)]
            if any(not rows for rows in start):
                return None
            width = max(len(rows) for rows in start)
            padded = torch.tensor([rows + rows[-1:] * (width - len(rows)) for rows in start], device=device)
            located = layout.locate(padded)
            per_sample = [located[b, : len(rows)] for b, rows in enumerate(start)]
        if any(rows.shape[0] == 0 for rows in per_sample):
            return None
        rows = torch.nn.utils.rnn.pad_sequence(per_sample, batch_first=True)
        weight = torch.nn.utils.rnn.pad_sequence(
            [torch.full((r.shape[0],), 1 / r.shape[0], device=device) for r in per_sample], batch_first=True
        )
        return rows, weight

    def _ask(self, layer: int) -> None:
        requests = []
        for key in sorted(self._wanted.get(layer, ())):
            found = self._query_rows(key[1])
            if found is None:
                continue
            gathering = _Gathering(*found)
            self._under_way[key] = gathering
            rows = gathering.rows.repeat(self.streams, 1)
            requests.append(RowRequest(rows, key[2], gathering.receive))
            dims = self.tracer.dims
            scored = dims.scored_rows(rows.shape[1], self.layout.width, key[2])
            averaged = dims.averaged_rows(rows.shape[1], self.layout.width, key[2])
            self.flops["probe"] += self.batch * (self.streams * scored + averaged)
        if requests:
            ask(self.tracer.backbone.layers[layer].attention, requests, self.timed)

    def leave_attention(self, layer: int) -> None:
        """A layer's attention has run: reduce what was asked of it, and hand it to the recorder."""
        if layer not in self._wanted:
            return
        with self.timed():
            forget(self.tracer.backbone.layers[layer].attention)
            n_visual = max(self.canvas.n_visual_at_start, default=0)
            for key in sorted(self._wanted[layer]):
                gathering = self._under_way.pop(key, None)
                if gathering is None or gathering.total is None:
                    continue
                received = gathering.total
                for name, signal in self._records.get(key, ()):
                    given = {
                        "received": received,
                        "key_role": self.layout.role,
                        "key_visual": self.layout.visual,
                        "n_visual": n_visual,
                    }
                    value = signal.entry.function(*(given[n] for n in signal.entry.needs), **signal.params(self.clock))
                    self.tracer.recorder.add(name, self.clock.pass_index, layer, value)
                if key in self._scored:
                    by_token = torch.full((*received.shape[:2], n_visual + 1), torch.nan, device=received.device)
                    index = self.layout.visual.where(self.layout.visual >= 0, n_visual)
                    index = index[:, None].expand(-1, received.shape[1], -1)
                    self._received[key] = by_token.scatter_(2, index, received)

    # -- edits --------------------------------------------------------------------------------------------------

    def enter_layer(
        self, layer: int, hidden: Tensor, kwargs: dict[str, Any], edits: Sequence[BoundProbe]
    ) -> tuple[Tensor, dict[str, Any]]:
        """A layer begins: apply its `layer.input` edits, give it the tables of the sequence as it is now."""
        if self._rope is None:
            self._rope = kwargs["position_embeddings"]
        for probe in edits:
            hidden = self._cut(probe, layer, hidden, first_layer=layer)
        if self._changed:
            kwargs = {
                **kwargs,
                "position_embeddings": self._rope,
                "position_ids": self.layout.position.repeat(self.streams, 1),
                "attention_mask": self._attention_mask(),
            }
        self._ask(layer)
        self._rows_at = self._mlp_rows = hidden.shape[1]
        return hidden, kwargs

    def cut_between(self, layer: int, hidden: Tensor, edits: Sequence[BoundProbe]) -> Tensor:
        """Between attention and MLP: the shortened residual stream, kept for `leave_layer`."""
        self._long_width = hidden.shape[1]
        short = hidden
        for probe in edits:
            short = self._cut(probe, layer, short, first_layer=layer + 1)
        self._between = short if short.shape[1] != self._long_width or short is not hidden else None
        self._mlp_rows = short.shape[1]
        return short

    def swallow_mlp(self, output: Tensor) -> Tensor:
        """The MLP ran on the short sequence: keep its output, report zeros of the length that the layer expects."""
        if self._between is None:
            return output
        self._mlp_out = output
        return output.new_zeros(()).expand(output.shape[0], self._long_width, output.shape[2])

    def leave_layer(self, layer: int, hidden: Tensor, edits: Sequence[BoundProbe]) -> Tensor:
        """A layer ends: its output on the sequence as it is now, after its `layer.output` edits."""
        if self._between is not None and self._mlp_out is not None:
            hidden = self._between + self._mlp_out
            self._between = self._mlp_out = None
        self._count(self._rows_at, self._mlp_rows)
        for probe in edits:
            hidden = self._cut(probe, layer, hidden, first_layer=layer + 1)
        return hidden

    def edit_canvas(self, probe: BoundProbe) -> None:
        """An edit before layer 0: on the canvas itself, for good or for this pass."""
        plans, options = self._decide(probe, None, self.canvas.embeds, self.canvas.layout)
        if plans is None:
            return
        lasting = options["lasts"] == "generation"
        self.tracer.ledger.note(self.canvas.layout, plans, 0, lasting=lasting)
        self.canvas = _edited(self.canvas, plans, options)
        self.layout = self.canvas.layout
        if lasting:
            self.canvas_after = self.canvas

    def edit_after(self, probe: BoundProbe, hidden: Tensor) -> None:
        """An edit decided on final-normed states: it takes effect with the next step."""
        plans, options = self._decide(probe, None, hidden, self.layout)
        if plans is not None:
            self._edit_canvas_after(plans, options)
            self.tracer.ledger.note(self.layout, plans, self.tracer.dims.layers, lasting=True)

    def _edit_canvas_after(self, plans: Sequence[Plan | None], options: dict[str, Any]) -> None:
        target = self.canvas_after.layout
        said = [None if p is None else replan(p, self.layout, target, b) for b, p in enumerate(plans)]
        self.canvas_after = _edited(self.canvas_after, said, options)

    def _attention_mask(self) -> Tensor | None:
        mask = self.layout.key_mask()
        return None if mask is None else mask.repeat(self.streams, 1)[:, None, None, :]

    def _cut(self, probe: BoundProbe, layer: int, hidden: Tensor, *, first_layer: int) -> Tensor:
        plans, options = self._decide(probe, layer, hidden, self.layout)
        if plans is None:
            return hidden
        lasting = options["lasts"] == "generation"
        self.tracer.ledger.note(self.layout, plans, first_layer, lasting=lasting)
        if lasting:
            self._edit_canvas_after(plans, options)
        self._changed = True
        if _fate(plans) is Fate.MASKED:
            self.layout = hide(self.layout, plans)
            return hidden
        self.layout, index = narrow(
            self.layout, plans, positions=options["positions"], order=options.get("order", "raster")
        )
        hidden = take(hidden, index, self.streams)
        if options["positions"] == "compact":
            self._rope = self.tracer.backbone.rotary(hidden, self.layout.position.repeat(self.streams, 1))
        else:
            cos, sin = cast(tuple[Tensor, Tensor], self._rope)
            self._rope = take(cos, index, self.streams), take(sin, index, self.streams)
        return hidden

    def _decide(
        self, probe: BoundProbe, layer: int | None, hidden: Tensor, layout: Layout
    ) -> tuple[list[Plan | None] | None, dict[str, Any]]:
        """Each sample's plan and the operation's options. `(None, ...)` when there is nothing to do for anyone."""
        edit = probe.edit
        assert edit is not None
        select, options = edit.select.params(self.clock), edit.do.params(self.clock)
        plans: list[Plan | None] = []
        for b in range(self.batch):
            n = layout.n_visual[b]
            original = self.canvas.n_visual_at_start[b]
            count = token_count(select["keep"], original, select["round"]) if "keep" in select else 0
            if n == 0 or count >= n:
                plans.append(None)
                continue
            kept = self._select(probe, b, layer, hidden, layout, n, count, select)
            plans.append(edit.do.entry.function(kept.to(hidden.device), **options))
        return (None if all(p is None for p in plans) else plans), options

    def _select(
        self,
        probe: BoundProbe,
        b: int,
        layer: int | None,
        hidden: Tensor,
        layout: Layout,
        n: int,
        count: int,
        params: dict[str, Any],
    ) -> Tensor:
        edit = probe.edit
        assert edit is not None
        rows = layout.visual_rows[b]
        given: dict[str, Any] = {"n": n, "count": count, "generator": self._generator(probe, b)}
        needs = set(edit.select.entry.needs) | (set(edit.score.entry.needs) if edit.score else set())
        if "hidden" in needs:
            given["hidden"] = hidden[b].index_select(0, rows)
        if "embedding" in needs:
            given["embedding"] = self._embeddings(b, layout.visual[b].index_select(0, rows))
        if edit.score is not None:
            score_params = edit.score.params(self.clock)
            if "received" in needs:
                assert layer is not None
                key = _attended(layer + score_params.get("layer", 0), score_params)
                if key not in self._received:
                    raise ProbeError(
                        f"probe `{probe.name}` at step {self.clock.step}: there are no `{key[1]}` rows to score with"
                    )
                given["received"] = self._received[key][b].index_select(1, layout.visual[b].index_select(0, rows))
            value = edit.score.entry.function(*(given[k] for k in edit.score.entry.needs), **score_params)
            value = value.to(hidden.device)
            given["similarity" if value.dim() == 2 else "score"] = value
            if "flops" in edit.score.entry.meta:
                self.flops["probe"] += edit.score.entry.meta["flops"](n, hidden.shape[-1])
        return edit.select.entry.function(*(given[k] for k in edit.select.entry.needs), **params)

    def _embeddings(self, b: int, visual: Tensor) -> Tensor:
        """Embeddings of the visual tokens with these original indices, as they entered the language model."""
        layout = self.canvas.layout
        alive = layout.visual[b].index_select(0, layout.visual_rows[b])
        spot = torch.zeros(self.canvas.n_visual_at_start[b], dtype=torch.int64, device=visual.device)
        spot.scatter_(0, alive, layout.visual_rows[b])
        return self.canvas.embeds[b].index_select(0, spot[visual])

    def _generator(self, probe: BoundProbe, b: int) -> torch.Generator:
        generator = torch.Generator()
        address = (self.tracer.seeds[b], self._ordinal[probe.name], self.clock.step)
        seed = 0
        for part in address:  # a fixed mixing: the same address gives the same numbers on every machine
            seed = (seed * 6364136223846793005 + part + 1442695040888963407) % 2**63
        generator.manual_seed(seed)
        return generator

    def release(self) -> None:
        """Forget what an interrupted forward left on the attention modules."""
        for layer in self._wanted:
            if 0 <= layer < self.tracer.dims.layers:
                forget(self.tracer.backbone.layers[layer].attention)


def _attended(layer: int, params: dict[str, Any]) -> Attended:
    return layer, params["queries"], params["form"]


def _fate(plans: Sequence[Plan | None]) -> Fate:
    return next(p.fate for p in plans if p is not None)


def _edited(canvas: Canvas, plans: Sequence[Plan | None], options: dict[str, Any]) -> Canvas:
    if _fate(plans) is Fate.MASKED:
        return canvas.hidden(plans)
    return canvas.narrowed(plans, positions=options["positions"], order=options.get("order", "raster"))


def _start_rows(queries: QuerySet, canvas: Canvas, request: Pass, b: int) -> list[int]:
    """Rows (numbered at the start) of a query set that the host knows."""
    prompt = canvas.prompt_length[b]
    match queries:
        case "masked":
            return request.masked[b]
        case "filled":
            return request.filled[b]
        case "answer":
            return canvas.answer_rows[b]
        case "last":
            return [prompt + canvas.gen_length + canvas.suffix_length - 1]
        case "last_prompt":
            return [prompt - 1]
        case "question":
            return canvas.rows_of(Role.QUESTION, b)
        case "system":
            return canvas.rows_of(Role.SYSTEM, b)
        case _:
            raise ProbeError(f"`{queries}` is no set of rows")
