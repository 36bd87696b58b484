"""Importing this module registers the built-in signals, scores, selections, operations and decoding policies."""

from __future__ import annotations

from probe import operations, scores, selections, signals
from probe.decoding import autoregressive, caching, confidence, dimple, length
from probe.signals import encoder

__all__ = [
    "autoregressive", "caching", "confidence", "dimple", "encoder", "length", "operations", "scores", "selections",
    "signals",
]  # fmt: skip
