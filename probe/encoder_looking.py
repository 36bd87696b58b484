"""What probes want to see inside the encoder's layers: attention rows, averaged over those who look, and keys.

The same (layer, queries, form) is computed once, whoever asks for it. Results are kept by token number (see
`Survivors`), so that a probe behind the layers still finds what a token received inside them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from probe.attend import Form, KeyRequest, RowRequest, ask, forget
from probe.backbones.base import Backbone
from probe.compile import BoundProbe, Call
from probe.cost import EncoderDims
from probe.encoder_state import ViewState
from probe.site import Clock
from probe.timing import Stopwatch

BEFORE = Clock(pass_index=0, step=0, block=0, step_in_block=0, nominal_steps=1, n_blocks=1)
"""The clock while pictures are encoded: no step has begun."""

Looked = tuple[int, str, Form]
"""Attention of one encoder layer, from one set of query rows, in one form."""


@dataclass
class _Averaged:
    """Attention rows of every view, averaged over its query rows as their chunks arrive: `(view, head, key)`."""

    weight: Tensor
    total: Tensor | None = None

    def receive(self, weights: Tensor, first: int) -> None:
        share = self.weight[:, first : first + weights.shape[2]]
        part = (share[:, None, None] @ weights)[:, :, 0]
        self.total = part if self.total is None else self.total + part


class EncoderLooking:
    """The attention and the keys that a recipe's probes want from one run of the encoder."""

    def __init__(self, backbone: Backbone, dims: EncoderDims, watch: Stopwatch, lead: int) -> None:
        self._modules = [modules.attention for modules in backbone.encoder_layers]
        self._dims = dims
        self._watch = watch
        self._lead = lead
        self._rows: dict[int, set[Looked]] = {}
        self._key_layers: set[int] = set()
        self._under_way: dict[Looked, _Averaged] = {}
        self._received: dict[Looked, Tensor] = {}
        self._keys: dict[int, Tensor] = {}

    def want(self, probe: BoundProbe, call: Call) -> None:
        """Note what a part of a probe needs to be given."""
        if "received" in call.entry.needs:
            looked = self.looked(probe, call)
            self._rows.setdefault(looked[0], set()).add(looked)
        if "keys" in call.entry.needs:
            self._key_layers.add(self._layer(probe, call))

    def _layer(self, probe: BoundProbe, call: Call) -> int:
        """The encoder layer that a part means: relative to the probe's own, which behind the layers is the last."""
        own = self._dims.layers - 1 if probe.layer is None else probe.layer
        return own + int(call.params(BEFORE).get("layer", 0))

    def looked(self, probe: BoundProbe, call: Call) -> Looked:
        """The attention that a part means."""
        params = call.params(BEFORE)
        return self._layer(probe, call), str(params["queries"]), params["form"]

    def ask(self, layer: int, state: ViewState, width: int, device: torch.device) -> int:
        """Put this layer's requests to its attention module, whose views have `width` rows. Returns their FLOPs."""
        requests: list[RowRequest | KeyRequest] = []
        flops = 0
        for looked in sorted(self._rows.get(layer, ())):
            rows, weight = _query_rows(looked[1], state, self._lead, device)
            self._under_way[looked] = averaged = _Averaged(weight)
            requests.append(RowRequest(rows, looked[2], averaged.receive))
            flops += rows.shape[0] * self._dims.looked_rows(rows.shape[1], width, looked[2])
        if layer in self._key_layers:

            def keep(keys: Tensor) -> None:
                self._keys[layer] = state.by_number(keys.transpose(1, 2), self._lead)

            requests.append(KeyRequest(keep))
        if requests:
            ask(self._modules[layer], requests, lambda: self._watch.section("probe"))
        return flops

    def reduce(self, layer: int, state: ViewState) -> None:
        """The layer's attention has run: keep what it gave, by number."""
        if layer not in self._rows and layer not in self._key_layers:
            return
        forget(self._modules[layer])
        for looked in self._rows.get(layer, ()):
            total = self._under_way.pop(looked).total
            if total is not None:
                self._received[looked] = state.by_number(total.transpose(1, 2), self._lead)

    def release(self) -> None:
        """Forget what an interrupted run left on the attention modules."""
        for layer in {*self._rows, *self._key_layers}:
            forget(self._modules[layer])

    def received(self, probe: BoundProbe, call: Call, numbers: Tensor) -> Tensor:
        """`(head, n)` float32: the attention that these tokens received; NaN for tokens that came later."""
        return _taken(self._received[self.looked(probe, call)], numbers).T

    def keys(self, probe: BoundProbe, call: Call, numbers: Tensor) -> Tensor:
        """`(head, n, size)`: the keys of these tokens; NaN for tokens that came later."""
        return _taken(self._keys[self._layer(probe, call)], numbers).transpose(0, 1)


def _query_rows(queries: str, state: ViewState, lead: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`(rows, weight)`, both `(view, query)`: the rows that look, and weights that sum to 1 over each view's own."""
    first = lead if queries == "visual" else 0
    last = [lead if queries == "cls" else lead + n for n in state.counts]
    width = max(1, max(last) - first)
    rows = first + torch.arange(width, device=device).expand(len(last), -1)
    end = torch.tensor(last, device=device)[:, None]
    weight = (rows < end) / (end - first).clamp(min=1)
    return rows.contiguous(), weight.float()


def _taken(by_number: Tensor, numbers: Tensor) -> Tensor:
    """Rows of `(T, ...)` for these numbers; NaN for numbers beyond them."""
    known = numbers < by_number.shape[0]
    rows = by_number[numbers.where(known, 0)]
    return rows.where(known.view(-1, *[1] * (rows.dim() - 1)), torch.nan)
