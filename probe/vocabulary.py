"""Importing this module registers the built-in signals, scores, selections and operations."""

from __future__ import annotations

from probe import operations, scores, selections, signals
from probe.signals import encoder

__all__ = ["encoder", "operations", "scores", "selections", "signals"]
