"""Who is examined: a backbone with its weights, or a small random one of the same layout."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from probe.backbones import load, resolve
from probe.backbones.tiny import LAYERS, WIDTH, tiny_names, write_tiny
from probe.doctor.patient import Patient
from probe.errors import ProbeError


@contextmanager
def admit(
    name: str,
    *,
    random_weights: bool = False,
    layers: int = LAYERS,
    width: int = WIDTH,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "auto",
    attention: str | None = None,
) -> Iterator[Patient]:
    """The patient for the time of a `with` block.

    With `random_weights` the model's small form (`probe.backbones.tiny`) is written into a temporary folder, and read
    by the code that reads the published one; `auto` is float64 then, so that what differs is not rounding. Raises
    `ProbeError` where there are no weights.
    """
    if random_weights and dtype == "auto":
        dtype = "float64"
    options: dict[str, Any] = {"device": device, "dtype": dtype, "attention": attention}
    with ExitStack() as stack:
        where: str | Path = name
        if random_weights:
            root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            where = write_tiny(name, root / name.rsplit("/", 1)[-1], layers=layers, width=width, seed=seed)
        try:
            patient = Patient(load(where, **options), resolve(where), **options)
        except ProbeError as error:
            if random_weights or name not in tiny_names():
                raise
            raise ProbeError(f"{error}\nTo examine it without its weights, add --random-weights") from error
        yield patient
