"""From a generation's events to the arrays of a trace, sample by sample.

Everything is gathered on the device while the loop runs and brought over once, at the end of the batch. The `step`
axis of a trace counts the passes that a sample really took part in; `nominal_step` says where each stood in the
schedule (they differ when a block ends early).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from probe import vocabulary as _registered  # noqa: F401  (`confidence`, which every trace has, must be known)
from probe.compile import Call, ProbeTable
from probe.finite import NONFINITE, nonfinite
from probe.looking import Recorder
from probe.loop import Step
from probe.registry import Entry, signals
from probe.site import SEGMENTS, Clock, Fate, Role, Site
from probe.timing import PHASES
from probe.trace_schema import Variable

_FATES = {fate.name.lower(): int(fate) for fate in Fate}
_ROLES = {role.name.lower(): int(role) for role in (Role.VISUAL, Role.NEWLINE)}

ALWAYS: tuple[Variable, ...] = (
    Variable(
        "token", ("step", "position"), "1",
        "token id of each answer slot after the step",
        "x_i after the step", dtype="int32",
    ),
    Variable(
        "commit_step", ("position",), "1",
        "step at which the slot was last written (-1: never)",
        "max over steps t that wrote slot i of t", dtype="int32",
    ),
    Variable(
        "nominal_step", ("step",), "1",
        "where the step stands in the schedule",
        "block * steps / blocks + step within the block", dtype="int32",
    ),
    Variable(
        "block", ("step",), "1",
        "block of the answer that was decoded",
        "floor(first slot being decoded / block_length)", dtype="int32",
    ),
    Variable(
        "visual_tokens", ("step", "layer"), "1",
        "visual tokens in the layer's attention",
        "number of j with visual_kept_j = kept", dtype="int32",
    ),
    Variable(
        "visual_kept", ("step", "layer", "visual"), "1",
        "what became of each visual token (0: the sample has none)",
        "state of token j as a key of the layer's attention", dtype="uint8", flags=_FATES,
    ),
    Variable(
        "visual_box", ("visual", "corner"), "1",
        "what the token sees: x0, y0, x1, y1 as shares of its picture",
        "(x0 / width, y0 / height, x1 / width, y1 / height)",
    ),
    Variable(
        "visual_role", ("visual",), "1",
        "image feature or row separator",
        "role of the j-th position of the visual span", dtype="int8", flags=_ROLES,
    ),
    Variable(
        "visual_view", ("visual",), "1",
        "view of the picture: 0 its base view, then its tiles",
        "number of the view that token j was cut from", dtype="int16",
    ),
    Variable(
        "seconds", ("step", "phase"), "s",
        "time by phase (encoding stands at step 0)",
        "sum of the phase's spans, each without what is nested in it", dtype="float64",
    ),
    Variable(
        "flops", ("step", "phase"), "1",
        "executed FLOPs by phase (encoding stands at step 0)",
        "2 m n k per matrix product, 2 per multiply-add of a convolution", dtype="float64",
    ),
    Variable(
        "seconds_total", (), "s",
        "wall time of the sample as recorded",
        "encoding + end - start", dtype="float64",
    ),
    Variable(
        "seconds_unrecorded", (), "s",
        "wall time of the same sample with nothing recorded (NaN: not measured)",
        "encoding + end - start, of the run without record probes", dtype="float64",
    ),
    Variable(
        "flops_total", (), "1",
        "executed FLOPs of the sample, scoring included",
        "sum over steps and phases of flops", dtype="float64",
    ),
    Variable(
        "flops_unrecorded", (), "1",
        "executed FLOPs of the same sample with nothing recorded (NaN: not measured)",
        "sum over steps and phases of flops, of the run without record probes", dtype="float64",
    ),
    Variable(
        "nonfinite", ("step",), "1",
        "values of the step that are NaN or infinite where a number was due: open slots, recorded signals",
        "number of v with v not finite", dtype="int32",
    ),
    Variable(
        "peak_memory", (), "byte",
        "most memory allocated on the device (CPU: by the process)",
        "max over the sample of bytes allocated", dtype="float64",
    ),
    Variable(
        "prompt_length", (), "1",
        "positions before the answer",
        "positions of system, visual span and question", dtype="int32",
    ),
)  # fmt: skip
"""The variables of every trace: what the loop knows anyway."""


def constant(call: Call) -> dict[str, Any]:
    """A signal's parameters, which do not depend on the step."""
    return call.params(Clock(pass_index=0, step=0, block=0, step_in_block=0, nominal_steps=1, n_blocks=1))


