"""One batch through the machine: prompts to canvas, loop, tracer, arrays. Knows neither recipes' files nor traces."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from probe.assemble import Gatherer, StepLogits
from probe.backbones.base import Backbone, Prompt
from probe.canvas import make_canvas
from probe.compile import ProbeTable
from probe.decoding.draw import draws
from probe.heap import keep_freed
from probe.looking import Recorder
from probe.loop import Finished, Rule, Step, denoise
from probe.probe_code import CodeProbe
from probe.timing import PHASES, Stopwatch
from probe.tracer import Tracer

OnStep = Callable[[Step], None]


@dataclass(frozen=True)
class Generated:
    """What one sample came to: its answer and the arrays of its trace."""

    ids: list[int]
    text: str
    seconds: float
    arrays: dict[str, np.ndarray]
    nan_scores: dict[str, int] = field(default_factory=dict)
    """The first step at which an intervention's score held NaN, by probe."""


@torch.inference_mode()
def generate(
    backbone: Backbone,
    prompts: Sequence[Prompt],
    rule: Rule,
    table: ProbeTable,
    *,
    seed: int = 0,
    samples: Sequence[int] | None = None,
    watch: Stopwatch | None = None,
    code_probes: Sequence[CodeProbe] = (),
    on_step: OnStep | None = None,
    reference: StepLogits | None = None,
    uncached: StepLogits | None = None,
    collected: StepLogits | None = None,
) -> list[Generated]:
    """Denoise a batch of prompts under a table of probes.

    `samples` are the global numbers of the batch's samples: a sample's noise depends on `seed` and its number, not
    on who shares its batch. `watch` may already hold the time of encoding. `reference` are the unpruned run's logits,
    `uncached` those of the run without a cache, for signals that compare with them; `collected` is a dict to fill with
    this run's.
    """
    numbers = list(samples) if samples is not None else list(range(len(prompts)))
    device = prompts[0].embeds.device
    watch = watch or Stopwatch(device)
    if device.type == "cpu":
        keep_freed()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    mask_embed = backbone.embed(torch.tensor(rule.mask_id, device=device))
    suffix = backbone.embed(torch.tensor(rule.suffix, device=device)) if rule.suffix else None
    canvas = make_canvas(prompts, mask_embed, rule.gen_length, suffix)
    recorder = Recorder()
    tracer = Tracer(
        backbone,
        table,
        canvas,
        recorder=recorder,
        watch=watch,
        seeds=[seed * 1_000_003 + n for n in numbers],
        code_probes=code_probes,
    )
    layers, compared = tracer.kit.dims.layers, {"reference": reference, "uncached": uncached}
    gatherer = Gatherer(table, layers, rule.gen_length, **compared, collected=collected)
    events = denoise(canvas, tracer, rule, backbone.embed, draws(seed, numbers))
    finished: Finished | None = None
    while finished is None:
        with watch.section("sampler"):
            event = next(events)
        if isinstance(event, Finished):
            finished = event
        else:
            with watch.section("probe"):
                gatherer.add(event)
            tracer.observe(event)
            if on_step is not None:
                on_step(event)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    spent = watch.drain()
    encode = sum(s for (step, _), s in spent.items() if step < 0)

    edits = {p.name for p in table.edits if not p.site.in_encoder}
    out = []
    for b, prompt in enumerate(prompts):
        passes = gatherer.passes(b)
        arrays = gatherer.by_sample(b) | gatherer.recorded(recorder, b, prompt.n_visual)
        kept, counts = tracer.kit.ledger.table(b)
        by_phase = np.zeros((len(passes), len(PHASES)))
        flops = np.zeros_like(by_phase)
        for place, index in enumerate(passes):
            for column, phase in enumerate(PHASES):
                by_phase[place, column] = spent.get((index, phase), 0.0) / len(prompts)
                flops[place, column] = tracer.flops[index].get(phase, 0) / len(prompts)
        by_phase[0, PHASES.index("encode")] = encode / len(prompts)
        total = (seconds + encode) / len(prompts)
        arrays |= {
            "visual_kept": kept.numpy()[passes],
            "visual_tokens": counts.numpy()[passes],
            "visual_box": prompt.box.float().cpu().numpy(),
            "visual_role": prompt.visual_role.cpu().numpy(),
            "visual_view": prompt.view.cpu().numpy().astype(np.int16),
            "seconds": by_phase,
            "flops": flops,
            "seconds_total": np.array(total),
            "flops_total": np.array(flops.sum()),
            "peak_memory": np.array(_peak_memory(device)),
            "rows_computed": np.array([tracer.rows[i][b] for i in passes], np.int32),
            "unreached": np.array(len(edits - {name for i in passes for name in tracer.fired[i]}), np.int32),
            "prompt_length": np.array(prompt.embeds.shape[0]),
            "visual_original": np.array(prompt.n_original),
        }
        ids = finished.output[b]
        out.append(Generated(ids, backbone.decode(ids), total, arrays, gatherer.nan_scores(recorder, b)))
    return out


def _peak_memory(device: torch.device) -> float:
    """Bytes: the device's own peak since the batch began, or on CPU the peak of the process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
