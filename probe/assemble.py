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
from probe.site import SEGMENTS, Clock, Fate, Phase, Role, Site
from probe.timing import PHASES
from probe.trace_schema import Variable

_FATES = {fate.name.lower(): int(fate) for fate in Fate}
_PASSES = {phase.value: i for i, phase in enumerate(Phase, 1)}
_ON_CACHE = {"none": 0, "columns": 1, "refresh": 2}
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
        "phase_of_pass", ("step",), "1",
        "what the pass was for: the prompt alone or everything for a cache, or denoising",
        "phase of the clock", dtype="uint8", flags=_PASSES,
    ),
    Variable(
        "rows_computed", ("step",), "1",
        "rows that the pass computed (the others were read from stored keys and values, or absent)",
        "rows of the first layer's queries", dtype="int32",
    ),
    Variable(
        "recomputed", ("step", "position"), "1",
        "whether the pass computed the slot's row",
        "1 if the row of slot i was a query of the pass (of its first layer, where layers choose)", dtype="uint8",
    ),
    Variable(
        "removal_on_cache", ("step",), "1",
        "how stored features follow a removal for good: their columns are cut, or the next pass computes everything",
        "option on_cache of the removal; columns where the cache cannot be refreshed", dtype="uint8", flags=_ON_CACHE,
    ),
    Variable(
        "slot_place", ("step", "position"), "1",
        "where the slot stands in the answer after the step (-1: not there)",
        "number of slots before it", dtype="int32",
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
        "what the token sees: x0, y0, x1, y1 as shares of the stored picture",
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
        "values of the step that are NaN or infinite where a number was due: open slots, signals, scores of tokens",
        "number of v with v not finite", dtype="int32",
    ),
    Variable(
        "peak_memory", (), "byte",
        "most memory allocated on the device (CPU: by the process)",
        "max over the sample of bytes allocated", dtype="float64",
    ),
    Variable(
        "unreached", (), "1",
        "interventions whose steps the decoding did not reach (it ended early, or they lie behind its last step)",
        "number of interventions with no step among those that ran", dtype="int32",
    ),
    Variable(
        "prompt_length", (), "1",
        "positions before the answer",
        "positions of system, visual span and question", dtype="int32",
    ),
    Variable(
        "visual_original", (), "1",
        "visual tokens that the sample would have without pruning: what retention is a share of",
        "tokens of the visual span of the unpruned sequence", dtype="int32",
    ),
)  # fmt: skip
"""The variables of every trace: what the loop knows anyway."""


ENCODER: tuple[Variable, ...] = (
    Variable(
        "encoder_tokens", ("encoder_layer", "view"), "1",
        "tokens of each view in the encoder layer's attention",
        "patches of the view that are neither merged away nor dropped, and tokens added to it", dtype="int32",
    ),
    Variable(
        "patch_box", ("patch", "corner"), "1",
        "what the patch sees: x0, y0, x1, y1 as shares of the stored picture",
        "(x0 / width, y0 / height, x1 / width, y1 / height)",
    ),
    Variable(
        "patch_view", ("patch",), "1",
        "view of the picture: 0 its base view, then its tiles",
        "number of the view that the patch belongs to", dtype="int16",
    ),
)  # fmt: skip
"""The variables of every trace whose recipe has probes in the image encoder."""


def constant(call: Call) -> dict[str, Any]:
    """A signal's parameters, which do not depend on the step."""
    return call.params(Clock(pass_index=0, step=0, block=0, step_in_block=0, nominal_steps=1, n_blocks=1))


def recorded_variables(table: ProbeTable) -> list[Variable]:
    """The variables that a recipe's record probes add, and `confidence`."""
    out: dict[str, Variable] = {}
    for probe in table.probes:
        for record in probe.records:
            call, site = record.signal, probe.site
            if site.in_encoder:
                axes: tuple[str, ...] = ("encoder_layer",) if site.has_layers else ()
            else:
                axes = ("step", "layer") if site.has_layers else ("step",)
            out.setdefault(record.name, _variable(record.name, call.entry, constant(call), axes, probe.name))
    out.setdefault("confidence", _variable("confidence", signals["confidence"], {}, ("step",), ""))
    looks = any(p.site is not Site.IMAGES for p in table.encoder)
    return [*out.values(), *(ENCODER if looks else ())]


