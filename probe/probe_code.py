"""Probes that are arbitrary code: a function that receives the nnsight envoy tree at the steps it names.

    @code_probe(steps="first")
    def mid_layer(model, clock):
        return model.layers[3].output.norm(dim=-1).save()

The forward of such a step runs inside `nnsight`'s trace; all other steps pay nothing. Declarative probes fire in the
same forward, so code sees the sequence as they left it, and what code changes is what they see further on. A returned
(saved) tensor is recorded under the function's name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probe.backbones.base import Backbone
from probe.errors import ProbeError
from probe.recipe_at import Steps
from probe.site import Clock
from probe.trace_schema import Variable

CODE_PROBES: dict[str, CodeProbe] = {}
"""Every function that `code_probe` has decorated in this process, by name."""

CodeFunction = Callable[..., "Tensor | None"]
"""`f(model, clock)`, or `f(model, clock, rows)` with the `CodeRows` of the pass."""


@dataclass(frozen=True)
class CodeRows:
    """What the rows are that enter the first layer: both `(batch, row)`, under guidance the batch twice.

    `visual` int64, the number of the original visual token that a row holds, -1 for all others; `role` int8, a
    `probe.site.Role`: system, visual, newline, question, answer, or padding of a batch.
    """

    visual: Tensor
    role: Tensor


@dataclass(frozen=True)
class CodeProbe:
    """A function over the envoy tree of the decoder (`model.layers[i].output`, ...) and when it fires."""

    name: str
    function: CodeFunction
    fires: Callable[[Clock], bool]
    dims: tuple[str, ...] = ()

    @property
    def variable(self) -> Variable:
        """How what it returns is kept in a trace: `(step, *dims)`."""
        said = (self.function.__doc__ or "returned by a probe in code").strip().split("\n")[0]
        return Variable(self.name, ("step", *self.dims), "1", said, probe=self.name)

    def __call__(self, model: Any, clock: Clock, rows: CodeRows | None) -> Any:
        """What the function returns; it is given the rows if it takes a third parameter."""
        wants = len(inspect.signature(self.function).parameters) > 2
        return self.function(model, clock, rows) if wants else self.function(model, clock)

    def per_sample(self, value: Any, batch: int) -> Tensor:
        """What the function returned, as `(batch, *dims)`: a value without a batch axis is every sample's."""
        value = torch.as_tensor(value)
        if value.dim() == len(self.dims):
            return value.expand(batch, *value.shape)
        if value.dim() == len(self.dims) + 1 and value.shape[0] >= batch:
            return value[:batch]
        raise ProbeError(
            f"code probe `{self.name}` returned a tensor of shape {tuple(value.shape)}; its axes are {self.dims}, so "
            f"{len(self.dims)} dimensions, or one more that counts the {batch} samples of the batch, would be right"
        )


def code_probe(
    *, steps: Any = "all", dims: tuple[str, ...] = (), name: str | None = None
) -> Callable[[CodeFunction], CodeProbe]:
    """Make a probe of a function, for `--plugin` or `probe.run(code_probes=[...])`.

    `steps` as in a recipe: `first`, 3, `{"from": "50%"}`, ... `dims` names the axes of the tensor that it returns
    (none: one number per step).
    """
    when = Steps.parse(steps)

    def register(function: CodeFunction) -> CodeProbe:
        key = name or function.__name__
        CODE_PROBES[key] = CodeProbe(key, function, when.fires, dims)
        return CODE_PROBES[key]

    return register


def run_traced(
    backbone: Backbone,
    inputs: dict[str, Any],
    probes: Sequence[CodeProbe],
    clock: Clock,
    rows: CodeRows | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One forward of the decoder inside an nnsight trace: final hidden states, and what the probes saved."""
    from nnsight import NNsight

    model = NNsight(backbone.lm)
    results: dict[str, Any] = {}
    with model.trace() as tracer:
        with tracer.invoke(**inputs):
            hidden = model.output.last_hidden_state.save()
        # one invocation each over the same forward: code may look at layers in any order, whatever the others do
        for probe in probes:
            with tracer.invoke():
                results[probe.name] = probe(model, clock, rows)
    return hidden, {name: value for name, value in results.items() if value is not None}
