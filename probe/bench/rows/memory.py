"""Peak memory of recording, each run in a process of its own.

On a CPU that is the largest resident size of the whole process, on CUDA what was allocated at most. `python -m
probe.bench.rows.memory JSON` is such a process: it prints the bytes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from probe.bench.equality import same_tokens
from probe.bench.line import Line, Target
from probe.bench.rows.recording import RECIPE
from probe.bench.shapes import NOTHING, Bench, Shape, table_of
from probe.bench.turns import spread
from probe.errors import ProbeError

EXTRA = Target("at most", 0.05, "%")
STEPS = Target("at most", 0.005, "%")


def run(bench: Bench) -> list[Line]:
    """Extra peak memory of recording at every step and layer, and what twice as many steps add to it.

    A process runs the steps, then twice as many: what that adds to its peak is what grew.
    """
    peaks: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for _ in range(1 if bench.quick else min(bench.repeats, 3)):
        tokens: dict[bool, Any] = {}
        for recording in (False, True):
            (first, second), tokens[recording] = in_process(bench, recording=recording)
            peaks[recording].append((first, second))
        for on, off in zip(tokens[True], tokens[False], strict=True):
            equal = same_tokens("memory", "recording", on, "no recording", off)  # once, and twice the steps
    extra = spread([(on - off) / off for (on, _), (off, _) in zip(peaks[True], peaks[False], strict=True)])
    grown = spread([(twice - once) / once for once, twice in peaks[True]])
    (once, twice), (without, _) = peaks[True][0], peaks[False][0]
    kind = "resident set of the process" if bench.device == "cpu" else "allocated on the device"
    shared: dict[str, Any] = {"row": "memory", "equal": equal, "shape": bench.told()}
    return [
        Line(
            what="extra peak memory of the recording, of the peak without",
            target=EXTRA,
            value=extra,
            note=f"{(once - without) / 2**20:+.1f} of {without / 2**20:.0f} MB, {kind}",
            numbers={"bytes": once, "bytes_none": without},
            **shared,
        ),
        Line(
            what="what twice as many steps add to the peak with recording",
            target=STEPS,
            value=grown,
            note=f"{(twice - once) / 2**20:+.1f} MB from {bench.shape.steps} steps to {2 * bench.shape.steps}",
            **shared,
        ),
    ]


def in_process(bench: Bench, *, recording: bool) -> tuple[tuple[float, float], list[list[list[int]]]]:
    """Peak bytes, and tokens, of the steps and then of twice as many in a fresh process.

    Raises `ProbeError` if that process fails.
    """
    command = [sys.executable, "-m", "probe.bench.rows.memory", json.dumps(told(bench, recording=recording))]
    done = subprocess.run(command, capture_output=True, text=True, env=own_path(), check=False)
    if done.returncode:
        raise ProbeError(f"bench row `memory`: its process failed: {done.stderr.strip()[-400:]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    first, second = found["peaks"]
    return (first, second), found["tokens"]


def told(bench: Bench, *, recording: bool) -> dict[str, Any]:
    """What such a process is told."""
    import torch

    return {
        "shape": asdict(bench.shape), "device": bench.device, "dtype": bench.dtype, "seed": bench.seed,
        "published": bench.published, "random_weights": bench.random_weights,
        "published_layers": bench.published_layers, "recording": recording, "threads": torch.get_num_threads(),
    }  # fmt: skip


def own_path() -> dict[str, str]:
    """The environment of a process that finds the package where this one did."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def child(told: dict[str, Any]) -> None:
    """Run as one is told, then with twice the steps, and print both peaks and both runs' tokens."""
    import torch

    torch.set_num_threads(told.pop("threads"))
    recording = told.pop("recording")
    bench = Bench(shape=Shape(**told.pop("shape")), **told)
    table = table_of(bench.model, RECIPE, []) if recording else NOTHING
    peaks, tokens = [], []
    fresh = bench.device == "cpu" and _forget_peak()
    for steps in (bench.shape.steps, 2 * bench.shape.steps):
        result = bench.answer(table, shape=bench.sized(steps=steps))
        peaks.append(_peak() if fresh else float(result.arrays["peak_memory"]))
        tokens.append(result.arrays["token"].tolist())
    print(json.dumps({"peaks": peaks, "tokens": tokens}))


def _forget_peak() -> bool:
    """Have Linux count the largest resident size from here on: building the model is none of the run."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak() -> float:
    """Bytes: the largest resident size since then."""
    words = Path("/proc/self/status").read_text().split()
    return 1024.0 * int(words[words.index("VmHWM:") + 1])


if __name__ == "__main__":
    child(json.loads(sys.argv[1]))
