"""Calibration on a backbone: what the rules of `probe.calibrate` measure, and the recipe with its numbers filled in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from probe import calibrate as _rules  # noqa: F401  (registers the rules)
from probe import data
from probe.backbones import facts_of, load
from probe.backbones.base import Backbone, Prompt
from probe.calibrate import Finding, first_candidate
from probe.compile import ProbeTable, compile_recipe
from probe.compile_call import bind
from probe.encoder import encode_with_probes
from probe.errors import ProbeError
from probe.generate import generate
from probe.generation import rule_for
from probe.layer_choice import kl_to_full
from probe.loop import Rule, Step
from probe.recipe import Recipe, load_recipe
from probe.recipe_text import with_comments
from probe.recipe_words import Wrong
from probe.recipe_yaml import read_yaml
from probe.registry import calibrations, nearest
from probe.runner import samples_of
from probe.site import ModelFacts, Role
from probe.suggest import visual_mass
from probe.trace import open_trace

OnSample = Callable[[str, int, int], None]
"""Told what is measured, how many samples are done, and of how many."""


@dataclass(frozen=True)
class Calibrated:
    """The recipe with its numbers, and as a file whose comments say why."""

    recipe: Recipe
    text: str
    findings: Mapping[str, Finding]


def calibrate(
    recipe: Recipe,
    *,
    backbone: Backbone | None = None,
    samples: int = 20,
    device: str = "cpu",
    dtype: str = "auto",
    trace: Path | None = None,
    settings: Sequence[str] = (),
    header: str = "",
    on_sample: OnSample | None = None,
) -> Calibrated:
    """Find the numbers of the dials that the recipe's `calibrate` names, on the first samples of its data.

    `settings` are parameters of the rules (`["eta=0.001"]`), over what the recipe says. `trace` gives the attention
    that `unseen_layers` reads, in place of a run. `header` stands in front of the comments. Raises `ProbeError`.
    """
    if not recipe.calibrate:
        hint = f", for example `calibrate: {{{next(iter(recipe.dial), 'layer')}: withdraw_layer}}`"
        raise ProbeError(f"{recipe.name}: the recipe names no dial to calibrate; add the key `calibrate`{hint}")
    source = _Measurements(recipe, backbone, samples, device, dtype, trace, on_sample)
    given = _settings(recipe, settings)
    findings: dict[str, Finding] = {}
    rules: dict[str, Any] = {}
    for dial, part in recipe.calibrate.items():
        path = ("calibrate", dial)
        if part.name not in calibrations:
            known = nearest(part.name, calibrations.names())
            raise recipe.fault(path, f"there is no rule of calibration `{part.name}`; {known}")
        entry = calibrations[part.name]
        own = {k: v for k, v in given.items() if k in entry.params.model_fields}
        try:
            params = bind(entry, part.params | own, 0, 1, varies=False).segments[0][1]
        except Wrong as error:
            raise recipe.fault((*path, part.name, *error.path), str(error)) from None
        measured = [source.give(name, params, dial) for name in entry.needs]
        findings[dial] = entry.function(*measured, **params)
        rules[dial] = {part.name: part.params | own} if part.params | own else part.name
        recipe = recipe.with_sets([f"{dial}={_spelled(findings[dial].value)}"])
        source.recipe = recipe
    recipe = recipe.replace(calibrate=rules)
    said = [f"Calibrated on {source.facts.name}, data {recipe.data.source}{source.ran()}:"]
    said += [f"{dial} = {_spelled(f.value)}. {' '.join(f.evidence)}" for dial, f in findings.items()]
    return Calibrated(recipe, with_comments(recipe, [header, *said]), findings)


def _spelled(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list | tuple) else str(value)


def _settings(recipe: Recipe, settings: Sequence[str]) -> dict[str, Any]:
    """`NAME=VALUE` for parameters that some rule of the recipe has."""
    known = {n for p in recipe.calibrate.values() if p.name in calibrations for n in _parameters(p.name)}
    out: dict[str, Any] = {}
    for text in settings:
        name, equals, value = text.partition("=")
        if not equals or name not in known:
            hint = nearest(name, sorted(known)) if known else "its rules have no parameters"
            raise ProbeError(f"--with {text}: no rule of {recipe.name} has a parameter `{name}`; {hint}")
        out[name] = read_yaml(value, f"--with {text}").data
    return out


def _parameters(rule: str) -> list[str]:
    return list(calibrations[rule].params.model_fields)


@dataclass
class _Measurements:
    """What the rules of one recipe are given, each measured when it is asked for."""

    recipe: Recipe
    backbone: Backbone | None
    samples: int
    device: str
    dtype: str
    trace: Path | None
    on_sample: OnSample | None = None
    used: int = field(default=0, init=False)

    @cached_property
    def facts(self) -> ModelFacts:
        """Sizes, without weights where no backbone is loaded yet."""
        return facts_of(self.recipe.backbone) if self.backbone is None else self.backbone.facts

    @cached_property
    def model(self) -> Backbone:
        """The backbone, loaded when the first measurement needs it."""
        if self.backbone is None:
            self.backbone = load(self.recipe.backbone, device=self.device, dtype=self.dtype, **self.recipe.load)
        return self.backbone

    def ran(self) -> str:
        """How many samples were run, in words."""
        if self.trace is not None and not self.used:
            return f", from {self.trace.name}"
        return f", {self.used} samples" if self.used else ", by the model's sizes alone"

    def give(self, name: str, params: Mapping[str, Any], dial: str) -> Any:
        """The measurement of this name."""
        if name == "layers":
            return self.facts.layers
        if name == "patches":
            return self.facts.patches
        if name == "merging_layers":
            table = compile_recipe(self.recipe, self.facts)
            return len({p.layer for p in table.encoder if p.edit is not None and p.layer is not None})
        if name == "divergence":
            return self._divergence(dial, first_candidate(params["first"], self.facts.layers))
        if name == "visual_mass":
            return self._visual_mass()
        raise ProbeError(f"a rule of calibration asks for `{name}`, which is no measurement")

    def _samples(self, what: str) -> Iterator[tuple[int, data.Sample, Rule]]:
        """The first samples, with how to generate; a sample that cannot be read raises."""
        limited = self.recipe.replace(data=self.recipe.data.model_copy(update={"limit": self.samples}))
        for number, sample in enumerate(samples_of(limited)):
            if isinstance(sample, ProbeError):
                raise sample
            yield number, sample, rule_for(self.model, self.recipe, sample.generate, pictures=bool(sample.pictures))
            self.used = max(self.used, number + 1)
            if self.on_sample is not None:
                self.on_sample(what, number + 1, self.samples)

    @torch.inference_mode()
    def _prompt(self, sample: data.Sample, table: ProbeTable, number: int) -> Prompt:
        """A sample as the language model meets it under a table's probes."""
        features = None
        if sample.frames:
            features = self.model.encode_video(sample.frames)
        elif sample.images:
            seed = self.recipe.generate.seed * 1_000_003 + number
            features = encode_with_probes(
                self.model, sample.images, table, question=sample.question, seed=seed
            ).features
        return self.model.assemble(sample.question, features, think=bool(self.recipe.generate.think))

    def _divergence(self, dial: str, first: int) -> Tensor:
        """`(sample, candidate)`: mean over the slots that could be committed when the recipe first acts."""
        layers = range(first, self.facts.layers)
        tables = [compile_recipe(self.recipe.with_sets([f"{dial}={layer}"]), self.facts) for layer in layers]
        rows = []
        for number, sample, rule in self._samples("divergence"):
            bare = self._prompt(sample, ProbeTable(()), number)
            if not bare.n_visual:
                continue
            full: Step | None = None
            row = []
            for table in tables:
                prompt = self._prompt(sample, table, number) if table.encoder else bare
                step = self._acting(prompt, rule, table, number)
                if full is None or full.clock.pass_index != step.clock.pass_index:
                    full = self._at(bare, rule, number, step.clock.pass_index)
                slots = step.eligible[0]
                row.append(kl_to_full(full.logits[0][slots], step.logits[0][slots][:, None]).mean())
            rows.append(torch.stack(row))
        if not rows:
            raise ProbeError(f"no sample of {self.recipe.data.source} has visual tokens; ask about pictures")
        return torch.stack(rows).cpu()

    def _acting(self, prompt: Prompt, rule: Rule, table: ProbeTable, number: int) -> Step:
        """The first pass with predictions in which, or before which, an intervention acts."""
        acted = False

        def enough(step: Step) -> bool:
            nonlocal acted
            acted = acted or any(p.edit is not None for p in table.at(step.clock)) or bool(table.encoder)
            return acted and bool(step.eligible.any())

        step = self._until(prompt, rule, table, number, enough)
        if step is None:
            raise ProbeError(
                f"{self.recipe.name}: no intervention acts within the {rule.steps} steps of sample {number}"
            )
        return step

    def _at(self, prompt: Prompt, rule: Rule, number: int, pass_index: int) -> Step:
        step = self._until(prompt, rule, ProbeTable(()), number, lambda s: s.clock.pass_index == pass_index)
        if step is None:
            raise ProbeError(f"sample {number}: the unpruned run has no pass {pass_index} to compare with")
        return step

    def _until(
        self, prompt: Prompt, rule: Rule, table: ProbeTable, number: int, enough: Callable[[Step], bool]
    ) -> Step | None:
        """Generate until a step is enough, and return that one."""

        def look(step: Step) -> None:
            if enough(step):
                raise _Found(step)

        try:
            generate(self.model, [prompt], rule, table, seed=self.recipe.generate.seed, samples=[number], on_step=look)
        except _Found as found:
            return found.step
        return None

    def _visual_mass(self) -> list[Tensor]:
        """Per sample `(step, layer)`: from the trace, or from a run that records it and changes nothing."""
        if self.trace is not None:
            with open_trace(self.trace) as opened:
                return [torch.from_numpy(mass) for mass in visual_mass(opened)]
        table = compile_recipe(load_recipe("record/attention_mass"), self.facts)
        seed, out = self.recipe.generate.seed, []
        for number, sample, rule in self._samples("attention"):
            prompt = self._prompt(sample, table, number)
            if not prompt.n_visual:
                continue
            arrays = generate(self.model, [prompt], rule, table, seed=seed, samples=[number])[0].arrays
            out.append(torch.from_numpy(arrays["attention_mass"])[:, :, 0, int(Role.VISUAL)])
        return out


class _Found(Exception):
    """Ends a generation early; carries the step that was looked for."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step
