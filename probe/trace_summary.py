"""What a whole trace says in numbers, and whether it still holds what was written. Reads through `Trace` only."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from probe.site import Fate
from probe.trace_schema import header_crc, record_crc

if TYPE_CHECKING:
    from probe.trace import Trace


def summarize(trace: Trace) -> dict[str, Any]:
    """The numbers of a run. Means are over samples that did not fail; what was not recorded is None.

    - `n_samples`, `n_failed`, `n_scored`: counts; `tasks`, `metrics`: the names that occur
    - `mean_score`, `score_interval`: mean and its 95 % interval, mean ± 1.96 standard errors (None for one sample)
    - `seconds_per_sample`, `seconds_total` (s), `flops_per_sample`, `peak_memory` (largest, in the variable's unit)
    - `retention`: share of the visual tokens that are kept, mean over steps and layers, then over samples
    - `visual_tokens`: how many visual tokens a sample has before pruning, mean
    """
    failed = trace.array("failed") != ""
    scores = trace.array("score")
    scored = scores[~np.isnan(scores) & ~failed]
    interval = None
    if len(scored) > 1:
        error = 1.96 * float(scored.std(ddof=1)) / math.sqrt(len(scored))
        interval = (float(scored.mean()) - error, float(scored.mean()) + error)
    seconds = _scalars(trace, "seconds_total", failed)
    flops = _scalars(trace, "flops_total", failed)
    memory = _scalars(trace, "peak_memory", failed)
    kept, visual = _retention(trace, failed)
    return {
        "n_samples": trace.n_samples,
        "n_failed": int(failed.sum()),
        "n_scored": len(scored),
        "tasks": sorted(set(trace.array("task").tolist())),
        "metrics": sorted(set(trace.array("metric")[~failed].tolist())),
        "mean_score": _mean(scored),
        "score_interval": interval,
        "seconds_per_sample": _mean(seconds),
        "seconds_total": float(seconds.sum()) if len(seconds) else None,
        "flops_per_sample": _mean(flops),
        "peak_memory": float(memory.max()) if len(memory) else None,
        "retention": kept,
        "visual_tokens": visual,
    }


def _scalars(trace: Trace, name: str, failed: np.ndarray) -> np.ndarray:
    """Recorded values of a variable (sample,), as float64; empty if the trace has no such variable."""
    variable = trace.variables.get(name)
    if variable is None or variable.dims:
        return np.zeros(0)
    values = trace.array(name)[~failed].astype(np.float64)
    return values[~np.isnan(values)] if variable.is_float else values[values >= 0]


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _retention(trace: Trace, failed: np.ndarray) -> tuple[float | None, float | None]:
    """Mean share of visual tokens kept, and mean number of them, from `visual_tokens` or else `visual_kept`."""
    shares: list[float] = []
    counts: list[int] = []
    name = next((n for n in ("visual_tokens", "visual_kept") if n in trace.variables), None)
    if name is None:
        return None, None
    for i in np.flatnonzero(~failed).tolist():
        values = trace.row(name, i)
        total = unpruned_tokens(trace, i)
        if name == "visual_kept":
            known = values != 0
            share = np.mean(values[known] == Fate.KEPT) if known.any() else math.nan
        else:
            total = total or int(values.max(initial=0))  # no variable has the axis: the most that was ever there
            recorded = values[values >= 0]
            share = np.mean(recorded) / total if len(recorded) and total else math.nan
        if not math.isnan(share):
            shares.append(float(share))
            counts.append(total)
    return _mean(np.array(shares)), _mean(np.array(counts, np.float64))


def unpruned_tokens(trace: Trace, row: int) -> int:
    """Visual tokens that a sample has before anything is removed.

    With probes in the image encoder the axis `visual` counts patches instead, and a variable of its own says it.
    """
    if "visual_original" in trace.variables:
        return int(trace.array("visual_original")[row])
    return trace.extents(row).get("visual", 0)


def problems(trace: Trace, rows: Iterable[int] | None = None) -> list[str]:
    """What differs from what was written: header, and per sample the numbers, texts, picture and padding."""
    found: list[str] = []
    stored = trace.attrs.get("header_crc32")
    declared = trace.declared()
    if stored is None:
        found.append(f"{trace.path.name}: the header has no checksum")
    elif declared and stored != header_crc(trace.attrs, trace.coords, declared):
        found.append(f"{trace.path.name}: header, axis names or variable descriptions are not what was written")
    for i in range(trace.n_samples) if rows is None else rows:
        try:
            found += [f"{trace.path.name}, row {i}: {what}" for what in _row_problems(trace, i)]
        except Exception as error:  # damaged files fail in every way that a library can; each is a finding
            found.append(f"{trace.path.name}, row {i}: cannot be read ({type(error).__name__}: {error})")
    return found


def _row_problems(trace: Trace, i: int) -> list[str]:
    found: list[str] = []
    sums = trace.checksums(i)
    extents = trace.extents(i)
    record = trace.record(i)
    if record.failed or all(sums.get(n, -1) < 0 for n in trace.variables):
        ragged: dict[str, int] = {}
    else:
        ragged = {axis: n for axis, n in extents.items() if axis not in trace.coords}
    if record_crc(record, ragged) not in (sums.get("record"), None):
        found.append("texts, score or extents are not what was written")
    picture = sums.get("picture", -1)
    if (zlib.crc32(record.picture) if record.picture is not None else -1) != picture:
        found.append("the picture is not what was written")
    for name, variable in trace.variables.items():
        if name not in sums:
            if name != "score":
                found.append(f"`{name}` has no checksum")
            continue
        whole = trace.padded_row(name, i)
        cut = tuple(slice(extents.get(axis)) for axis in variable.dims)
        if sums[name] >= 0:
            real = np.ascontiguousarray(whole[cut])
            if zlib.crc32(real.tobytes()) != sums[name]:
                found.append(f"`{name}` is not what was written")
            whole = whole.copy()
            whole[cut] = variable.fill_value
        fill = np.array(variable.fill_value, whole.dtype)
        if not (np.isnan(whole).all() if np.isnan(fill) else (whole == fill).all()):
            found.append(f"`{name}` has values where this sample has none")
    return found
