"""Small random checkpoints in the layouts of published models, for looking into a backbone without its weights.

Each is a folder that `probe.load` reads through the very code that reads the published one. A backbone's registration
names its builders: `tiny={"owner/name": builder}`, a function of a folder, `layers=`, `width=` and `seed=`, or where to
import it from when it is needed: `"module:function"`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import cast

from probe.backbones import backbones
from probe.errors import ProbeError
from probe.registry import nearest

LAYERS, WIDTH = 3, 32


def tiny_names() -> list[str]:
    """The models of which there is a small form."""
    return [name for entry in backbones for name in entry.meta.get("tiny", ())]


def write_tiny(name: str, folder: Path, *, layers: int = LAYERS, width: int = WIDTH, seed: int = 0) -> Path:
    """Write the small form of a published model: its layout and its parts, random weights. Raises `ProbeError`."""
    known = {n: builder for entry in backbones for n, builder in entry.meta.get("tiny", {}).items()}
    if name not in known:
        raise ProbeError(f"there is no small form of `{name}`; {nearest(name, list(known))}")
    if layers < 2 or width < 32 or width % 32:
        raise ProbeError(f"layers {layers}, width {width}: at least 2 layers, and a width that is a multiple of 32")
    build: Callable[..., Path] | str = known[name]
    if isinstance(build, str):
        module, _, function = build.partition(":")
        return cast(Path, getattr(import_module(module), function)(folder, layers=layers, width=width, seed=seed))
    return build(folder, layers=layers, width=width, seed=seed)
