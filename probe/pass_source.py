"""What an intervention is given by name, for one sample of one pass: the engine's side of `inputs.Source`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from probe.backbones.placement import device_of
from probe.errors import ProbeError
from probe.looking import attended
from probe.parallel import whole
from probe.project import projected_attention
from probe.scores.rotary import ones_attention
from probe.site import Role, Site
from probe.surgery import Layout
from probe.upload import upload

if TYPE_CHECKING:
    from probe.compile import BoundProbe
    from probe.pass_state import PassState


class SampleSource:
    """One sample's alive visual tokens at one place of a pass.

    `hidden (batch, row, width)` are the states there, of the rows of `layout`; `alive` is where the tokens stand that
    are decided about: the same layout, or in a cached pass the columns that they are.
    """

    def __init__(
        self, state: PassState, probe: BoundProbe, sample: int, hidden: Tensor, layout: Layout, alive: Layout
    ) -> None:
        self._state = state
        self._probe = probe
        self._b = sample
        self._hidden = hidden
        self._layout = layout
        self._alive = alive
        self.n = alive.n_visual[sample]
        self.doubts: Tensor = hidden.new_zeros((), dtype=torch.int64)

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self._hidden.device

    def spend(self, flops: int) -> None:
        """FLOPs of matrix products that the decision cost."""
        self._state.flops["probe"] += flops

    def doubt(self, score: Tensor) -> None:
        """Count a score's NaN, on its device."""
        self.doubts = self.doubts + score.isnan().sum()

    def give(self, name: str, params: Mapping[str, Any]) -> Any:
        """The input of this name; `ProbeError` where this place and pass do not have it."""
        if name == "hidden":
            return self._hidden_()
        simple = {
            "n": self.n,
            "original": self._state.canvas.originals[self._b],
            "progress": self._progress(),
            "layer_index": -1 if self._probe.layer is None else self._probe.layer,
        }
        if name in simple:
            return simple[name]
        maker = getattr(self, f"_{name}", None)
        if maker is None:
            raise ProbeError(f"{self._at()}: `{name}` is not to be had in the language model")
        return maker(params)

    def _progress(self) -> float:
        """Steps that are done when a choice takes effect, over nominal steps: at `final` this one is among them."""
        clock = self._state.clock
        return (clock.step + (self._probe.site is Site.FINAL)) / clock.nominal_steps

    def _at(self) -> str:
        return f"probe `{self._probe.name}` ({self._probe.place}) at step {self._state.clock.step}"

    # -- tokens ---------------------------------------------------------------------------------------------------

    @cached_property
    def _uids(self) -> Tensor:
        """`(n,)`: the canvas numbers of the alive visual tokens."""
        return self._alive.row[self._b].index_select(0, self._alive.visual_rows[self._b])

    @cached_property
    def _index(self) -> Tensor:
        """`(n,)`: their original visual index, -1 for appended ones."""
        return self._alive.visual[self._b].index_select(0, self._alive.visual_rows[self._b])

    def _places(self, layout: Layout) -> Tensor:
        if self._alive is layout:
            return layout.visual_rows[self._b]
        if not layout.n_visual[self._b]:
            words = "this pass reads visual tokens from stored keys, and computes no hidden states of theirs"
            raise ProbeError(f"{self._at()}: {words}; score by attention, at `before_lm`, or in the prefill")
        return layout.locate_in(self._b, self._uids)

    def _rows_of(self, hidden: Tensor, layout: Layout) -> Tensor:
        return hidden[self._b].index_select(0, self._places(layout))

    def _hidden_(self) -> Tensor:
        return self._rows_of(self._hidden, self._layout)

    def _layer_input(self, params: Mapping[str, Any]) -> Tensor:
        entered = self._state.entered
        if entered is None:
            raise ProbeError(f"{self._at()}: `layer_input` is known inside a layer only")
        hidden, layout = entered
        return self._rows_of(hidden.to(self.device), layout)

    def _embedding(self, params: Mapping[str, Any]) -> Tensor:
        return self._state.embeddings(self._b, self._uids)

    def _size(self, params: Mapping[str, Any]) -> Tensor:
        size = self._alive.size
        if size is None:
            return torch.ones(self.n, device=self.device)
        return size[self._b].index_select(0, self._alive.visual_rows[self._b])

    def _row(self, params: Mapping[str, Any]) -> Tensor:
        return self._alive.visual_rows[self._b]

    def _newline(self, params: Mapping[str, Any]) -> Tensor:
        role = self._alive.role[self._b].index_select(0, self._alive.visual_rows[self._b])
        return role == int(Role.NEWLINE)

    def _cls(self, params: Mapping[str, Any]) -> Tensor:
        return torch.zeros(self.n, dtype=torch.bool, device=self.device)

    def _of_prompt(self, values: Tensor, filler: float) -> Tensor:
        known = values.to(self.device)
        if known.shape[0] == 0:
            return known
        own = known.index_select(0, self._index.clamp(min=0))
        return own.masked_fill((self._index < 0).reshape(-1, *[1] * (own.dim() - 1)), filler)

    def _box(self, params: Mapping[str, Any]) -> Tensor:
        return self._of_prompt(self._state.canvas.boxes[self._b], torch.nan)

    def _view(self, params: Mapping[str, Any]) -> Tensor:
        return self._of_prompt(self._state.canvas.views[self._b].long(), 0)

    def _columns(self, params: Mapping[str, Any]) -> int:
        """Tokens in a row of the first view's grid."""
        box, view = self._state.canvas.boxes[self._b], self._state.canvas.views[self._b]
        seen = box[(view == view.min()) & ~box[:, 0].isnan()] if box.shape[0] else box
        return int((seen[:, 1] == seen[:, 1].min()).sum()) if seen.shape[0] else 1

    # -- attention ------------------------------------------------------------------------------------------------

    def _key(self, params: Mapping[str, Any]) -> Any:
        assert self._probe.layer is not None
        return attended(self._probe.layer + params.get("layer", 0), dict(params))

    def _received(self, params: Mapping[str, Any]) -> Tensor:
        if params.get("projected"):
            return self._projected(params)
        layer, queries, form = self._key(params)
        layers = range(layer + 1) if params.get("layers") == "so_far" else [layer]
        looking, name = self._state.looking, self._probe.name
        seen = [looking.received((at, queries, form), self._b, self._uids, name) for at in layers]
        return seen[0] if len(seen) == 1 else torch.stack(seen).mean(0)

    def _projected(self, params: Mapping[str, Any]) -> Tensor:
        """Attention of a layer that has not run yet: its norm and projections, applied to the rows that matter."""
        state, layer = self._state, self._probe.layer
        assert layer is not None and state.rope is not None
        if self._alive is not self._layout:
            raise ProbeError(f"{self._at()}: `projected` needs every row computed in this pass")
        rows, weight = state.looking.query_rows(params["queries"], self._layout, self._b)
        modules = state.kit.backbone.layers[layer]
        cos, sin = (table[min(self._b, table.shape[0] - 1), :, modules.tables] for table in state.rope)
        real, mask = self._layout.length[self._b], state.mask_of(layer)
        there = device_of(modules.layer)
        seen, flops = projected_attention(
            modules,
            self._hidden[self._b, :real].to(there),
            rows.to(there),
            cos[:real].to(there),
            sin[:real].to(there),
            params["form"],
            None if mask is None else mask[self._b : self._b + 1, ..., :real].to(there),
        )
        self.spend(flops)
        return (weight @ seen.to(self.device)).index_select(1, self._layout.visual_rows[self._b])

    def _attended(self, params: Mapping[str, Any]) -> Tensor:
        return self._state.looking.attended_rows(self._key(params), self._b, self._uids, self._probe.name)

    def _n_queries(self, params: Mapping[str, Any]) -> Any:
        return self._state.looking.n_queries(self._key(params), self._b)

    def _rotary_received(self, params: Mapping[str, Any]) -> Tensor:
        """What the score's query rows would pay each token if all queries and keys were ones."""
        rows, weight = self._state.looking.query_rows(self._key(params)[1], self._layout, self._b)
        backbone = self._state.kit.backbone
        part = backbone.layers[self._key(params)[0]].tables

        def rotary(position: Tensor) -> list[Tensor]:
            return [table[0, :, part].to(self.device) for table in backbone.rotary(self._hidden[:1], position[None])]

        cos, sin = rotary(self._layout.position[self._b])
        alive = self._alive
        real = alive.row[self._b] >= 0
        if alive.hidden_key is not None:
            real = real & ~alive.hidden_key[self._b]
        columns = real.nonzero()[:, 0]
        seen = ones_attention(cos[rows], sin[rows], *rotary(alive.position[self._b][columns]))
        self.spend(2 * rows.shape[0] * columns.shape[0] * (cos.shape[-1] + 1))
        order = torch.arange(columns.shape[0], device=columns.device)
        place = torch.zeros_like(real, dtype=torch.int64).index_copy(0, columns, order)
        return (weight @ seen).index_select(0, place[alive.visual_rows[self._b]])

    def _keys(self, params: Mapping[str, Any]) -> Tensor:
        assert self._probe.layer is not None
        if self._probe.site is Site.PREFIX_CACHE:
            layer = self._probe.layer + params.get("layer", 0)
            held = self._state.kit.store.layers[layer]
            assert held is not None
            key = whole(self._state.kit.backbone.layers[layer].attention, held.key)
            return key[self._b].to(self.device).index_select(1, held.layout.locate_in(self._b, self._uids))
        return self._state.looking.keys(
            self._probe.layer + params.get("layer", 0), self._b, self._uids, self._probe.name
        )

    # -- text -----------------------------------------------------------------------------------------------------

    def _text_places(self, layout: Layout) -> Tensor:
        rows = self._state.request.canvas.rows_of(Role.QUESTION, self._b)
        if self._state.request.work.prompt != "all":
            raise ProbeError(f"{self._at()}: this pass computes no rows of the question")
        return layout.locate_in(self._b, upload(rows, self.device, torch.int64))

    def _text_hidden(self, params: Mapping[str, Any]) -> Tensor:
        return self._hidden[self._b].index_select(0, self._text_places(self._layout))

    def _text_row(self, params: Mapping[str, Any]) -> Tensor:
        return self._text_places(self._layout)

    def _text_keys(self, params: Mapping[str, Any]) -> Tensor:
        assert self._probe.layer is not None
        rows = self._state.request.canvas.rows_of(Role.QUESTION, self._b)
        uids = upload(rows, self.device, torch.int64)
        return self._state.looking.keys(self._probe.layer + params.get("layer", 0), self._b, uids, self._probe.name)

    # -- noise ----------------------------------------------------------------------------------------------------

    @cached_property
    def _random(self) -> torch.Generator:
        return self._state.generator(self._probe, self._b)

    def _generator(self, params: Mapping[str, Any]) -> torch.Generator:
        return self._random

    def _noise(self, params: Mapping[str, Any]) -> Any:
        return lambda m: torch.rand(m, generator=self._random)
