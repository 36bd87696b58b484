"""Peak memory of recording, each run in a process of its own.

On a CPU that is the largest resident size of the whole process, on CUDA what was allocated at most. `python -m
probe.bench.rows.memory JSON` is such a process: it prints the bytes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from probe.bench.equality import same_tokens
from probe.bench.line import Line, Target
from probe.bench.rows.recording import RECIPE
from probe.bench.shapes import NOTHING, Bench, Shape, table_of
from probe.bench.turns import Spread, spread
from probe.errors import ProbeError

EXTRA = Target("at most", 0.05, "%")
STEPS = Target("at most", 0.005, "%")


def run(bench: Bench) -> list[Line]:
    """Extra peak memory of recording at every step and layer, and what twice as many steps add to it."""
    repeats = 1 if bench.quick else min(bench.repeats, 3)
    twice = replace(bench, shape=bench.sized(steps=2 * bench.shape.steps), memo={})
    peaks: dict[str, list[float]] = {"none": [], "recording": [], "twice": [], "none twice": []}
    for _ in range(repeats):
        sides = [
            ("none", bench, False),
            ("recording", bench, True),
            ("none twice", twice, False),
            ("twice", twice, True),
        ]
        tokens: dict[str, Any] = {}
        for name, conditions, recording in sides:
            peak, tokens[name] = in_process(conditions, recording=recording)
            peaks[name].append(peak)
        equal = same_tokens("memory", "recording", tokens["recording"], "no recording", tokens["none"])
        same_tokens("memory", "recording", tokens["twice"], "no recording", tokens["none twice"])
    extra = _share(peaks, "recording", "none")
    grown = [
        (b - bb) / bb - (a - aa) / aa
        for a, aa, b, bb in zip(peaks["recording"], peaks["none"], peaks["twice"], peaks["none twice"], strict=True)
    ]
    added = (peaks["recording"][0] - peaks["none"][0]) / 2**20
    more = (peaks["twice"][0] - peaks["none twice"][0]) / 2**20
    kind = "resident set of the process" if bench.device == "cpu" else "allocated on the device"
    shared: dict[str, Any] = {"row": "memory", "equal": equal, "shape": bench.told()}
    return [
        Line(
            what="extra peak memory of the recording, of the peak without",
            target=EXTRA,
            value=extra,
            note=f"{added:+.1f} of {peaks['none'][0] / 2**20:.0f} MB, {kind}",
            numbers={name: values[0] for name, values in peaks.items()},
            **shared,
        ),
        Line(
            what="how much more of it with twice as many steps",
            target=STEPS,
            value=spread(grown),
            note=f"{added:+.1f} MB with {bench.shape.steps} steps, {more:+.1f} MB with {twice.shape.steps}",
            **shared,
        ),
    ]


def _share(peaks: dict[str, list[float]], with_it: str, without: str) -> Spread:
    return spread([(a - b) / b for a, b in zip(peaks[with_it], peaks[without], strict=True)])


def in_process(bench: Bench, *, recording: bool) -> tuple[float, list[list[int]]]:
    """Peak bytes and tokens of one run in a fresh process. Raises `ProbeError` if that process fails."""
    command = [sys.executable, "-m", "probe.bench.rows.memory", json.dumps(told(bench, recording=recording))]
    done = subprocess.run(command, capture_output=True, text=True, env=own_path(), check=False)
    if done.returncode:
        raise ProbeError(f"bench row `memory`: its process failed: {done.stderr.strip()[-400:]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return float(found["peak"]), found["tokens"]


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
    """Run as one is told, and print the peak and the tokens."""
    import torch

    torch.set_num_threads(told.pop("threads"))
    recording = told.pop("recording")
    bench = Bench(shape=Shape(**told.pop("shape")), **told)
    table = table_of(bench.model, RECIPE, []) if recording else NOTHING
    fresh = bench.device == "cpu" and _forget_peak()
    result = bench.answer(table)
    peak = _peak() if fresh else float(result.arrays["peak_memory"])
    print(json.dumps({"peak": peak, "tokens": result.arrays["token"].tolist()}))


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
