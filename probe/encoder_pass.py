"""One run of the image encoder under probes: what they are given, what they decide, what is recorded.

Hooks (in `encoder`) call in here. A probe decides view by view, or over all views of a picture together; its score, its
selection and its operation are given what they name, as in the language model.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probe.backbones.base import Backbone, Views
from probe.compile import BoundProbe, Edit, ProbeTable
from probe.cost import EncoderDims
from probe.decide import decide
from probe.encoder_looking import BEFORE, EncoderLooking
from probe.encoder_source import TokensOfViews
from probe.encoder_state import Group, ViewState, shorten
from probe.errors import ProbeError
from probe.inputs import asked
from probe.site import Fate, Plan, Site
from probe.timing import Stopwatch


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
    doubts: dict[str, Tensor | int] = field(default_factory=dict)
    """How many values of its scores were NaN, by probe."""

    def __post_init__(self) -> None:
        views, patches = self.views.box.shape[:2]
        self.looking = EncoderLooking(self.backbone, self.dims, self.watch, self.lead)
        self._ordinal = {p.name: i for i, p in enumerate(self.table.probes)}
        self._between: Tensor | None = None
        self._mlp_out: Tensor | None = None
        self._attended = self._through_mlp = 0
        self.arrays |= {
            "visual_original": np.array(sum(self.views.tokens)),
            "encoder_tokens": np.zeros((self.dims.layers, views), np.int32),
            "patch_box": self.views.box.flatten(0, 1).float().cpu().numpy(),
            "patch_view": np.repeat(np.arange(views), patches).astype(np.int16),
        }
        for probe in self.table.encoder:
            for record in probe.records:
                for name in record.signal.entry.needs:
                    self.looking.want(probe, name, record.signal.params(BEFORE))
            for name, params in () if probe.edit is None else asked(probe.edit, BEFORE):
                self.looking.want(probe, name, params)
        self.flops["encode"] += self.dims.embed(views)

    def at(self, site: Site, layer: int | None = None) -> list[BoundProbe]:
        """The probes at a site, in the recipe's order."""
        return [p for p in self.table.encoder if p.site is site and p.layer == layer]

    def timed(self) -> AbstractContextManager[None]:
        """Time spent inside belongs to the probes."""
        return self.watch.section("probe")

    def release(self) -> None:
        """Leave the modules as they were, also when the run was interrupted."""
        self.looking.release()

    # -- one layer ----------------------------------------------------------------------------------------------

    def enter_layer(self, layer: int, hidden: Tensor) -> Tensor | None:
        """A layer begins: ask its attention for what probes want. Returns the mask of the views as they are now."""
        self.arrays["encoder_tokens"][layer] = self.state.counts
        self._attended = self._through_mlp = hidden.shape[1]
        self.flops["probe"] += self.looking.ask(layer, self.state, hidden.shape[1], hidden.device)
        return self.state.bias(self.lead, hidden.dtype)

    def leave_attention(self, layer: int) -> None:
        """A layer's attention has run: keep what scores need, record what was asked."""
        self.looking.reduce(layer, self.state)
        for probe in self.at(Site.ENCODER_LAYER_ATTENTION, layer):
            self._record(probe, layer, None)

    def cut_between(self, layer: int, hidden: Tensor) -> Tensor:
        """Between attention and MLP: the shortened residual stream, kept for `leave_layer`."""
        short = self.act(Site.ENCODER_LAYER_AFTER_ATTENTION, layer, hidden, self.lead)
        self._between = None if short is hidden else short
        self._through_mlp = short.shape[1]
        return short

    def swallow_mlp(self, output: Tensor) -> Tensor:
        """The MLP ran on the short views: keep its output, report zeros of the length that the layer expects."""
        if self._between is None:
            return output
        self._mlp_out = output
        return output.new_zeros(()).expand(output.shape[0], self._attended, output.shape[2])

    def leave_layer(self, hidden: Tensor) -> Tensor:
        """A layer ends: its output on the views as they are now."""
        self.flops["encode"] += self.dims.layer(hidden.shape[0], self._attended, self._through_mlp)
        if self._between is None or self._mlp_out is None:
            return hidden
        hidden = self._between + self._mlp_out
        self._between = self._mlp_out = None
        return hidden

    # -- probes on features -------------------------------------------------------------------------------------

    def leave_encoder(self, hidden: Tensor) -> Tensor:
        """What the projector is given: features of patches alone, `(view, row, width)`, after `encoder.output`."""
        hidden = self.act(Site.ENCODER_OUTPUT, None, hidden, 0)
        self.flops["encode"] += self.dims.project(hidden.shape[0] * hidden.shape[1])
        return hidden

    def act(self, site: Site, layer: int | None, hidden: Tensor, lead: int) -> Tensor:
        """The probes at a site, one after the other, on features `(view, row, width)`."""
        probes, expected = self.at(site, layer), (len(self.views.base), lead + self.state.width)
        if probes and hidden.shape[:2] != expected:
            raise ProbeError(
                f"`{site}` of {self.backbone.facts.name}: features are {tuple(hidden.shape)}, not {expected[0]} views "
                f"of {expected[1]} rows"
            )
        for probe in probes:
            if probe.edit is None:
                self._record(probe, layer, hidden[:, lead:])
                continue
            groups = self._groups(probe)
            plans = [self._plan(probe, probe.edit, group, hidden, lead) for group in groups]
            if any(plan is not None for plan in plans):
                self.state, hidden = shorten(self.state, hidden, groups, plans, lead=lead)
                if probe.edit.do.params(BEFORE).get("positions") == "compact":
                    self.state = replace(self.state, compact=True)
        return hidden

    def _record(self, probe: BoundProbe, layer: int | None, hidden: Tensor | None) -> None:
        """Signals over the patches of all views, `(views * patches, ...)`; a patch that is gone is NaN."""
        patches = self.state.holder.shape[0]
        numbers = torch.arange(patches, device=self.state.holder.device)
        given: dict[str, Any] = {
            "patch_view": self.state.view[:patches],
            "alive": self.state.fate[:patches] == int(Fate.KEPT),
        }
        if hidden is not None:
            given["hidden"] = self.state.by_number(hidden, 0)[:patches]
        for record in probe.records:
            entry, params = record.signal.entry, record.signal.params(BEFORE)
            if "received" in entry.needs:
                given["received"] = self.looking.received(probe, params, numbers)
            value = entry.function(*(given[name] for name in entry.needs), **params).float().cpu().numpy()
            if layer is None:
                self.arrays[record.name] = value
            else:
                nothing = np.full((self.dims.layers, *value.shape), np.nan, np.float32)
                self.arrays.setdefault(record.name, nothing)[layer] = value

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

    def _plan(self, probe: BoundProbe, edit: Edit, group: Group, hidden: Tensor, lead: int) -> Plan | None:
        tokens = TokensOfViews(
            probe=probe,
            group=group,
            hidden=hidden,
            lead=lead,
            state=self.state,
            looking=self.looking,
            backbone=self.backbone,
            text=self.text,
            generator=self._generator(probe, group[0]),
            with_class=bool(lead) and "cls" in edit.do.params(BEFORE).get("protect", ()),
        )
        plan = decide(edit, tokens, BEFORE)
        self.flops["probe"] += tokens.flops
        self.doubts[probe.name] = tokens.doubts + self.doubts.get(probe.name, 0)
        return None if plan is None else tokens.plan_of_patches(plan)

    def _generator(self, probe: BoundProbe, view: int) -> torch.Generator:
        """Random numbers of one decision: by sample, probe, layer and (first) view."""
        generator = torch.Generator()
        seed = 0
        for part in (self.seed, self._ordinal[probe.name], (probe.layer or 0) + 1, view):
            # the mixing of the language model's probes: the same address gives the same numbers on every machine
            seed = (seed * 6364136223846793005 + part + 1442695040888963407) % 2**63
        generator.manual_seed(seed)
        return generator
