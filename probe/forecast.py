"""What a recipe will leave and cost, before anything runs: visual tokens per layer and step, retention, FLOPs.

Every intervention decides here on made-up tensors of the right shapes, through the same code as in a run, so counts
come out as they will wherever they do not depend on the picture. Two drawings that differ show where they do.
Conditions (`when`) are taken to hold as soon as they may.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from probe.closed_forms import pruned
from probe.compile import BoundProbe, ProbeTable
from probe.cost import DecoderDims
from probe.decide import decide
from probe.imagined import Imagined
from probe.inputs import reads_prompt
from probe.site import Clock, Fate, ModelFacts, Phase, Plan, Site

TEXT = 40
"""Positions of text that a forecast counts with; the template and the question, which it does not know."""


@dataclass(frozen=True)
class Setting:
    """What a forecast is for: a sample's visual tokens, nominal steps, answer slots, and the name of the cache.

    `shown` are the visual tokens of the smaller pictures that probes at `images` make, where that is known.
    """

    visual: int
    steps: int
    slots: int
    cache: str = "none"
    text: int = TEXT
    shown: int | None = None


@dataclass(frozen=True)
class Forecast:
    """`tokens (step, layer)`: visual tokens in the layer's attention. `flops`: share of the unpruned run's, in the
    decoder and its head, without scoring; `closed_form`: the same by the study's equation (8), which takes the rows of
    a pass for its keys; None where they are not known. `unsure`: by probe, why its count is a guess.
    """

    setting: Setting
    tokens: np.ndarray
    flops: float | None
    unsure: Mapping[str, str] = field(default_factory=dict)
    limits: tuple[str, ...] = ()
    closed_form: float | None = None

    @property
    def shares(self) -> np.ndarray:
        """`tokens` as shares of the original."""
        return self.tokens / max(self.setting.visual, 1)

    @property
    def nominal(self) -> float:
        """The fewest of any layer and step."""
        return float(self.shares.min())

    @property
    def layer_average(self) -> float:
        """Mean over the layers of the first step in which tokens are missing."""
        missing = np.flatnonzero((self.shares < 1).any(1))
        return float(self.shares[missing[0] if len(missing) else 0].mean())

    @property
    def trajectory_average(self) -> float:
        """Mean over layers and steps."""
        return float(self.shares.mean())


@dataclass(frozen=True)
class _After:
    """What one intervention leaves: tokens `there` (computed), of them `seen` as keys; `stay` of them later on."""

    there: int
    seen: int
    stay: int


class _Foreseeing:
    """One recipe on one model, pass by pass."""

    def __init__(self, table: ProbeTable, facts: ModelFacts, setting: Setting) -> None:
        self.table, self.facts, self.setting = table, facts, setting
        self.unsure: dict[str, str] = {}
        self._known: dict[tuple[str, int | None, int, int], Plan | None] = {}

    def clock(self, step: int) -> Clock:
        total = self.setting.steps
        phase = Phase.PREFILL if step == 0 and self.setting.cache != "none" else Phase.DENOISE
        return Clock(step, step, 0, step, total, 1, phase, (step / total,))

    def plan(self, probe: BoundProbe, n: int, original: int, clock: Clock) -> Plan | None:
        """What a probe decides for n tokens, from what it decides on made-up ones."""
        key = (probe.name, probe.layer, n, clock.step if self._changes(probe) else 0)
        if key not in self._known:
            self._known[key] = self._decided(probe, n, original, clock)
        return self._known[key]

    @staticmethod
    def _changes(probe: BoundProbe) -> bool:
        assert probe.edit is not None
        parts = [c for c in (probe.edit.score, probe.edit.select, probe.edit.do) if c is not None]
        calls = [call for part in parts for call in part.walk()]
        return any(not c.constant or getattr(c.variants[0].get("keep"), "rule", "") == "cumulative" for c in calls)

    def _decided(self, probe: BoundProbe, n: int, original: int, clock: Clock) -> Plan | None:
        assert probe.edit is not None
        done = (clock.step + (probe.site is Site.FINAL)) / clock.nominal_steps
        progress = 0.0 if probe.site.in_encoder else done
        plans: list[Plan | None] = []
        for wild in (False, True):
            layer = -1 if probe.layer is None else probe.layer
            try:
                plans.append(decide(probe.edit, Imagined(n, original, progress, layer, self.facts.heads, wild), clock))
            except Exception as error:  # parts of a user's own may want anything of their inputs
                said = str(error).split("\n")[0] or type(error).__name__
                self.unsure[probe.name] = f"what it keeps cannot be foreseen ({said})"
                return None
        sizes = {(n, 0) if p is None else (p.kept.shape[0], p.appended) for p in plans}
        if len(sizes) > 1:
            self.unsure[probe.name] = "how many tokens stay depends on the picture; this is one guess"
        return plans[0]

    def act(self, probe: BoundProbe, now: _After, clock: Clock, original: int | None = None) -> _After:
        """The tokens behind one intervention."""
        assert probe.edit is not None
        if probe.edit.do.entry.meta.get("changes") == "attention" or not now.seen:
            return now
        plan = self.plan(probe, now.seen, self.setting.visual if original is None else original, clock)
        if plan is None:
            return now
        options = probe.edit.do.params(clock)
        left = plan.kept.shape[0] + plan.appended
        if plan.fate is Fate.MASKED:
            return _After(now.there, left, left if options.get("lasts") == "generation" else now.stay)
        stay = now.stay
        if probe.site.in_encoder or options.get("lasts") == "generation":
            stay = left if options.get("recycled", "generation") == "generation" else plan.kept.shape[0]
        return _After(left, left, stay)

    def patches_left(self) -> float:
        """The share of a view's patches that the encoder hands on."""
        patches = self.facts.patches
        for probe in (p for p in self.table.encoder if p.site is Site.IMAGES and self.setting.shown is None):
            self.unsure[probe.name] = "how many tokens a smaller picture has is the model's own rule, so it is left out"
        if not self.table.encoder or not patches:
            return 1.0
        now = _After(patches, patches, patches)
        for probe in sorted(self.table.encoder, key=lambda p: math.inf if p.layer is None else p.layer):
            if probe.edit is None or probe.site is Site.IMAGES:
                continue
            if probe.views != "all":
                self.unsure[probe.name] = "how many views it sees depends on the picture, so it is left out"
                continue
            if probe.group != "view":
                self.unsure.setdefault(probe.name, "views of a picture share; counted as one view")
            now = self.act(probe, now, self.clock(0), original=patches)
            self.unsure.setdefault(probe.name, "about: without the newlines, and the views as large as each other")
        return now.there / patches

    def run(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`(step, layer)` tokens seen, rows at the attention and rows at the MLP (visual ones)."""
        shown = self.setting.visual if self.setting.shown is None else self.setting.shown
        start = round(self.patches_left() * shown)
        layers, steps = self.facts.layers, self.setting.steps
        out = np.zeros((3, steps, layers), dtype=int)
        stays, hidden = start, 0
        for step in range(steps):
            clock = self.clock(step)
            firing = [p for p in self.table.at(clock) if p.edit is not None and p.fires_for(clock, 0)]
            now = _After(stays + hidden, stays, stays)
            now = self._all(firing, Site.BEFORE_LM, None, now, clock)
            for layer in range(layers):
                whole = now
                skipping = [p for p in firing if p.layer == layer and self._skips(p)]
                now = self._all([p for p in firing if p not in skipping], Site.LAYER_INPUT, layer, now, clock)
                left = self._staying(skipping, now, clock)
                around = left < now.seen
                as_keys = any(p.edit.do.params(clock)["as_keys"] for p in skipping if p.edit)
                out[:2, step, layer] = (now.seen, now.there) if as_keys or not around else (left, left)
                now = self._all(firing, Site.LAYER_AFTER_ATTENTION, layer, now, clock)
                out[2, step, layer] = left if around else now.there
                now = self._all(firing, Site.LAYER_OUTPUT, layer, now, clock)
                if around:
                    now = whole if now.there == 0 else now
            now = self._all(firing, Site.FINAL, None, now, clock)
            masks = any(p.edit is not None and p.edit.do.entry.name == "mask" for p in firing)
            hidden = hidden + (stays - now.stay) if masks else hidden
            stays = now.stay
        return out[0], out[1], out[2]

    def _staying(self, skipping: Sequence[BoundProbe], now: _After, clock: Clock) -> int:
        """How many tokens do not go around a layer."""
        plans = [self.plan(p, now.seen, self.setting.visual, clock) for p in skipping] if now.seen else []
        return min([now.seen, *(p.kept.shape[0] for p in plans if p is not None)])

    @staticmethod
    def _skips(probe: BoundProbe) -> bool:
        return probe.edit is not None and probe.edit.do.entry.name == "skip_layers"

    def _all(self, firing: Sequence[BoundProbe], site: Site, layer: int | None, now: _After, clock: Clock) -> _After:
        for probe in firing:
            if probe.site is site and probe.layer == layer and not self._skips(probe):
                now = self.act(probe, now, clock)
        return now


def forecast(table: ProbeTable, facts: ModelFacts, setting: Setting, dims: DecoderDims | None = None) -> Forecast:
    """What a compiled recipe will leave on a model; with `dims` also what it will cost beside the unpruned run."""
    foreseeing = _Foreseeing(table, facts, setting)
    seen, rows, mlp = foreseeing.run()
    ratio = closed = None
    if dims is not None and setting.cache in ("none", "prefix"):
        whole = np.full_like(seen, setting.visual)
        ratio = _flops(dims, setting, rows, mlp) / _flops(dims, setting, whole, whole)
        closed = _closed(dims, setting, rows) / _closed(dims, setting, whole)
    return Forecast(setting, seen, ratio, foreseeing.unsure, _limits(table, setting), closed)


def _closed(dims: DecoderDims, setting: Setting, rows: np.ndarray) -> int:
    """The study's equation (8), layer by layer: the tokens of a pass are those that it computes."""
    prompt = [setting.cache == "none" or step == 0 for step in range(setting.steps)]
    active = [
        [setting.slots + (setting.text + int(n) if whole else 0) for n in step]
        for step, whole in zip(rows, prompt, strict=True)
    ]
    return pruned(active, dims.width, dims.mlp)


def _flops(dims: DecoderDims, setting: Setting, rows: np.ndarray, mlp: np.ndarray) -> int:
    """Decoder and head over a generation. With a prefix cache the prompt is computed once, in the first pass."""
    total, text, slots = 0, setting.text, setting.slots
    for step in range(setting.steps):
        prompt = setting.cache == "none" or step == 0
        for layer in range(dims.layers):
            own = dims.at(layer)
            here, after = int(rows[step, layer]), int(mlp[step, layer])
            keys = text + here + slots
            total += own.attention(keys if prompt else slots, keys)
            total += own.mlp_block(text + after + slots if prompt else slots)
        total += dims.head(slots - slots * step // setting.steps)
    return total


def _limits(table: ProbeTable, setting: Setting) -> tuple[str, ...]:
    """What a recipe cannot do in passes that take the prompt from a cache."""
    if setting.cache == "none":
        return ()
    clock = Clock(1, 1, 0, 1, max(setting.steps, 2), 1)
    out: dict[str, str] = {}
    for probe in table.edits:
        if (
            not probe.site.in_encoder
            and probe.edit is not None
            and (why := reads_prompt(probe.edit, probe.site, clock))
        ):
            out[probe.name] = (
                f"`{probe.name}` {why}: where a step over the `{setting.cache}` cache does not compute those rows, it "
                "cannot act. It acts when the prompt is computed, and not again before the cache is filled anew"
            )
    return tuple(out.values())
