"""What probes want to see inside the encoder's layers: attention rows, averaged over those who look, and keys.

The same (layer, queries, form) is computed once, whoever asks for it. Results are kept by token number (see
`Survivors`), so that a probe behind the layers still finds what a token received inside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probe.attend import RowRequest, ask, forget
from probe.backbones.base import Backbone
from probe.compile import BoundProbe
from probe.cost import EncoderDims
from probe.encoder_state import Group, ViewState
from probe.errors import ProbeError
from probe.site import Clock, Form
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
        self._looking_rows: dict[Looked, list[int]] = {}
        self._keys: dict[int, Tensor] = {}

    def want(self, probe: BoundProbe, name: str, params: Mapping[str, Any]) -> None:
        """Note what a part of a probe needs to be given."""
        if name == "received":
            looked = self._looked(probe, params)
            self._rows.setdefault(looked[0], set()).add(looked)
        if name == "keys":
            self._key_layers.add(self._layer(probe, params))

    def _layer(self, probe: BoundProbe, params: Mapping[str, Any]) -> int:
        """The encoder layer that a part means: relative to the probe's own, which behind the layers is the last."""
        own = self._dims.layers - 1 if probe.layer is None else probe.layer
        return own + int(params.get("layer", 0))

    def _looked(self, probe: BoundProbe, params: Mapping[str, Any]) -> Looked:
        return self._layer(probe, params), str(params["queries"]), params["form"]

    def ask(self, layer: int, state: ViewState, width: int, device: torch.device) -> int:
        """Put this layer's requests to its attention module, whose views have `width` rows. Returns their FLOPs."""
        requests: list[RowRequest] = []
        flops = 0
        for looked in sorted(self._rows.get(layer, ())):
            rows, weight = _query_rows(looked[1], state, self._lead, device)
            self._looking_rows[looked] = _counts(looked[1], state, self._lead)
            self._under_way[looked] = averaged = _Averaged(weight)
            requests.append(RowRequest(rows, looked[2], averaged.receive))
            flops += rows.shape[0] * self._dims.looked_rows(rows.shape[1], width, looked[2])

        def keep(keys: Tensor) -> None:
            self._keys[layer] = state.by_number(keys.transpose(1, 2), self._lead)

        if requests or layer in self._key_layers:
            wanted = keep if layer in self._key_layers else None
            ask(self._modules[layer], requests, lambda: self._watch.section("probe"), keys=wanted)
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

    def received(self, probe: BoundProbe, params: Mapping[str, Any], numbers: Tensor) -> Tensor:
        """`(head, n)` float32: the attention that these tokens received; NaN for tokens that came later."""
        looked = self._looked(probe, params)
        return _taken(self._seen(self._received.get(looked), probe, looked[0]), numbers).T

    def n_queries(self, probe: BoundProbe, params: Mapping[str, Any], group: Group) -> int:
        """How many rows of a view looked."""
        return self._looking_rows[self._looked(probe, params)][group[0]]

    def keys(self, probe: BoundProbe, params: Mapping[str, Any], numbers: Tensor) -> Tensor:
        """`(head, n, size)`: the keys of these tokens; NaN for tokens that came later."""
        layer = self._layer(probe, params)
        return _taken(self._seen(self._keys.get(layer), probe, layer), numbers).transpose(0, 1)

    @staticmethod
    def _seen(found: Tensor | None, probe: BoundProbe, layer: int) -> Tensor:
        if found is None:
            raise ProbeError(
                f"probe `{probe.name}`: the attention of encoder layer {layer} answered nothing; load the backbone "
                "with the encoder's attention `sdpa` or `eager`"
            )
        return found


def _counts(queries: str, state: ViewState, lead: int) -> list[int]:
    """How many rows of each view look."""
    own = 0 if queries == "visual" else lead
    return [own + (0 if queries == "cls" else n) for n in state.counts]


def _query_rows(queries: str, state: ViewState, lead: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`(rows, weight)`, both `(view, query)`: the rows that look, and weights that sum to 1 over each view's own."""
    counts = _counts(queries, state, lead)
    rows = torch.arange(max(1, *counts), device=device).expand(len(counts), -1)
    own = torch.tensor(counts, device=device)[:, None]
    weight = (rows < own) / own.clamp(min=1)
    return (rows + (lead if queries == "visual" else 0)).contiguous(), weight.float()


def _taken(by_number: Tensor, numbers: Tensor) -> Tensor:
    """Rows of `(T, ...)` for these numbers; NaN for numbers beyond them."""
    known = numbers < by_number.shape[0]
    rows = by_number[numbers.where(known, 0)]
    return rows.where(known.view(-1, *[1] * (rows.dim() - 1)), torch.nan)
