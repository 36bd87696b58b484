"""What the command line says about a bench, as the thing itself; and its rows as text."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch

from probe.bench.equality import TOLERANCE
from probe.bench.shapes import Bench, Shape
from probe.bench.suite import Row, command_of
from probe.errors import ProbeError
from probe.runner import pick_device

HEAD = 64
"""Width of a head of the medium model."""


def prepared(
    *,
    device: str = "cpu",
    dtype: str = "float32",
    threads: int | None = None,
    quick: bool = False,
    backbone: str | None = None,
    random_weights: bool = False,
    layers: int | None = None,
    tokens: int | None = None,
    answer: int | None = None,
    width: int | None = None,
) -> Bench:
    """A bench of these settings. Raises `ProbeError` for those that do not go together."""
    if dtype not in TOLERANCE:
        raise ProbeError(f"--dtype {dtype}: known are {', '.join(TOLERANCE)}")
    if random_weights and backbone is None:
        raise ProbeError("--random-weights makes a published shape: name it with --backbone")
    if backbone is not None and width is not None:
        raise ProbeError("--width belongs to the medium model; a backbone has its own")
    if width is not None and width % HEAD:
        raise ProbeError(f"--width {width}: heads are {HEAD} wide, so it must be a multiple of that")
    if threads is not None:
        torch.set_num_threads(threads)
    given = {"visual": tokens, "answer": answer}
    if backbone is None:
        heads = None if width is None else width // HEAD
        given |= {"layers": layers, "width": width, "heads": heads, "mlp": None if width is None else 11 * width // 4}
    return Bench(
        shape=Shape(**{name: value for name, value in given.items() if value is not None}),
        device=pick_device(device),
        dtype=dtype,
        quick=quick,
        published=backbone,
        random_weights=random_weights,
        published_layers=layers if backbone is not None else None,
    )


def shared_by(jobs: int | None, threads: int | None, *, quick: bool, device: str) -> int:
    """How many processes share the rows. Raises `ProbeError` for what cannot be shared.

    Each has one thread: two would share the short sequences of a pruned run out worse than the long ones of an
    unpruned one, which is not what the rows are about.
    """
    on_cpu = pick_device(device) == "cpu"
    if jobs is None:
        return 2 if quick and on_cpu and threads is None and (os.cpu_count() or 1) > 1 else 1
    if jobs > 1 and not on_cpu:
        raise ProbeError("--jobs shares a processor's cores; on a GPU the rows run one after the other")
    if jobs > 1 and threads not in (None, 1):
        raise ProbeError(f"--threads {threads}: processes that share the rows (--jobs) have one thread each")
    return jobs


def listing(rows: Iterable[Row]) -> str:
    """Rows, targets and commands as text."""
    lines = [f"{row.name:10} {row.what} ({', '.join(row.targets)})\n{'':10} {command_of(row)}" for row in rows]
    return "\n".join(lines)