def recorded_variables(table: ProbeTable) -> list[Variable]:
    """The variables that a recipe's record probes add, and `confidence`."""
    out: dict[str, Variable] = {}
    for probe in table.probes:
        for record in probe.records:
            call, by_layer = record.signal, probe.site.has_layers
            out.setdefault(record.name, _variable(record.name, call.entry, constant(call), by_layer, probe.name))
    out.setdefault("confidence", _variable("confidence", signals["confidence"], {}, False, ""))
    return list(out.values())


def _variable(name: str, entry: Entry, params: Mapping[str, Any], by_layer: bool, probe: str) -> Variable:
    dims = entry.meta["dims"]
    dims = dims(params) if callable(dims) else dims
    said = ", ".join(f"{k}={v}" for k, v in params.items())
    return Variable(
        name,
        ("step", "layer", *dims) if by_layer else ("step", *dims),
        entry.meta["units"],
        entry.meta["long_name"] + (f" ({said})" if said else ""),
        entry.meta.get("formula", ""),
        probe,
    )


def segments_of(table: ProbeTable) -> dict[str, int]:
    """The query segments that the recipe records, in order: the `segment` axis."""
    wide = {v.name for v in recorded_variables(table) if "segment" in v.dims}
    records = [r for probe in table.probes for r in probe.records if r.name in wide]
    return {name: i for i, name in enumerate(dict.fromkeys(str(constant(r.signal)["queries"]) for r in records))}


def coordinates(table: ProbeTable) -> dict[str, list[str]]:
    """Names of the places of the axes of fixed length."""
    out = {"phase": list(PHASES), "corner": ["x0", "y0", "x1", "y1"]}
    segments = segments_of(table)
    if segments:
        out["segment"] = list(segments)
    if any("segment_key" in v.dims for v in recorded_variables(table)):
        out["segment_key"] = list(SEGMENTS)
    return out


@dataclass(frozen=True)
class _Kept:
    """What is kept of a step: its decision, not its logits or canvas, which are large."""

    clock: Clock
    active: list[bool]
    tokens: np.ndarray
    slots: np.ndarray
    committed: Tensor


StepLogits = dict[int, tuple[list[int], Tensor]]
"""By nominal step: the slots with fresh logits, and the logits `(batch, row, vocabulary)`."""


