"""The plugin for lmms-eval: what its entry point names. Listing models imports no torch.

`lmms-eval eval --model probe --model_args recipe=fastv,backbone=GSAI-ML/LLaDA-V,keep=0.25 --tasks docvqa_val`
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

TASKS = Path(__file__).resolve().parent / "lmms_tasks"
"""Task files of our own, for `--include_path`: LLaDA-V's variants of the two document benchmarks."""


def manifests() -> list[Any]:
    """The models of this package, for the entry point group `lmms_eval.models`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest(model_id="probe", simple_class_path="probe.lmms_adapter.Probe")]
