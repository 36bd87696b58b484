"""Importing this module registers the built-in signals, scores, selections and operations."""

from __future__ import annotations

from probe import operations, scores, selections, signals

__all__ = ["operations", "scores", "selections", "signals"]
