"""The table of a run, read back from its traces: score, agreement, time, cost, visual tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from probe.data.metrics import agreement
from probe.trace import open_trace
from probe.trace_summary import unpruned_tokens


@dataclass(frozen=True)
class Row:
    """One line of the table. Means over the samples that did not fail; NaN where nothing is known.

    `seconds` is wall time and `flops` executed FLOPs per sample with nothing recorded (where that was not measured:
    FLOPs as recorded, attention rows for signals included); `visual_tokens` the
    mean over layers and steps (so the trajectory average); `retention` the same as a share of the original;
    `untouched` counts the samples with pictures that kept every visual token to the end.
    """

    label: str
    n: int
    score: float
    score_half_width: float
    agreement: float
    seconds: float
    flops: float
    visual_tokens: float
    retention: float
    untouched: int
    failed: int = 0
    speed: float = float("nan")
    """Seconds of unpruned runs that took turns with these, over these; only a sweep's table has it."""


def summarise(paths: Sequence[Path], labels: Sequence[str]) -> tuple[Row, ...]:
    """One row per trace; agreement is with the first trace, paired by sample."""
    rows: list[Row] = []
    reference: dict[int, str] = {}
    for i, (path, label) in enumerate(zip(paths, labels, strict=True)):
        with open_trace(path) as trace:
            samples, failed, texts = trace.array("sample"), trace.array("failed"), trace.array("prediction")
            ran = [k for k in range(trace.n_samples) if not failed[k]]
            predictions = {int(samples[k]): str(texts[k]) for k in ran}
            reference = reference if i else predictions
            agreed = [agreement(reference[n], text) for n, text in predictions.items() if n in reference]
            tokens = [float(trace.row("visual_tokens", k).mean()) for k in ran]
            original = [unpruned_tokens(trace, k) for k in ran]
            retention = [t / n if n else np.nan for t, n in zip(tokens, original, strict=True)]
            scores = trace.array("score")[ran].tolist()
            seconds, clean = (trace.array(name)[ran] for name in ("seconds_unrecorded", "flops_unrecorded"))
            flops = trace.array("flops_total")[ran] if "flops_total" in trace.variables else clean
        rows.append(
            Row(
                label=label,
                n=len(scores),
                score=_mean(scores),
                score_half_width=_half_width(scores),
                agreement=_mean(agreed),
                seconds=_mean(seconds.tolist()),
                flops=_mean(np.where(np.isnan(clean), flops, clean).tolist()),
                visual_tokens=_mean(tokens),
                retention=_mean(retention),
                untouched=sum(r == 1.0 for r in retention),
                failed=len(failed) - len(ran),
            )
        )
    return tuple(rows)


def _mean(values: Sequence[float]) -> float:
    known = [v for v in values if not np.isnan(v)]
    return float(np.mean(known)) if known else float("nan")


def _half_width(values: Sequence[float]) -> float:
    """Half of the normal 95 % interval of a mean: 1.96 s / sqrt(n)."""
    known = [v for v in values if not np.isnan(v)]
    return float(1.96 * np.std(known, ddof=1) / np.sqrt(len(known))) if len(known) > 1 else float("nan")
