"""Traces of a few slots whose differences can be counted by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from probe.site import Fate
from probe.trace import SampleRecord, TraceHeader, TraceWriter, Variable

MASK = 99
VARIABLES = [
    Variable("token", ("step", "position"), "1", "token", dtype="int32"),
    Variable("commit_step", ("position",), "1", "step", dtype="int32"),
    Variable("nominal_step", ("step",), "1", "step in the schedule", dtype="int32"),
    Variable("confidence", ("step", "position"), "1", "confidence"),
    Variable("logit_kl", ("step", "position"), "nat", "divergence"),
    Variable("visual_tokens", ("step", "layer"), "1", "visual tokens", dtype="int32"),
    Variable("visual_kept", ("step", "layer", "visual"), "1", "fate", dtype="uint8",
             flags={f.name.lower(): int(f) for f in Fate}),
    Variable("visual_box", ("visual", "corner"), "1", "box"),
    Variable("flops_total", (), "1", "FLOPs", dtype="float64"),
    Variable("seconds_unrecorded", (), "s", "seconds", dtype="float64"),
]  # fmt: skip
RECIPE = "schema: 1\nname: {name}\ndial: {{keep: {keep}, start: {start}}}\nprobes: []\n"


@dataclass(frozen=True)
class One:
    """A sample: tokens by step (MASK: open), and from which step on half of the 4 visual tokens are gone."""

    tokens: Sequence[Sequence[int]]
    pruned_from: int | None = None
    prediction: str = "a b"
    score: float = 1.0
    sample_id: str = ""
    failed: str = ""
    nominal: Sequence[int] | None = None
    kl: Sequence[Sequence[float]] | None = None
    confidence: Sequence[Sequence[float]] | None = None
    flops: float = 100.0
    seconds: float = 2.0
    more: Mapping[str, np.ndarray] = field(default_factory=dict)

    def record(self, number: int) -> SampleRecord:
        sample_id = self.sample_id or f"s{number}"
        if self.failed:
            return SampleRecord(number, sample_id, "task", "Why?", ("a b",), failed=self.failed)
        token = np.array(self.tokens)
        steps, positions = token.shape
        commit = np.full(positions, -1)
        for t in range(steps):
            written = (token[t] != MASK) & (token[t] != token[t - 1] if t else True)
            commit[written] = t
        kept = np.full((steps, 2, 4), int(Fate.KEPT))
        if self.pruned_from is not None:
            kept[self.pruned_from :, :, 2:] = int(Fate.DROPPED)
        arrays = {
            "token": token,
            "commit_step": commit,
            "nominal_step": np.arange(steps) if self.nominal is None else np.array(self.nominal),
            "visual_kept": kept,
            "visual_tokens": (kept == 1).sum(-1),
            "visual_box": np.array([[0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5], [0, 0.5, 0.5, 1], [0.5, 0.5, 1, 1]]),
            "flops_total": np.float64(self.flops),
            "seconds_unrecorded": np.float64(self.seconds),
            **self.more,
        }
        if self.kl is not None:
            arrays["logit_kl"] = np.array(self.kl)
        if self.confidence is not None:
            arrays["confidence"] = np.array(self.confidence)
        return SampleRecord(
            number, sample_id, "task", "Why?", ("a b",), self.prediction, "exact_match", self.score, arrays=arrays
        )


def write(
    path: Path,
    samples: Mapping[int, One],
    *,
    name: str = "r",
    keep: str = "50%",
    start: str = "0%",
    text: str = "",
    **header: object,
) -> Path:
    """A finished trace of these samples; `text` is its recipe, by default one without a probe."""
    fields: dict[str, object] = {"backbone": "toy", "device": "cpu", **header}
    head = TraceHeader(name, text or RECIPE.format(name=name, keep=keep, start=start), "1234", **fields)  # type: ignore[arg-type]
    with TraceWriter(path, head, VARIABLES) as writer:
        for number, one in samples.items():
            writer.write(one.record(number))
    return path
