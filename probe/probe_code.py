"""Probes that are arbitrary code: a function that receives the nnsight envoy tree at the steps it names.

    @code_probe(steps="first")
    def mid_layer(model, clock):
        return model.layers[3].output.norm(dim=-1).save()

The forward of such a step runs inside `nnsight`'s trace; all other steps pay nothing. Declarative probes fire in the
same forward, so code sees the sequence as they left it, and what code changes is what they see further on. A returned
(saved) tensor is recorded under the function's name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from probe.backbones.base import Backbone
from probe.site import Clock

CodeFunction = Callable[[Any, Clock], "Tensor | None"]


@dataclass(frozen=True)
class CodeProbe:
    """A function over the envoy tree of the decoder (`model.layers[i].output`, ...) and when it fires."""

    name: str
    function: CodeFunction
    fires: Callable[[Clock], bool]


def run_traced(
    backbone: Backbone, inputs: dict[str, Any], probes: Sequence[CodeProbe], clock: Clock
) -> tuple[Tensor, dict[str, Tensor]]:
    """One forward of the decoder inside an nnsight trace: final hidden states, and what the probes saved."""
    from nnsight import NNsight

    model = NNsight(backbone.lm)
    results: list[Any] = []
    with model.trace(**inputs):
        for probe in probes:
            results.append(probe.function(model, clock))
        hidden = model.output.last_hidden_state.save()
    return hidden, {p.name: r for p, r in zip(probes, results, strict=True) if r is not None}