class Gatherer:
    """Collects one batch's steps, then hands out each sample's arrays.

    `reference` holds the unpruned run's logits, for signals that compare with it; `collected`, if given, is filled with
    this run's own.
    """

    def __init__(
        self,
        table: ProbeTable,
        layers: int,
        gen_length: int,
        *,
        reference: StepLogits | None = None,
        collected: StepLogits | None = None,
    ) -> None:
        self._reference = reference or {}
        self._collected = collected
        self.layers = layers
        self.gen_length = gen_length
        self._table = table
        self._steps: list[_Kept] = []
        self._rows: dict[str, dict[int, Tensor]] = {"confidence": {}}
        self._bad: list[Tensor] = []
        self._variables = {v.name: v for v in recorded_variables(table)}
        self._segments = segments_of(table)
        self._segment_of = {
            r.name: self._segments[str(constant(r.signal)["queries"])]
            for p in table.probes
            for r in p.records
            if "segment" in self._variables[r.name].dims
        }

    def add(self, step: Step) -> None:
        """Take what a step decided; reduce its logits now, keep none of them."""
        i = len(self._steps)
        self._rows["confidence"][i] = torch.where(step.eligible, step.confidence, torch.nan)
        bad = (step.eligible & ~step.confidence.isfinite()).sum(1)
        if self._collected is not None:
            self._collected[step.clock.step] = (step.slots, step.logits)
        for probe in self._table.at(step.clock):
            for record in probe.records if probe.site is Site.LOGITS else ():
                value = self._signal(record.signal, step)
                if value is not None:
                    self._rows.setdefault(record.name, {})[i] = torch.where(step.eligible, value.double(), torch.nan)
                    bad += (step.eligible & value.isinf()).sum(1)
        self._bad.append(bad)
        self._steps.append(_Kept(step.clock, step.active, step.tokens, np.array(step.slots), step.committed))

    def _signal(self, call: Call, step: Step) -> Tensor | None:
        """`(batch, row)` of one signal; NaN in rows that a comparison has no counterpart for."""
        entry, params = call.entry, call.params(step.clock)
        if "reference" not in entry.needs:
            given = {"logits": step.logits, "confidence": step.confidence}
            return cast(Tensor, entry.function(*(given[n] for n in entry.needs), **params))
        if step.clock.step not in self._reference:
            return None
        slots, logits = self._reference[step.clock.step]
        common = [s for s in step.slots if s in slots]
        if not common:
            return None
        here = torch.tensor([step.slots.index(s) for s in common], device=logits.device)
        there = torch.tensor([slots.index(s) for s in common], device=logits.device)
        given = {
            "logits": step.logits[:, here],
            "confidence": step.confidence[:, here],
            "reference": logits[:, there],
        }
        value = entry.function(*(given[n] for n in entry.needs), **params)
        rows = torch.full_like(step.confidence, torch.nan)
        return rows.index_copy_(1, here, value.to(rows.dtype))

    def passes(self, sample: int) -> list[int]:
        """The pass indices in which a sample took part."""
        return [s.clock.pass_index for s in self._steps if s.active[sample]]

    def by_sample(self, sample: int) -> dict[str, np.ndarray]:
        """Arrays of what each step decided: token, confidence, commit_step, nominal_step, block, logit signals."""
        took_part = [i for i, step in enumerate(self._steps) if step.active[sample]]
        n, steps = len(took_part), self._steps
        out: dict[str, np.ndarray] = {
            "token": np.array([steps[i].tokens[sample] for i in took_part], np.int32).reshape(n, self.gen_length),
            "nominal_step": np.array([steps[i].clock.step for i in took_part], np.int32),
            "block": np.array([steps[i].clock.block for i in took_part], np.int32),
            "nonfinite": self._bad_slots(sample, took_part),
        }
        for name, rows in self._rows.items():
            out[name] = np.full((n, self.gen_length), np.nan, np.float32)
            for place, i in enumerate(took_part):
                if i in rows:
                    self._place(out[name][place], steps[i].slots, rows[i][sample].float().cpu().numpy())
        commit_step = np.full(self.gen_length, -1, np.int32)
        for place, i in enumerate(took_part):
            slots = steps[i].slots[steps[i].committed[sample].cpu().numpy()]
            commit_step[slots[slots >= 0]] = place
        out["commit_step"] = commit_step
        return out

    def _bad_slots(self, sample: int, took_part: Sequence[int]) -> np.ndarray:
        """`(step,)` int32: open slots whose logits gave no probability, and infinite signals of them."""
        if not took_part:
            return np.zeros(0, np.int32)
        return torch.stack(self._bad)[list(took_part), sample].int().cpu().numpy()

    @staticmethod
    def _place(target: np.ndarray, slots: np.ndarray, values: np.ndarray) -> None:
        answer = slots >= 0
        target[slots[answer]] = values[answer]

    def recorded(self, recorder: Recorder, sample: int, n_visual: int) -> dict[str, np.ndarray]:
        """Arrays of what probes recorded inside the passes."""
        place = {p: i for i, p in enumerate(self.passes(sample))}
        out: dict[str, np.ndarray] = {}
        bad = np.zeros(len(place), np.int32)
        for name, values in recorder.values.items():
            items = [(k, v[sample]) for k, v in values.items() if k[0] in place]
            if not items:
                continue
            stacked = torch.stack([v for _, v in items]).float().cpu().numpy()
            if name.startswith(NONFINITE):  # counts that an edit noted of its scores
                np.add.at(bad, [place[k[0]] for k, _ in items], stacked.reshape(len(items), -1).sum(1).astype(np.int32))
                continue
            wrong = nonfinite(stacked, self._variables[name].dims if name in self._variables else ())
            np.add.at(bad, [place[k[0]] for k, _ in items], wrong)
            if name not in self._variables:
                out[name] = self._free(stacked, [place[k[0]] for k, _ in items], len(place))
                continue
            dims = self._variables[name].dims
            if dims[-1] == "visual":
                stacked = stacked[..., :n_visual]
            if "segment" in dims:
                wide = np.full((*stacked.shape[:-1], len(self._segments), stacked.shape[-1]), np.nan, np.float32)
                wide[..., self._segment_of[name], :] = stacked
                stacked = wide
            by_layer = self._variables[name].dims[1:2] == ("layer",)
            axes = (len(place), self.layers) if by_layer else (len(place),)
            array = np.full((*axes, *stacked.shape[1:]), np.nan, np.float32)
            for ((p, layer), _), value in zip(items, stacked, strict=True):
                array[(place[p], layer) if by_layer else place[p]] = value
            out[name] = array
        if bad.any():
            out["nonfinite"] = bad + self._bad_slots(sample, [i for i, s in enumerate(self._steps) if s.active[sample]])
        return out

    @staticmethod
    def _free(values: np.ndarray, places: Sequence[int], steps: int) -> np.ndarray:
        array = np.full((steps, *values.shape[1:]), np.nan, np.float32)
        array[list(places)] = values
        return array
