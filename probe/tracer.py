"""Hooks to probes to plans: the one place that knows both the loop's passes and the model's modules.

`Tracer` is the `forward` of the loop. For a pass at which no probe fires at a layer it runs the bare model. Otherwise
it puts plain hooks on the layers for the length of that one forward: they ask the attention function for the rows
that probes want, hand reductions to the recorder, and let edits narrow the sequence through `surgery`. Later layers
of the same forward get the shortened rotary tables and mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor

from probe.backbones.base import Backbone
from probe.canvas import Canvas
from probe.compile import BoundProbe, Call, ProbeTable
from probe.conditions import Watch
from probe.delta_cache import DeltaStore, replaced
from probe.inputs import reads_prompt
from probe.ledger import Ledger
from probe.looking import Recorder
from probe.loop import Pass, PassResult, Step
from probe.pass_state import Kit, PassState
from probe.probe_code import CodeProbe, CodeRows, run_traced
from probe.site import Clock, Site
from probe.store import KeyStore
from probe.timing import Stopwatch


class Tracer:
    """The model behind the loop's `forward`, with a recipe's probes attached.

    One tracer serves one batch of one generation: its `kit` holds the ledger and the recorder.
    """

    def __init__(
        self,
        backbone: Backbone,
        table: ProbeTable,
        canvas: Canvas,
        *,
        recorder: Recorder | None = None,
        watch: Stopwatch | None = None,
        seeds: Sequence[int] = (0,),
        code_probes: Sequence[CodeProbe] = (),
    ) -> None:
        device = canvas.embeds.device
        dims = backbone.costs
        self.kit = Kit(
            backbone=backbone,
            table=table,
            dims=dims,
            ledger=Ledger(canvas.n_visual_at_start, dims.layers, device, canvas.fates),
            recorder=recorder or Recorder(),
            watch=watch or Stopwatch(device),
            seeds=tuple(seeds),
            store=KeyStore(dims.layers),
            deltas=DeltaStore(dims.layers),
            watching=Watch(
                (c for p in table.probes for c in p.when), canvas.layout.batch, dims.layers, backbone.facts.name
            ),
        )
        self.shift = backbone.shift
        self._acted: set[tuple[Any, ...]] = set()
        self.code_probes = tuple(code_probes)
        self.flops: list[dict[str, int]] = []
        """FLOPs of the whole batch by phase, one entry per pass."""
        self.fired: list[frozenset[str]] = []
        """Names of the interventions whose steps included the pass, one entry per pass."""
        self.rows: list[tuple[int, ...]] = []
        """Rows that each sample's first layer computed, one entry per pass."""

    def __call__(self, request: Pass) -> PassResult:
        """Run one pass: edits before the model, the model with its hooks, the head on the wanted rows."""
        kit, watch = self.kit, self.kit.watch
        watch.step = request.clock.pass_index
        firing = kit.table.at(request.clock)
        self.fired.append(frozenset(p.name for p in firing if p.edit is not None))
        state = PassState(kit, request, firing)
        delta = request.work.delta
        kit.ledger.begin(cached=state.cached or (delta is not None and not delta.whole))
        with watch.section("probe"):
            for probe in (p for p in firing if p.site is Site.BEFORE_LM):
                state.at_canvas(probe)
            for probe in (p for p in firing if p.site is Site.PREFIX_CACHE):
                state.at_store(probe)
        with watch.section("backbone"):
            inside = [p for p in firing if p.site.has_layers and p.site is not Site.PREFIX_CACHE]
            hidden = self._run(state, inside, request)
        self.rows.append(state.rows)
        places = self._head_places(state, request)
        with watch.section("head"):
            rows = places.repeat(state.streams, 1)
            wanted = hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[-1]))
            logits = kit.backbone.head(wanted)
        with watch.section("probe"):
            for probe in (p for p in firing if p.site is Site.FINAL):
                state.at_final(probe, hidden)
        state.finish()
        if request.work.prompt == "all":
            self._acted |= {_occasion(p, request.clock) for p in firing}
        if request.work.cached or delta is not None:
            kit.ledger.keep_columns()
            if request.work.evict is not None:
                kit.ledger.evict([x.layout if x is not None else None for x in kit.store.layers])
        state.flops["head"] = kit.dims.head(rows.numel())
        self.flops.append(state.flops)
        drawn_over = request.canvas.layout if request.work.prompt == "all" else self._computed
        places = drawn_over.locate(request.rows)
        return PassResult(logits, state.canvas_after, drawn_over.length, places, state.on_cache, state.chosen)

    def observe(self, step: Step) -> None:
        """The loop has decided: what conditions wait for."""
        watching = self.kit.watching
        if watching.conditions:
            with self.kit.watch.section("probe"):
                watching.note_logits(step.logits, step.confidence, step.eligible, step.clock)
                watching.end_of_pass()

    def _head_places(self, state: PassState, request: Pass) -> Tensor:
        """`(batch, c)`: where the rows stand that predict the wanted slots."""
        rows = request.rows
        if self.shift:
            rows = torch.where(request.previous >= 0, request.previous, rows)
        places = state.layout.locate(rows)
        if request.shadow:  # the shadow's rows stand at the very end
            n = len(request.window[0])
            behind = state.layout.width - n + torch.arange(n, device=places.device)
            places = torch.cat([places, behind.expand(places.shape[0], n)], 1)
        return places

    def wants_every_row(self, clock: Clock) -> str | None:
        """Which probe of this step looks at rows that a cached pass does not compute, and why.

        One that has acted since its start, in a pass that computed the prompt, need not act again: what it removed is
        gone from the columns. One that names its steps, or wants another number of tokens by now, must.
        """
        for probe in self.kit.table.at(clock):
            if probe.edit is None or _occasion(probe, clock) in self._acted:
                continue
            if reason := reads_prompt(probe.edit, probe.site, clock):
                return f"probe `{probe.name}` ({probe.place}) {reason}"
        return None

    def _run(self, state: PassState, probes: list[BoundProbe], request: Pass) -> Tensor:
        inputs = state.model_inputs()
        state.rows = state.layout.length
        self._computed = state.layout
        delta = request.work.delta
        code = [c for c in self.code_probes if c.fires(request.clock)]
        with ExitStack() as stack:
            if probes or state.uneven or self.kit.watching.layers or request.work.evict or delta is not None:
                stack.callback(state.looking.release)
                for handle in attach(self.kit.backbone, state, probes):
                    stack.callback(handle.remove)
            else:
                state.count_all_layers()
            if delta is not None:
                stack.enter_context(replaced(state, delta))
            if code:
                rows = CodeRows(*(x.repeat(state.streams, 1) for x in (state.layout.visual, state.layout.role)))
                hidden, saved = run_traced(self.kit.backbone, inputs, code, request.clock, rows)
                for probe in (c for c in code if c.name in saved):
                    value = probe.per_sample(saved[probe.name], state.batch)
                    self.kit.recorder.add(probe.name, request.clock.pass_index, None, value)
                return hidden.to(inputs["inputs_embeds"].device)
            hidden = self.kit.backbone.lm(**inputs).last_hidden_state
            return cast(Tensor, hidden).to(inputs["inputs_embeds"].device)


