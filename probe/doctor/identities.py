"""Identities of the engine on a backbone, with and without its cache, one sample or all: no expected numbers needed.

The first line of each docstring is the text that is printed for it.
"""

from __future__ import annotations

import numpy as np

from probe.doctor.patient import NotHere, Patient, expect
from probe.doctor.runs import (
    EDITS,
    NOTHING,
    RECORD,
    WITHDRAW,
    alike,
    answers,
    generated,
    own_and_none,
    same,
    seen_ways,
    ways,
)
from probe.site import Fate


def batch(patient: Patient) -> str:
    """A batch is its samples one by one: answers, confidence, recorded attention."""
    if not patient.backbone.batches:
        raise NotHere("the backbone takes one sample at a time")
    gap, names, count = 0.0, ("confidence", "attention_mass", "entropy"), len(patient.prompts)
    for cache in own_and_none(patient):
        for probes in (NOTHING + RECORD, EDITS["layer"] + RECORD):
            for i, got in enumerate(answers(patient, count, probes, cache)):
                (alone,) = generated(patient, [i], probes, cache)
                gap = max(gap, alike(patient, got, alone, f"cache {cache}, sample {i} in a batch and alone", names))
    return f"{count} samples, with and without an intervention, differ by {gap:.0e}"


def keep(patient: Patient) -> str:
    """Keeping every visual token is no probe, bit for bit."""
    for run, where in ways(patient):
        for edit, text in EDITS.items():
            for a, b in zip(run(text.replace("keep: 0.5", "keep: 1.0")), run(NOTHING), strict=True):
                same(a, b, f"{where}, intervention at {edit}")
    return seen_ways(patient)


def record(patient: Patient) -> str:
    """Recording changes nothing, bit for bit."""
    for run, where in ways(patient):
        for probes in (NOTHING, EDITS["layer"]):
            for a, b in zip(run(probes + RECORD), run(probes), strict=True):
                same(a, b, where)
    return seen_ways(patient)


def drop(patient: Patient) -> str:
    """Masking visual tokens is dropping them with positions kept; both change something."""
    gap = 0.0
    for run, where in ways(patient):
        for edit, text in EDITS.items():
            at = f"{where}, intervention at {edit}"
            for a, b, plain in zip(run(text), run(text.replace("drop", "mask")), run(NOTHING), strict=True):
                gap = max(gap, alike(patient, a, b, at))
                steps = slice(None if patient.compares_later else 1)  # later ones may choose otherwise
                alive = [x.arrays["visual_kept"][steps] == int(Fate.KEPT) for x in (a, b)]
                expect(bool((alive[0] == alive[1]).all()), f"{at}: other tokens are masked than dropped")
                expect(not alive[0].all(), f"{at}: nothing was dropped")
                moved = not np.array_equal(a.arrays["confidence"], plain.arrays["confidence"], equal_nan=True)
                expect(moved, f"{at}: dropping half of the visual tokens changes nothing")
    return f"{seen_ways(patient)}; differ by {gap:.0e}"


def withdraw(patient: Patient) -> str:
    """Withdrawing visual tokens after the last layer is nothing."""
    gap = 0.0
    for run, where in ways(patient):
        for a, b in zip(run(WITHDRAW), run(NOTHING), strict=True):
            gap = max(gap, alike(patient, a, b, where))
    return f"{seen_ways(patient)}; differ by {gap:.0e}"


def ledger(patient: Patient) -> str:
    """Every visual token has one fate in each (step, layer); attention mass sums to 1."""
    for run, where in ways(patient):
        for text in (NOTHING, *EDITS.values()):
            for out in run(text + RECORD):
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
        for cache in own_and_none(patient):
            for edit, text in {"none": NOTHING, "layer": EDITS["layer"]}.items():
                with FlopCounterMode(display=False) as counter:
                    (out,) = generated(patient, [0], text, cache)
                told, counted = int(out.arrays["flops"].sum()), counter.get_total_flops()
                expect(told == counted, f"cache {cache}, intervention {edit}: {told} told, torch counts {counted}")
            said.append(f"cache {cache}, pruned: {counted / 1e6:.2f} MFLOPs")
    return "; ".join(said)


def cost(patient: Patient) -> str:
    """What a step costs."""
    said = []
    for cache in own_and_none(patient):
        runs = [generated(patient, [0], NOTHING, cache)[0] for _ in range(3)][1:]  # the first does what is done once
        times = np.concatenate([out.arrays["seconds"].sum(-1)[1:] for out in runs])
        rows, flops = int(runs[0].arrays["rows_computed"][-1]), runs[0].arrays["flops"][-1].sum()
        said.append(f"cache {cache}: {1e3 * np.median(times):.1f} ms ({rows} rows, {flops / 1e6:.1f} MFLOPs)")
    return "; ".join(said)


CHECKS = (batch, keep, record, drop, withdraw, ledger, flops, cost)
