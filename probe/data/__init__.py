"""Samples, metrics and tasks. Imports numpy and Pillow, never torch."""

from __future__ import annotations

from probe.data.folder import from_folder
from probe.data.hub import from_hub
from probe.data.metrics import METRICS, agreement
from probe.data.own import from_image, from_images, from_jsonl, from_video
from probe.data.sample import Sample
from probe.data.source import named, samples
from probe.data.tasks import load, tasks

__all__ = [
    "METRICS",
    "Sample",
    "agreement",
    "from_folder",
    "from_hub",
    "from_image",
    "from_images",
    "from_jsonl",
    "from_video",
    "load",
    "named",
    "samples",
    "tasks",
]
