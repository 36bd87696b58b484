"""One run of the image encoder under probes: what they look at, what they decide, what is recorded.

Hooks (in `encoder`) call in here. A probe decides view by view, or over all views of a picture together; its score, its
selection and its operation are given what they name, as in the language model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probe.attend import Form, KeyRequest, RowRequest, ask, forget
from probe.backbones.base import Backbone, Views
from probe.compile import BoundProbe, Call, ProbeTable
from probe.cost import EncoderDims
from probe.encoder_state import Group, ViewState, shorten
from probe.errors import ProbeError
from probe.selections import token_count
from probe.site import Choice, Clock, Plan, Site
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


@dataclass
class EncoderPass:
    """What hooks read and change while one sample's pictures are encoded. `lead` rows of every view are no patches."""

    backbone: Backbone
    table: ProbeTable
    views: Views
    dims: EncoderDims
    watch: Stopwatch
    seed: int
    text: Callable[[], Tensor]
    lead: int
    state: ViewState
    flops: dict[str, int] = field(default_factory=lambda: {"encode": 0, "probe": 0})
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    _between: Tensor | None = None
    _mlp_out: Tensor | None = None
    _long: int = 0

    def __post_init__(self) -> None:
        self._probes = self.table.encoder
        self._ordinal = {p.name: i for i, p in enumerate(self.table.probes)}
        self._layers = self.dims.layers
        self._wanted: dict[int, set[Looked]] = {}
        self._keys_wanted: set[int] = set()
        self._under_way: dict[Looked, _Averaged] = {}
        self._received: dict[Looked, Tensor] = {}
        self._keys: dict[int, Tensor] = {}
        self._tokens = np.zeros((self._layers, len(self.views.base)), np.int32)
        for probe in self._probes:
            for call in [r.signal for r in probe.records] + ([probe.edit.score] if probe.edit is not None else []):
                if call is not None:
                    self._note(probe, call)
        self.flops["encode"] += self.dims.embed(len(self.views.base))

    def _note(self, probe: BoundProbe, call: Call) -> None:
        if "received" in call.entry.needs:
            looked = self._looked(probe, call)
            self._wanted.setdefault(looked[0], set()).add(looked)
        if "keys" in call.entry.needs:
            self._keys_wanted.add(self._layer_of(probe, call))

    def _layer_of(self, probe: BoundProbe, call: Call) -> int:
        """The encoder layer that a part's `layer` means; where it names none, the last one that has run."""
        named = call.params(BEFORE).get("layer")
        if probe.layer is not None:
            return probe.layer + (named or 0)
        named = -1 if named is None or "received" not in call.entry.needs and named == 0 else named
        return int(named) % self._layers

    def _looked(self, probe: BoundProbe, call: Call) -> Looked:
        params = call.params(BEFORE)
        return self._layer_of(probe, call), str(params["queries"]), params["form"]

    def at(self, site: Site, layer: int | None = None) -> list[BoundProbe]:
        """The probes at a site, in the recipe's order."""
        return [p for p in self._probes if p.site is site and p.layer == layer]

    def timed(self) -> AbstractContextManager[None]:
        """Time spent inside belongs to the probes."""
        return self.watch.section("probe")

    # -- one layer ----------------------------------------------------------------------------------------------

    def enter_layer(self, layer: int, hidden: Tensor) -> Tensor | None:
        """A layer begins: ask its attention for what probes want. Returns the mask of the views as they are now."""
        self._tokens[layer] = self.state.counts
        self._attended = self._through_mlp = hidden.shape[1]
        requests: list[RowRequest | KeyRequest] = []
        for looked in sorted(self._wanted.get(layer, ())):
            rows, weight = self._query_rows(looked[1], hidden.device)
            self._under_way[looked] = averaged = _Averaged(weight)
            requests.append(RowRequest(rows, looked[2], averaged.receive))
            self.flops["probe"] += rows.shape[0] * self.dims.looked_rows(rows.shape[1], hidden.shape[1], looked[2])
        if layer in self._keys_wanted:
            requests.append(KeyRequest(lambda keys: self._keep_keys(layer, keys)))
        if requests:
            ask(self.backbone.encoder_layers[layer].attention, requests, self.timed)
        return self.state.bias(self.lead, hidden.dtype)

    def _query_rows(self, queries: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """`(rows, weight)`, both `(view, query)`: the rows that look, and weights that sum to 1 over real ones."""
        first = self.lead if queries == "visual" else 0
        last = [self.lead if queries == "cls" else self.lead + n for n in self.state.counts]
        width = max(1, max(last) - first)
        rows = first + torch.arange(width, device=device).expand(len(last), -1)
        end = torch.tensor(last, device=device)[:, None]
        weight = (rows < end) / (end - first).clamp(min=1)
        return rows.clamp(max=self.lead + self.state.width - 1), weight.float()

    def _keep_keys(self, layer: int, keys: Tensor) -> None:
        """Keys `(view, head, row, size)` by number: `(T, head, size)`, NaN for tokens that are gone."""
        self._keys[layer] = self._by_number(keys.transpose(1, 2))

    def _by_number(self, rows: Tensor) -> Tensor:
        """`(view, row, ...)` of the tokens that are there, to `(T, ...)`."""
        out = rows.new_full((self.state.view.shape[0], *rows.shape[2:]), torch.nan)
        every = tuple(range(len(self.views.base)))
        out[self.state.numbers(every)] = self.state.rows(rows, every, self.lead)
        return out

    def leave_attention(self, layer: int) -> None:
        """A layer's attention has run: keep what scores need, record what was asked."""
        if layer not in self._wanted and layer not in self._keys_wanted:
            return
        with self.timed():
            forget(self.backbone.encoder_layers[layer].attention)
            for looked in sorted(self._wanted.get(layer, ())):
                averaged = self._under_way.pop(looked)
                if averaged.total is not None:
                    self._received[looked] = self._by_number(averaged.total.transpose(1, 2))
            for probe in self.at(Site.ENCODER_LAYER_ATTENTION, layer):
                for record in probe.records:
                    received = self._received[self._looked(probe, record.signal)]
                    self._record(record.name, record.signal, layer, {"received": received.T})

    def release(self) -> None:
        """Forget what an interrupted run left on the attention modules."""
        for layer in {*self._wanted, *self._keys_wanted}:
            forget(self.backbone.encoder_layers[layer].attention)

    def cut_between(self, layer: int, hidden: Tensor) -> Tensor:
        """Between attention and MLP: the shortened residual stream, kept for `leave_layer`."""
        self._long = hidden.shape[1]
        short = self.act(Site.ENCODER_LAYER_AFTER_ATTENTION, layer, hidden, self.lead)
        self._between = None if short is hidden else short
        self._through_mlp = short.shape[1]
        return short

    def swallow_mlp(self, output: Tensor) -> Tensor:
        """The MLP ran on the short views: keep its output, report zeros of the length that the layer expects."""
        if self._between is None:
            return output
        self._mlp_out = output
        return output.new_zeros(()).expand(output.shape[0], self._long, output.shape[2])

    def leave_layer(self, hidden: Tensor) -> Tensor:
        """A layer ends: its output on the views as they are now."""
        self.flops["encode"] += self.dims.layer(hidden.shape[0], self._attended, self._through_mlp)
        if self._between is None or self._mlp_out is None:
            return hidden
        hidden = self._between + self._mlp_out
        self._between = self._mlp_out = None
        return hidden

    # -- probes on features -------------------------------------------------------------------------------------

    def act(self, site: Site, layer: int | None, hidden: Tensor, lead: int = 0) -> Tensor:
        """The probes at a site, one after the other, on features `(view, row, width)`."""
        expected = lead + self.state.width
        if hidden.shape[:2] != (len(self.views.base), expected):
            raise ProbeError(
                f"`{site}` of {self.backbone.facts.name}: features are {tuple(hidden.shape)}, but "
                f"{len(self.views.base)} views of {expected} rows were expected"
            )
        for probe in self.at(site, layer):
            if probe.edit is None:
                for record in probe.records:
                    self._record(record.name, record.signal, layer, {"hidden": self._by_number(hidden[:, lead:])})
                continue
            groups, plans = self._decide(probe, hidden, lead)
            if any(plan is not None for plan in plans):
                raster = probe.edit.do.params(BEFORE).get("order", "raster") == "raster"
                self.state, hidden = shorten(self.state, hidden, groups, plans, lead=lead, raster=raster)
        return hidden

    def _record(self, name: str, call: Call, layer: int | None, given: dict[str, Any]) -> None:
        patches = self.state.holder.shape[0]
        given |= {"patch_view": self.state.view[:patches], "alive": self.state.fate[:patches] == 1}
        given = {k: v[..., :patches] if k == "received" else v[:patches] for k, v in given.items()}
        value = call.entry.function(*(given[n] for n in call.entry.needs), **call.params(BEFORE))
        value = value.float().cpu().numpy()
        if layer is None:
            self.arrays[name] = value
            return
        array = self.arrays.setdefault(name, np.full((self._layers, *value.shape), np.nan, np.float32))
        array[layer] = value

    def _groups(self, probe: BoundProbe) -> list[Group]:
        """The views that a probe decides on together; those with nothing left are left out."""
        wanted = [
            v
            for v, base in enumerate(self.views.base)
            if self.state.counts[v] and (probe.views == "all" or base == (probe.views == "base"))
        ]
        if probe.group == "view":
            return [(v,) for v in wanted]
        pictures = self.views.picture.tolist()
        return [tuple(v for v in wanted if pictures[v] == p) for p in dict.fromkeys(pictures[v] for v in wanted)]

    def _decide(self, probe: BoundProbe, hidden: Tensor, lead: int) -> tuple[list[Group], list[Plan | None]]:
        groups = self._groups(probe)
        return groups, [self._plan(probe, group, hidden, lead) for group in groups]

    def _plan(self, probe: BoundProbe, group: Group, hidden: Tensor, lead: int) -> Plan | None:
        """One group's plan; None when everything stays as it is."""
        edit = probe.edit
        assert edit is not None
        given = self._given(probe, group, hidden, lead)
        n = int(given["n"])
        select = edit.select.params(BEFORE)
        if "keep" in select:
            original = len(group) * self.views.box.shape[1]
            given["count"] = token_count(select["keep"], original, select.get("round", "floor"))
            if given["count"] >= n:
                return None
        if edit.score is not None:
            score = self._call(edit.score, given, probe).to(hidden.device)
            given["similarity" if score.dim() == 2 else "score"] = score
            if "flops" in edit.score.entry.meta:
                self.flops["probe"] += edit.score.entry.meta["flops"](n, hidden.shape[-1])
        chosen = self._call(edit.select, given, probe)
        choice = chosen if isinstance(chosen, Choice) else Choice(chosen)
        given |= {"choice": choice, "kept": choice.kept.to(hidden.device), "into": choice.into}
        plan = self._call(edit.do, given, probe)
        same = plan.kept.shape[0] == n and not plan.appended and plan.values is None
        ordered = edit.do.params(BEFORE).get("order", "raster") == "raster"
        return None if same and ordered else plan

    def _call(self, call: Call, given: dict[str, Any], probe: BoundProbe) -> Any:
        """A part of the vocabulary with what it names."""
        for name in call.entry.needs:
            if name not in given:
                given[name] = self._special(name, call, given, probe)
        return call.entry.function(*(given[n] for n in call.entry.needs), **call.params(BEFORE))

    def _special(self, name: str, call: Call, given: dict[str, Any], probe: BoundProbe) -> Any:
        """What only some parts need, made when one asks."""
        numbers = given["numbers"]
        match name:
            case "received":
                return self._taken(self._received[self._looked(probe, call)], numbers).T
            case "keys":
                return self._taken(self._keys[self._layer_of(probe, call)], numbers).transpose(0, 1)
            case "text":
                return self.text()
            case "patch":
                return self.backbone.text_space(given["hidden"])
        raise ProbeError(
            f"probe `{probe.name}`: the {call.entry.kind} `{call.entry.name}` needs `{name}`, which does not exist at "
            f"`{probe.site}`"
        )

    @staticmethod
    def _taken(by_number: Tensor, numbers: Tensor) -> Tensor:
        """Rows of `(T, ...)` for these numbers; NaN for tokens that came later."""
        known = numbers < by_number.shape[0]
        rows = by_number[numbers.where(known, 0)]
        return rows.where(known.view(-1, *[1] * (rows.dim() - 1)), torch.nan)

    def _given(self, probe: BoundProbe, group: Group, hidden: Tensor, lead: int) -> dict[str, Any]:
        numbers = self.state.numbers(group)
        patches = self.views.box.shape[1]
        box = self.views.box.to(hidden.device).flatten(0, 1)
        return {
            "numbers": numbers,
            "n": numbers.shape[0],
            "hidden": self.state.rows(hidden, group, lead),
            "size": self.state.size[numbers],
            "view": self.state.view[numbers],
            "box": box[numbers.clamp(max=len(self.views.base) * patches - 1)],
            "generator": self._generator(probe, group[0]),
        }

    def _generator(self, probe: BoundProbe, view: int) -> torch.Generator:
        generator = torch.Generator()
        seed = 0
        for part in (self.seed, self._ordinal[probe.name], (probe.layer or 0) + 1, view):
            # the mixing of the language model's probes: the same address gives the same numbers on every machine
            seed = (seed * 6364136223846793005 + part + 1442695040888963407) % 2**63
        generator.manual_seed(seed)
        return generator


def tokens_recorded(state: EncoderPass) -> dict[str, np.ndarray]:
    """The arrays that every run with probes in the encoder has: tokens per layer and view, what patches see."""
    box, views = state.views.box.flatten(0, 1), state.views.box.shape[:2]
    return {
        "encoder_tokens": state._tokens,
        "patch_box": box.numpy(),
        "patch_view": np.repeat(np.arange(views[0]), views[1]).astype(np.int16),
    }


def sequence_of_groups(groups: Sequence[Group]) -> tuple[int, ...]:
    """The views of all groups, flat."""
    return tuple(v for group in groups for v in group)
