"""probe: hook-based instrumentation of discrete-diffusion multimodal language models.

The public names; each is imported when it is first used, so that `import probe` and `probe --help` are quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probe.backbones import load as load
    from probe.data import from_image as from_image
    from probe.data import from_images as from_images
    from probe.data import from_jsonl as from_jsonl
    from probe.data import from_video as from_video
    from probe.errors import ProbeError as ProbeError
    from probe.probe_code import code_probe as code_probe
    from probe.recipe import load_recipe as load_recipe
    from probe.recipe import parse_recipe as parse_recipe
    from probe.runner import run as run
    from probe.trace import open_trace as open  # noqa: F401
    from probe.writing import caching as caching
    from probe.writing import calibration as calibration
    from probe.writing import length as length
    from probe.writing import nnsight as nnsight
    from probe.writing import operation as operation
    from probe.writing import score as score
    from probe.writing import selection as selection
    from probe.writing import signal as signal
    from probe.writing import unmasking as unmasking

_DECORATORS = (
    "caching",
    "calibration",
    "length",
    "nnsight",
    "operation",
    "score",
    "selection",
    "signal",
    "unmasking",
)
"""What adds to the vocabulary (`probe.writing`)."""

_PUBLIC = {
    "ProbeError": "probe.errors:ProbeError",
    "code_probe": "probe.probe_code:code_probe",
    "from_image": "probe.data:from_image",
    "from_images": "probe.data:from_images",
    "from_jsonl": "probe.data:from_jsonl",
    "from_video": "probe.data:from_video",
    "load": "probe.backbones:load",
    "load_recipe": "probe.recipe:load_recipe",
    "open": "probe.trace:open_trace",
    "parse_recipe": "probe.recipe:parse_recipe",
    "run": "probe.runner:run",
    **{name: f"probe.writing:{name}" for name in _DECORATORS},
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module `probe` has no attribute `{name}`; public names: {', '.join(__all__)}")
    module, attribute = _PUBLIC[name].split(":")
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
