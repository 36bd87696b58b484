"""What a run leaves behind: its folder, the header of its traces, the record of a sample. No model, no loop."""

from __future__ import annotations

import io
import platform
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from probe import data
from probe.assemble import ALWAYS, coordinates, recorded_variables
from probe.attend import kernel_name
from probe.backbones.base import Backbone
from probe.compile import ProbeTable
from probe.data.pictures import sheet_of
from probe.errors import ProbeError
from probe.generate import Generated
from probe.probe_code import CodeProbe
from probe.recipe import Recipe
from probe.trace import TraceWriter
from probe.trace_schema import SampleRecord, TraceHeader

PICTURE_SIDE = 768
"""Pixels: the longer side of the picture that a trace keeps for painting on; several stand on one sheet."""


def output_folder(name: str, out: str | Path | None, *, resume: bool) -> Path:
    """The folder of a run, made if need be: `out`, else `runs/NAME`, or `runs/NAME-2` ... where that is taken.

    Finished traces are never replaced. `resume` goes back to the last of those folders.
    """
    if out is not None:
        return _made(Path(out))
    first = Path("runs") / name.replace("/", "-")
    tried = [first, *(first.with_name(f"{first.name}-{i}") for i in range(2, 10_000))]
    free = next(i for i, folder in enumerate(tried) if not folder.exists())
    if resume:
        return _made(tried[max(free - 1, 0)])
    for folder in tried[free:]:
        with suppress(FileExistsError):  # another run that began at the same moment may have taken it
            return _made(folder, fresh=True)
    raise ProbeError(f"all of {first} ... {tried[-1].name} are taken; name a folder with --out")


def _made(folder: Path, *, fresh: bool = False) -> Path:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=not fresh)
    except OSError as error:
        if fresh and isinstance(error, FileExistsError):
            raise
        raise ProbeError(
            f"cannot make the folder {folder} for the traces: {error.strerror}; name another with --out"
        ) from None
    return folder


def open_writer(
    path: Path,
    recipe: Recipe,
    table: ProbeTable,
    backbone: Backbone,
    *,
    command: str,
    code_probes: Sequence[CodeProbe],
    resume: bool,
    own_samples: bool = False,
) -> TraceWriter:
    """A trace for one side of a run, with all that tells how it came about."""
    weights = next(backbone.parameters())
    packages = ["torch", "transformers", "nnsight", "h5py", "numpy"]
    if recipe.data.lmms_eval is not None:
        packages.append("lmms-eval")
    records = any(p.records for p in table.probes)
    header = TraceHeader(
        recipe_name=recipe.name,
        recipe_yaml=recipe.to_yaml(),
        recipe_hash=recipe.hash,
        backbone=backbone.source,
        weights_revision=backbone.revision,
        dtype=str(weights.dtype).removeprefix("torch."),
        attention_kernel=kernel_name(cast(Any, backbone.lm).config._attn_implementation),
        device="cpu" if backbone.device.type == "cpu" else torch.cuda.get_device_name(backbone.device),
        seed=recipe.generate.seed,
        versions={
            "python": platform.python_version(),
            "platform": sys.platform,
            **{package: version(package) for package in packages},
        },
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        coords=coordinates(table),
        extra={
            "default_plot": "attention_mass" if records else "commit_step",
            "own_samples": int(own_samples),
            "end_tokens": " ".join(map(str, dict.fromkeys((backbone.special.stop, backbone.special.eos)))),
        },
    )
    variables = [*ALWAYS, *recorded_variables(table), *(c.variable for c in code_probes)]
    return TraceWriter(path, header, variables, resume=resume)


def record_of(sample: data.Sample, number: int, result: Generated, *, pictures: bool) -> SampleRecord:
    """A finished sample, scored."""
    return SampleRecord(
        sample=number,
        sample_id=sample.id,
        task=sample.task,
        question=sample.question,
        references=tuple(sample.answers),
        prediction=result.text,
        metric=sample.metric,
        score=_score(sample, result.text),
        arrays=result.arrays,
        picture=_png(sample) if pictures and sample.pictures else None,
    )


def _score(sample: data.Sample, text: str) -> float:
    """From 0 to 1; NaN where there is nothing to compare with."""
    if sample.judge is not None:
        return float(sample.judge(text))
    known = sample.answers and sample.metric in data.METRICS
    return float(data.METRICS[sample.metric](text, sample.answers)) if known else np.nan


def failure_of(sample: data.Sample | ProbeError, number: int, reason: str) -> SampleRecord:
    """A sample that failed, with the reason."""
    if isinstance(sample, ProbeError):
        return SampleRecord(sample=number, sample_id=str(number), failed=reason)
    return SampleRecord(
        sample=number,
        sample_id=sample.id,
        task=sample.task,
        question=sample.question,
        references=tuple(sample.answers),
        metric=sample.metric,
        failed=reason,
    )


def _png(sample: data.Sample) -> bytes:
    buffer = io.BytesIO()
    sheet_of(sample.pictures, PICTURE_SIDE).save(buffer, "PNG")
    return buffer.getvalue()
