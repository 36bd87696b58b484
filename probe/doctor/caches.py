"""Checks of what predicts a slot, and of caches: rows that are stored against rows that are computed.

The first line of each docstring is the text that is printed for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from probe.backbones.base import Prompt
from probe.canvas import make_canvas
from probe.compile import ProbeTable
from probe.decoding.draw import draws
from probe.doctor.patient import SLOTS, NotHere, Patient, expect
from probe.doctor.runs import NOTHING, alike, answers, own_cache, recipe_of, rule_of
from probe.loop import Finished, Pass, Step, denoise
from probe.site import Clock, Phase
from probe.tracer import Tracer


def shift(patient: Patient) -> str:
    """The logits of a slot are the head's on the row `shift` before it."""
    model, told = patient.backbone, patient.told(patient.prompts[: 2 if patient.backbone.batches else 1])
    states, canvas = patient.whole(told), told.canvas
    slots = torch.tensor(canvas.answer_rows, device=patient.device)
    listed = slots.tolist()
    request = Pass(
        Clock(0, 0, 0, 0, 1, 1), canvas, slots, slots - 1, listed, [[] for _ in listed], computed=listed,
        window=tuple(listed),
    )  # fmt: skip
    got = Tracer(model, ProbeTable(()), canvas)(request).logits
    for b, places in enumerate(slots):
        wanted = model.head(states[b, places - model.shift])
        patient.expect_close(got[b], wanted, f"logits of slots of sample {b}, and of rows {model.shift} before them")
        other = model.head(states[b, places - 1 + model.shift])
        gap = patient.apart(got[b], other)
        expect(gap > patient.tolerance, "rows before slots and slots themselves predict the same: nothing is shown")
    return f"shift {model.shift}"


def cache(patient: Patient) -> str:
    """A cache is what it says: the prefix mask, the first pass, or every row again."""
    own = own_cache(patient)
    said = []
    for name in dict.fromkeys(("none", own, *MASKED_CACHES.get(own, ()))):
        if name == "none":
            continue
        prompts = patient.prompts[: 2 if patient.backbone.batches else 1]
        check = {"prefix": _prefix_mask, "crop": _first_pass}.get(name, _every_pass)
        said.append(f"{name}: {check(patient, prompts, name)}")
    if not said:
        raise NotHere("the backbone has no cache of its own")
    return "; ".join(said)


MASKED_CACHES = dict.fromkeys(("none", "prefix", "crop"), ("prefix", "crop"))
"""Caches that any backbone of masks and full attention can run with, whichever is its own."""


def _steps(patient: Patient, prompts: Sequence[Prompt], name: str) -> list[Step]:
    rule = rule_of(patient, recipe_of(patient, NOTHING, name))
    model = patient.backbone
    canvas = make_canvas(prompts, patient.mask_embed, rule.gen_length)
    tracer = Tracer(model, ProbeTable(()), canvas, seeds=list(range(len(prompts))))
    *steps, _ = denoise(canvas, tracer, rule, model.embed, draws(0, list(range(len(prompts)))))
    return [s for s in steps if not isinstance(s, Finished)]


def _prefix_mask(patient: Patient, prompts: Sequence[Prompt], name: str) -> str:
    """Every step against one pass over all rows, in which the prompt sees only itself.

    The row that predicts the first slot may be the prompt's, which only the prefill computes.
    """
    model, steps = patient.backbone, _steps(patient, prompts, name)
    tokens = np.full((len(prompts), SLOTS), model.special.mask)
    gap = 0.0
    for step in steps if patient.compares_later else steps[:1]:
        where = f"cache `{name}`, {step.clock.phase} at step {step.clock.step}"
        for b, prompt in enumerate(prompts):
            computed = step.clock.phase is Phase.PREFILL or torch.tensor(step.slots) >= model.shift
            looked = (step.eligible[b].cpu() & computed).nonzero()[:, 0].to(patient.device)
            if not len(looked):
                continue
            told = patient.told([prompt], model.embed(torch.as_tensor(tokens[b], device=patient.device)))
            p = told.canvas.prompt_length[0]
            masks = tuple(m.clone() for m in patient.written(model.sees(told.rows, told.rows), told))
            for m in masks:
                m[:, :, :p, p:] = False
            states = patient.states(told.embeds, told.rows, masks)[0]
            slots = torch.tensor(step.slots, device=patient.device)[looked]
            got, wanted = step.logits[b, looked], model.head(states[slots + p - model.shift])
            known = ~got.isinf()  # what is never predicted
            gap = max(gap, patient.expect_close(got[known], wanted[known], f"{where}, slots {slots.tolist()}"))
        tokens = step.tokens
    return f"{len(steps)} passes equal the prefix mask up to {gap:.0e}"


def _first_pass(patient: Patient, prompts: Sequence[Prompt], name: str) -> str:
    cached, plain = _steps(patient, prompts, name), _steps(patient, prompts, "none")
    expect(bool((cached[0].logits == plain[0].logits).all()), f"cache `{name}`: the first pass is not the plain one")
    return "the first pass is the plain one, bit for bit"


def _every_pass(patient: Patient, prompts: Sequence[Prompt], name: str) -> str:
    rule = rule_of(patient, recipe_of(patient, NOTHING, name))
    if not rule.caching.exact:
        return _first_pass(patient, prompts, name)
    gap = 0.0
    count = len(prompts)
    cached, plain = answers(patient, count, cache=name), answers(patient, count)
    for i, (a, b) in enumerate(zip(cached, plain, strict=True)):
        gap = max(gap, alike(patient, a, b, f"cache `{name}`, sample {i}"))
        spared = a.arrays["rows_computed"].sum() < b.arrays["rows_computed"].sum()
        expect(bool(spared), f"cache `{name}` computes as many rows as none")
    return f"every pass equals one without a cache up to {gap:.0e}"


CHECKS = (shift, cache)