def _variable(name: str, entry: Entry, params: Mapping[str, Any], axes: tuple[str, ...], probe: str) -> Variable:
    dims = entry.meta["dims"]
    dims = dims(params) if callable(dims) else dims
    said = ", ".join(f"{k}={v}" for k, v in params.items())
    return Variable(
        name,
        (*axes, *dims),
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
    written: np.ndarray
    remasked: Tensor | None
    numbers: np.ndarray
    computed: np.ndarray
    chosen: Tensor | None
    on_cache: str | None


StepLogits = dict[int, tuple[list[int], Tensor]]
"""By nominal step: the slots with fresh logits, and the logits `(batch, row, vocabulary)`."""


class Gatherer:
    """Collects one batch's steps, then hands out each sample's arrays.

    `reference` holds the unpruned run's logits and `uncached` those of the run without a cache, for signals that
    compare with them; `collected`, if given, is filled with
    this run's own.
    """

    def __init__(
        self,
        table: ProbeTable,
        layers: int,
        gen_length: int,
        *,
        reference: StepLogits | None = None,
        uncached: StepLogits | None = None,
        collected: StepLogits | None = None,
    ) -> None:
        self._others = {"reference": reference or {}, "uncached": uncached or {}}
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
        bad = (step.eligible & step.confidence.isnan()).sum(1)
        if self._collected is not None:
            self._collected[step.clock.step] = (step.slots, step.logits)
        for probe in self._table.at(step.clock):
            for record in probe.records if probe.site is Site.LOGITS else ():
                value = self._signal(record.signal, step)
                if value is not None:
                    self._rows.setdefault(record.name, {})[i] = torch.where(step.eligible, value.double(), torch.nan)
                    bad += (step.eligible & value.isinf()).sum(1)
        self._bad.append(bad)
        every = np.arange(step.tokens.shape[1])
        self._steps.append(
            _Kept(
                step.clock,
                step.active,
                step.tokens,
                np.array(step.slots, np.int64),
                np.zeros_like(step.tokens, bool) if step.written is None else step.written,
                step.remasked,
                every if step.numbers is None else step.numbers,
                np.ones_like(step.tokens, bool) if step.computed is None else step.computed,
                step.chosen,
                step.on_cache,
            )
        )

    def _signal(self, call: Call, step: Step) -> Tensor | None:
        """`(batch, row)` of one signal; NaN in rows that a comparison has no counterpart for."""
        entry, params = call.entry, call.params(step.clock)
        compared = next((n for n in entry.needs if n in self._others), None)
        if compared is None:
            given = {"logits": step.logits, "confidence": step.confidence}
            return cast(Tensor, entry.function(*(given[n] for n in entry.needs), **params))
        if step.clock.step not in self._others[compared]:
            return None
        slots, logits = self._others[compared][step.clock.step]
        common = [s for s in step.slots if s in slots]
        if not common:
            return None
        here = torch.tensor([step.slots.index(s) for s in common], device=logits.device)
        there = torch.tensor([slots.index(s) for s in common], device=logits.device)
        given = {
            "logits": step.logits[:, here],
            "confidence": step.confidence[:, here],
            compared: logits[:, there],
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
        length = max((int(steps[i].numbers.max(initial=-1)) + 1 for i in took_part), default=self.gen_length)
        token = np.full((n, length), -1, np.int32)
        place, computed = np.full((n, length), -1, np.int32), np.zeros((n, length), np.uint8)
        for at, i in enumerate(took_part):
            numbers = steps[i].numbers
            token[at, numbers] = steps[i].tokens[sample]
            place[at, numbers] = np.arange(len(numbers))
            chosen = steps[i].chosen
            computed[at, numbers] = steps[i].computed[sample] if chosen is None else chosen[sample].cpu().numpy()
        out: dict[str, np.ndarray] = {
            "token": token,
            "slot_place": place,
            "recomputed": computed,
            "nominal_step": np.array([steps[i].clock.step for i in took_part], np.int32),
            "block": np.array([steps[i].clock.block for i in took_part], np.int32),
            "nonfinite": self._bad_slots(sample, took_part),
            "removal_on_cache": np.array([_ON_CACHE[steps[i].on_cache or "none"] for i in took_part], np.uint8),
            "phase_of_pass": np.array([_PASSES[steps[i].clock.phase.value] for i in took_part], np.uint8),
        }
        for name, rows in self._rows.items():
            out[name] = np.full((n, length), np.nan, np.float32)
            for at, i in enumerate(took_part):
                if i in rows:
                    self._place(out[name][at], steps[i].slots, rows[i][sample].float().cpu().numpy())
        commit_step = np.full(length, -1, np.int32)
        for at, i in enumerate(took_part):
            commit_step[steps[i].numbers[steps[i].written[sample]]] = at
            remasked = steps[i].remasked
            if remasked is not None:
                commit_step[self._answer(steps[i].slots, remasked[sample])] = -1
        out["commit_step"] = commit_step
        return out

    def _bad_slots(self, sample: int, took_part: Sequence[int]) -> np.ndarray:
        """`(step,)` int32: open slots whose logits gave no probability, and infinite signals of them."""
        if not took_part:
            return np.zeros(0, np.int32)
        return torch.stack(self._bad)[list(took_part), sample].int().cpu().numpy()

    @staticmethod
    def _answer(slots: np.ndarray, chosen: Tensor) -> np.ndarray:
        found = slots[chosen.cpu().numpy()]
        return found[found >= 0]

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
                np.add.at(bad, [place[k[0]] for k, _ in items], stacked.astype(np.int32))
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

    def nan_scores(self, recorder: Recorder, sample: int) -> dict[str, int]:
        """The first step at which an intervention's score held NaN, by probe; steps count as in the arrays."""
        place = {p: i for i, p in enumerate(self.passes(sample))}
        out: dict[str, int] = {}
        for name, values in recorder.values.items():
            if name.startswith(f"{NONFINITE}."):
                counts = torch.stack([count[sample] for count in values.values()]).tolist()
                steps = [place[k[0]] for k, n in zip(values, counts, strict=True) if n and k[0] in place]
                out |= {name.removeprefix(f"{NONFINITE}."): min(steps)} if steps else {}
        return out

    @staticmethod
    def _free(values: np.ndarray, places: Sequence[int], steps: int) -> np.ndarray:
        array = np.full((steps, *values.shape[1:]), np.nan, np.float32)
        array[list(places)] = values
        return array
