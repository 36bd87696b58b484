"""Identities of the engine on a backbone, with and without its cache, one sample or all: no expected numbers needed.

The first line of each docstring is the text that is printed for it.
"""

from __future__ import annotations

import statistics

import numpy as np

from probe.compile import compile_recipe
from probe.doctor.patient import NotHere, Patient, expect
from probe.doctor.runs import (
    EDITS,
    NOTHING,
    RECORD,
    WITHDRAW,
    alike,
    own_and_none,
    recipe_of,
    rule_of,
    run,
    same,
    seen_ways,
    ways,
)
from probe.generate import generate
from probe.site import Fate


def batch(patient: Patient) -> str:
    """A batch is its samples one by one: answers, confidence, recorded attention."""
    if not patient.backbone.batches:
        raise NotHere("the backbone takes one sample at a time")
    gap, names = 0.0, ("confidence", "attention_mass", "entropy")
    for name in own_and_none(patient):
        for probes in (RECORD, EDITS["layer"] + RECORD):
            together = run(patient, patient.prompts, probes, name)
            for i, (prompt, got) in enumerate(zip(patient.prompts, together, strict=True)):
                recipe = recipe_of(patient, probes, name)
                table, rule = compile_recipe(recipe, patient.backbone.facts), rule_of(patient, recipe)
                (alone,) = generate(patient.backbone, [prompt], rule, table, samples=[i])
                gap = max(gap, alike(patient, got, alone, f"cache {name}, sample {i} in a batch and alone", names))
    return f"{len(patient.prompts)} samples, with and without an intervention, differ by {gap:.0e}"


def keep(patient: Patient) -> str:
    """Keeping every visual token is no probe, bit for bit."""
    for name, prompts, where in ways(patient):
        plain = run(patient, prompts, NOTHING, name)
        for edit, text in EDITS.items():
            kept = run(patient, prompts, text.replace("keep: 0.5", "keep: 1.0"), name)
            for a, b in zip(kept, plain, strict=True):
                same(a, b, f"{where}, intervention at {edit}")
    return seen_ways(patient)


def record(patient: Patient) -> str:
    """Recording changes nothing, bit for bit."""
    for name, prompts, where in ways(patient):
        for probes in (NOTHING, EDITS["layer"]):
            bare, watched = run(patient, prompts, probes, name), run(patient, prompts, probes + RECORD, name)
            for a, b in zip(watched, bare, strict=True):
                same(a, b, where)
    return seen_ways(patient)


def drop(patient: Patient) -> str:
    """Masking visual tokens gives the answers of dropping them with positions kept; both change something."""
    gap = 0.0
    for name, prompts, where in ways(patient):
        plain = run(patient, prompts, NOTHING, name)
        for edit, text in EDITS.items():
            dropped, masked = (run(patient, prompts, t, name) for t in (text, text.replace("drop", "mask")))
            for a, b, c in zip(dropped, masked, plain, strict=True):
                gap = max(gap, alike(patient, a, b, f"{where}, intervention at {edit}"))
                alive = [x.arrays["visual_kept"] == int(Fate.KEPT) for x in (a, b)]
                expect(bool((alive[0] == alive[1]).all()), f"{where}, {edit}: other tokens are masked than dropped")
                expect(not alive[0].all(), f"{where}, {edit}: nothing was dropped")
                moved = not np.array_equal(a.arrays["confidence"], c.arrays["confidence"], equal_nan=True)
                expect(moved, f"{where}, {edit}: dropping half of the visual tokens changes nothing")
    return f"{seen_ways(patient)}; differ by {gap:.0e}"


def withdraw(patient: Patient) -> str:
    """Withdrawing visual tokens after the last layer is nothing."""
    gap = 0.0
    for name, prompts, where in ways(patient):
        for a, b in zip(run(patient, prompts, WITHDRAW, name), run(patient, prompts, NOTHING, name), strict=True):
            gap = max(gap, alike(patient, a, b, where))
    return f"{seen_ways(patient)}; differ by {gap:.0e}"


def ledger(patient: Patient) -> str:
    """Every visual token has one fate at every (step, layer), and attention mass over segments sums to 1."""
    for name, prompts, where in ways(patient):
        for text in ("", *EDITS.values()):
            for out in run(patient, prompts, text + RECORD, name):
                fates = out.arrays["visual_kept"]
                known = set(np.unique(fates)) <= {int(f) for f in Fate}
                expect(known, f"{where}: there are fates {np.unique(fates).tolist()}")
                counted = ((fates == int(Fate.KEPT)).sum(-1) == out.arrays["visual_tokens"]).all()
                expect(bool(counted), f"{where}: the ledger counts other tokens than it keeps")
                mass = out.arrays["attention_mass"].sum(-1)
                mass = mass[~np.isnan(mass)]
                expect(mass.size > 0, f"{where}: no attention was recorded")
                off = float(np.abs(mass - 1).max())
                expect(off < max(1e-4, patient.tolerance / 10), f"{where}: attention mass misses 1 by {off:.1e}")
    return seen_ways(patient)


def flops(patient: Patient) -> str:
    """Executed FLOPs are those of torch's counter."""
    from torch.utils.flop_counter import FlopCounterMode

    said = []
    with patient.eager():
        for name in own_and_none(patient):
            for edit, text in {"none": NOTHING, "layer": EDITS["layer"]}.items():
                with FlopCounterMode(display=False) as counter:
                    (out,) = run(patient, patient.prompts[:1], text, name)
                told, counted = int(out.arrays["flops"].sum()), counter.get_total_flops()
                expect(told == counted, f"cache {name}, intervention {edit}: {told} told, torch counts {counted}")
            said.append(f"cache {name}, pruned: {counted / 1e6:.2f} MFLOPs")
    return "; ".join(said)


def cost(patient: Patient) -> str:
    """What a step costs."""
    said = []
    for name in own_and_none(patient):
        run(patient, patient.prompts[:1], NOTHING, name)  # what libraries do once
        (out,) = run(patient, patient.prompts[:1], NOTHING, name)
        times = out.arrays["seconds"].sum(-1)[1:]
        rows = int(out.arrays["rows_computed"][-1])
        flops = out.arrays["flops"][-1].sum()
        said.append(f"cache {name}: {1e3 * statistics.median(times):.1f} ms ({rows} rows, {flops / 1e6:.1f} MFLOPs)")
    return "; ".join(said)


CHECKS = (batch, keep, record, drop, withdraw, ledger, flops, cost)
