"""The state of one forward pass: the sequence as it shrinks, and the edits that shrink it.

Hooks (in `tracer`) call in here; everything that depends on the order of layers within a pass lives in this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from probe.backbones.base import Backbone
from probe.canvas import Canvas
from probe.compile import BoundProbe, ProbeTable
from probe.cost import DecoderDims
from probe.ledger import Ledger
from probe.looking import Looking, Recorder, attended
from probe.loop import Pass
from probe.selections import token_count
from probe.site import Fate, Plan
from probe.surgery import Layout, hide, narrow, replan, take
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


class PassState:
    """What hooks read and change during one forward. `layout` is the sequence at the layer that runs now."""

    def __init__(self, kit: Kit, request: Pass, probes: Sequence[BoundProbe]) -> None:
        self.kit = kit
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
        self.looking = Looking(kit.backbone, kit.dims, kit.recorder, kit.watch, request, self.streams, probes)
        self._ordinal = {p.name: i for i, p in enumerate(kit.table.probes)}

    def timed(self) -> AbstractContextManager[None]:
        """Time spent inside belongs to the probes."""
        return self.kit.watch.section("probe")

    # -- the model's inputs -------------------------------------------------------------------------------------

    def model_inputs(self) -> dict[str, Any]:
        """Arguments of the language model for this pass, both streams under guidance."""
        embeds = self.canvas.embeds
        if self.streams == 2:
            mask_embed = self.kit.backbone.embed(torch.tensor(self.kit.backbone.special.mask, device=embeds.device))
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
        for _ in range(self.kit.dims.layers):
            self._count(self.layout.width, self.layout.width)

    def _count(self, rows: int, mlp_rows: int) -> None:
        dims = self.kit.dims
        self.flops["backbone"] += self.streams * self.batch * (dims.attention(rows, rows) + dims.mlp_block(mlp_rows))

    def leave_attention(self, layer: int) -> None:
        """A layer's attention has run."""
        self.looking.reduce(layer, self.layout)

    # -- edits --------------------------------------------------------------------------------------------------

    def enter_layer(
        self, layer: int, hidden: Tensor, kwargs: dict[str, Any], probes: Sequence[BoundProbe]
    ) -> tuple[Tensor, dict[str, Any]]:
        """A layer begins: its `layer.input` probes act, give it the tables of the sequence as it is now."""
        if self._rope is None:
            self._rope = kwargs["position_embeddings"]
        for probe in probes:
            hidden = self._act(probe, layer, hidden, first_layer=layer)
        if self._changed:
            kwargs = {
                **kwargs,
                "position_embeddings": self._rope,
                "position_ids": self.layout.position.repeat(self.streams, 1),
                "attention_mask": self._attention_mask(),
            }
        self.flops["probe"] += self.looking.ask(layer, self.layout)
        self._rows_at = self._mlp_rows = hidden.shape[1]
        return hidden, kwargs

    def cut_between(self, layer: int, hidden: Tensor, probes: Sequence[BoundProbe]) -> Tensor:
        """Between attention and MLP: the shortened residual stream, kept for `leave_layer`."""
        self._long_width = hidden.shape[1]
        short = hidden
        for probe in probes:
            short = self._act(probe, layer, short, first_layer=layer + 1)
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
            hidden = self._between + self._mlp_out
            self._between = self._mlp_out = None
        self._count(self._rows_at, self._mlp_rows)
        for probe in probes:
            hidden = self._act(probe, layer, hidden, first_layer=layer + 1)
        return hidden

    def _act(self, probe: BoundProbe, layer: int, hidden: Tensor, *, first_layer: int) -> Tensor:
        """A probe on the residual stream: record it as it is, or cut it."""
        if probe.edit is None:
            self._record(probe, layer, hidden)
            return hidden
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
        plans, options = self._decide(probe, None, self.canvas.embeds, self.canvas.layout)
        if plans is None:
            return
        lasting = options["lasts"] == "generation"
        self.kit.ledger.note(self.canvas.layout, plans, 0, lasting=lasting)
        self.canvas = _edited(self.canvas, plans, options)
        self.layout = self.canvas.layout
        if lasting:
            self.canvas_after = self.canvas

    def at_final(self, probe: BoundProbe, hidden: Tensor) -> None:
        """A probe on final-normed states. An edit decided there takes effect with the next step."""
        if probe.edit is None:
            self._record(probe, None, hidden)
            return
        plans, options = self._decide(probe, None, hidden, self.layout)
        if plans is not None:
            self._edit_canvas_after(plans, options)
            self.kit.ledger.note(self.layout, plans, self.kit.dims.layers, lasting=True)

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
        self.kit.ledger.note(self.layout, plans, first_layer, lasting=lasting)
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
            self._rope = self.kit.backbone.rotary(hidden, self.layout.position.repeat(self.streams, 1))
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
            count = token_count(select["keep"], original, select.get("round", "floor")) if "keep" in select else 0
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
                key = attended(layer + score_params.get("layer", 0), score_params)
                ids = layout.visual[b].index_select(0, rows)
                given["received"] = self.looking.received(key, b, ids, probe.name)
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
        address = (self.kit.seeds[b], self._ordinal[probe.name], self.clock.step)
        seed = 0
        for part in address:  # a fixed mixing: the same address gives the same numbers on every machine
            seed = (seed * 6364136223846793005 + part + 1442695040888963407) % 2**63
        generator.manual_seed(seed)
        return generator


def _fate(plans: Sequence[Plan | None]) -> Fate:
    return next(p.fate for p in plans if p is not None)


def _edited(canvas: Canvas, plans: Sequence[Plan | None], options: dict[str, Any]) -> Canvas:
    if _fate(plans) is Fate.MASKED:
        return canvas.hidden(plans)
    return canvas.narrowed(plans, positions=options["positions"], order=options.get("order", "raster"))
