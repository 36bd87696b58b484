"""What scores, selections and operations are given inside the image encoder: the tokens of one group of views.

The names are those of `probe.scores`; what a language model has and an encoder has not is refused by `compile_encoder`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from probe.backbones.base import Backbone
from probe.compile import BoundProbe
from probe.encoder_looking import EncoderLooking
from probe.encoder_state import Group, ViewState
from probe.errors import ProbeError
from probe.site import Plan


@dataclass
class TokensOfViews:
    """The n tokens of some views, one view after the other: a `Source` of `probe.inputs`.

    An encoder's class token is none of them and always stays; with `with_class` it is their first one, for operations
    that protect it by name (ToMe's halves count it).
    """

    probe: BoundProbe
    group: Group
    hidden: Tensor
    lead: int
    state: ViewState
    looking: EncoderLooking
    backbone: Backbone
    text: Callable[[], Tensor]
    generator: torch.Generator
    with_class: bool = False
    flops: int = 0
    doubts: Tensor | int = 0

    def __post_init__(self) -> None:
        if self.with_class and len(self.group) > 1:
            raise ProbeError(
                f"probe `{self.probe.name}`: every view has a class token of its own, so `protect: [cls]` goes with "
                "`group: view`"
            )
        self.numbers = self.state.numbers(self.group)
        if self.with_class:  # a number that no patch has: what is known by number is not known of it
            self.numbers = torch.cat([self.numbers.new_full((1,), self.state.view.shape[0]), self.numbers])

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.hidden.device

    def spend(self, flops: int) -> None:
        """Note the FLOPs of matrix products that the decision cost."""
        self.flops += flops

    def doubt(self, score: Tensor) -> None:
        """Count a score's NaN, on its device."""
        self.doubts = self.doubts + score.isnan().sum()

    def give(self, name: str, params: Mapping[str, Any]) -> Any:
        """The input of this name; `params` say which attention or keys are meant."""
        match name:
            case "n":
                return self.numbers.shape[0]
            case "original":
                return len(self.group) * self.state.views.box.shape[1] + self.with_class
            case "progress":
                return 0.0
            case "generator":
                return self.generator
            case "layer_index":
                return self.probe.layer
            case "columns":
                return math.isqrt(self.state.views.box.shape[1])
            case "hidden":
                rows = self.state.rows(self.hidden, self.group, self.lead)
                return torch.cat([self.hidden[self.group[0], :1], rows]) if self.with_class else rows
            case "received":
                return self.looking.received(self.probe, params, self.numbers)
            case "n_queries":
                return self.looking.n_queries(self.probe, params, self.group)
            case "keys":
                return self.looking.keys(self.probe, params, self.numbers)
            case "text_features":
                return self.text()
            case "image_features":
                self.spend(self.backbone.text_space_flops(self.numbers.shape[0]))
                return self.backbone.text_space(self.give("hidden", params))
            case "row":
                return torch.arange(self.numbers.shape[0], device=self.device)
            case "newline":
                return torch.zeros(self.numbers.shape[0], dtype=torch.bool, device=self.device)
            case "cls":
                return torch.arange(self.numbers.shape[0], device=self.device) < int(self.with_class)
            case "size" | "view" | "box":
                return self._of_numbers(name)
        raise ProbeError(f"probe `{self.probe.name}`: `{name}` does not exist at `{self.probe.site}`")

    def _of_numbers(self, name: str) -> Tensor:
        """`size (n,)`, `view (n,)` within the picture (0: its base view), or `box (n, 4)`, NaN if nothing is seen."""
        own = self.numbers.clamp(max=self.state.view.shape[0] - 1)
        if name == "size":
            return torch.where(self.numbers == own, self.state.size[own], 1.0)
        views = self.state.views
        if name == "view":
            first = views.picture.tolist().index(int(views.picture[self.group[0]]))
            return self.state.view[own] - first
        box = views.box.to(self.device).flatten(0, 1)
        seen = box[own.clamp(max=box.shape[0] - 1)]
        return seen.where((self.numbers < box.shape[0])[:, None], torch.nan)

    def plan_of_patches(self, plan: Plan) -> Plan:
        """The plan as it concerns patches alone: without the class token, which stays where it is."""
        if not self.with_class:
            return plan
        patch = plan.kept > 0
        if int(patch.sum()) != plan.kept.shape[0] - 1:
            raise ProbeError(
                f"probe `{self.probe.name}`: the class token was to be protected, but is not among the kept"
            )
        behind = torch.cat([patch, patch.new_ones(plan.appended)])
        place = behind.cumsum(0) - 1
        into = plan.into
        if into is not None:
            into = torch.where(into >= 0, place[into.clamp(min=0)], -1)[1:]
        return replace(
            plan,
            kept=plan.kept[patch] - 1,
            into=into,
            values=None if plan.values is None else plan.values[behind],
            size=None if plan.size is None else plan.size[behind],
        )
