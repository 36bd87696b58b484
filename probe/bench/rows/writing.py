"""What writing a trace takes of a run, and that the device never waits for it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import timer

from probe.bench.equality import same_values
from probe.bench.line import Line, Target
from probe.bench.rows.recording import RECIPE
from probe.bench.shapes import Bench
from probe.bench.turns import spread
from probe.compile import compile_recipe
from probe.data.sample import Sample
from probe.errors import ProbeError
from probe.recipe import parse_recipe
from probe.run_files import open_writer, record_of
from probe.trace import open_trace

TARGET = Target("at most", 0.02, "%")


class _Torch(TorchDispatchMode):
    """Counts operations on tensors: without one, nothing can wait for the device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def run(bench: Bench) -> list[Line]:
    """Seconds of writing a sample with everything recorded, as a share of the seconds that it ran."""
    recipe = parse_recipe(RECIPE)
    table = compile_recipe(recipe, bench.model.facts)
    sample = Sample("bench", (Image.new("RGB", (384, 384)),), "?")
    ran, wrote, operations = [], [], 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.trace.h5"
        result = bench.answer(table)  # pays for what libraries do once
        made: list[dict[str, np.ndarray]] = []
        options: dict[str, Any] = {"command": "probe bench", "code_probes": (), "resume": False}
        with open_writer(path, recipe, table, bench.model, **options) as writer:
            for number in range(bench.repeats + 1):
                started = timer()
                result = bench.answer(table)
                ended = timer()
                with _Torch() as seen:
                    writer.write(record_of(sample, number, result, pictures=True))
                operations += seen.count
                made.append(result.arrays)
                if number:  # the first one makes the variables
                    ran.append(ended - started)
                    wrote.append(timer() - ended)
        with open_trace(path) as trace:
            for number, arrays in enumerate(made):
                for name in ("token", "confidence", "attention_mass", "visual_importance", "entropy"):
                    equal = same_values("writing", name, trace.row(name, number), arrays[name], 0.0)
    if operations:
        raise ProbeError(f"bench row `writing`: {operations} operations on tensors happened while a trace was written")
    share = spread([w / r for w, r in zip(wrote, ran, strict=True)])
    return [
        Line(
            row="writing",
            what="writing the trace of a sample with everything recorded, of its run",
            target=TARGET,
            value=share,
            equal=f"what is read back, {equal.split(' within')[0]} and four more",
            shape=bench.told(),
            note=f"{1e3 * spread(wrote).median:.1f} ms after {spread(ran).median:.2f} s; no tensor touched, so no wait",
            numbers={"seconds": spread(ran).median, "seconds_writing": spread(wrote).median},
        )
    ]