def _occasion(probe: BoundProbe, clock: Clock) -> tuple[Any, ...]:
    """What tells one act of an intervention from another: named steps, values of a schedule, progress."""
    calls: list[Call] = []
    if probe.edit is not None:
        calls = [c for p in (probe.edit.score, probe.edit.select, probe.edit.do) if p is not None for c in p.walk()]
    params = [c.params(clock) for c in calls]  # the same mapping as long as the same values hold
    follows_time = any(getattr(given.get("keep"), "rule", "") == "cumulative" for given in params)
    step = clock.step if follows_time or probe.steps.exactly is not None else None
    return probe.name, probe.layer, step, *map(id, params)


def _skips_mlp(probe: BoundProbe) -> bool:
    """Whether a probe at a layer's input carries tokens around its MLP alone."""
    return probe.edit is not None and any(params.get("as_keys") for params in probe.edit.do.variants)


def attach(backbone: Backbone, state: PassState, probes: Sequence[BoundProbe]) -> list[Any]:
    """Hooks for one forward. Every layer gets its entry hook (it carries shortened tables on); others only if asked."""
    handles: list[Any] = []
    acting: dict[tuple[Site, int], list[BoundProbe]] = {}
    for probe in probes:
        if probe.layer is not None:
            acting.setdefault((probe.site, probe.layer), []).append(probe)

    for i, modules in enumerate(backbone.layers):
        at_input = acting.get((Site.LAYER_INPUT, i), [])
        between = acting.get((Site.LAYER_AFTER_ATTENTION, i), [])
        shortens = bool(between) or any(_skips_mlp(p) for p in at_input)
        at_output = acting.get((Site.LAYER_OUTPUT, i), [])

        def enter(
            module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], i: int = i, at_input: Any = at_input
        ) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            with state.timed():
                hidden, kwargs = state.enter_layer(i, hidden, kwargs, at_input)
            if args:
                return (hidden, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": hidden}

        handles.append(modules.layer.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(modules.attention.register_forward_hook(lambda m, a, o, i=i: state.leave_attention(i)))
        if shortens:
            # The layer adds its own residual after the MLP, which would be too long. So the MLP runs on the short
            # sequence, its module reports zeros of the long shape, and the layer's exit puts the short sum in place.
            def shorten(module: Any, args: tuple[Tensor, ...], i: int = i, between: Any = between) -> Any:
                with state.timed():
                    return (state.cut_between(i, args[0], between), *args[1:])

            def swallow(module: Any, args: Any, output: Tensor) -> Tensor:
                return state.swallow_mlp(output)

            handles.append(modules.pre_mlp_norm.register_forward_pre_hook(shorten))
            handles.append(modules.mlp.register_forward_hook(swallow))

        def leave(module: Any, args: Any, output: Any, i: int = i, at_output: Any = at_output) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            with state.timed():
                hidden = state.leave_layer(i, hidden, at_output)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handles.append(modules.layer.register_forward_hook(leave))
    return handles
