"""The table of a run, read back from its traces: score, agreement, time, cost, visual tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from probe.data.metrics import agreement
from probe.trace import open_trace


@dataclass(frozen=True)
class Row:
    """One line of the table. Means over the samples that did not fail; NaN where nothing is known.

    `seconds` is wall time per sample with nothing recorded; `flops` executed FLOPs per sample; `visual_tokens` the
    mean over layers and steps (so the trajectory average); `retention` the same as a share of the original.
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


def summarise(paths: Sequence[Path], labels: Sequence[str]) -> tuple[Row, ...]:
    """One row per trace; agreement is with the first trace, paired by sample."""
    rows: list[Row] = []
    reference: dict[int, str] = {}
    for i, (path, label) in enumerate(zip(paths, labels, strict=True)):
        with open_trace(path) as trace:
            scores, seconds, flops, tokens, retention, agreed = [], [], [], [], [], []
            for row in range(trace.n_samples):
                record = trace.record(row)
                if record.failed:
                    continue
                if i == 0:
                    reference[record.sample] = record.prediction
                elif record.sample in reference:
                    agreed.append(agreement(reference[record.sample], record.prediction))
                scores.append(record.score)
                seconds.append(float(record.arrays["seconds_unrecorded"]))
                flops.append(float(record.arrays["flops_total"]))
                counts = record.arrays["visual_tokens"]
                original = record.arrays["visual_role"].shape[0]
                tokens.append(float(counts.mean()) if counts.size else np.nan)
                retention.append(tokens[-1] / original if original else np.nan)
        rows.append(
            Row(
                label=label,
                n=len(scores),
                score=_mean(scores),
                score_half_width=_half_width(scores),
                agreement=_mean(agreed) if i else (1.0 if scores else np.nan),
                seconds=_mean(seconds),
                flops=_mean(flops),
                visual_tokens=_mean(tokens),
                retention=_mean(retention),
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
