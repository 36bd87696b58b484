"""Importing this module registers the built-in parts: signals, scores, selections, operations, decoding, calibration."""

from __future__ import annotations

from probe import calibrate, operations, scores, selections, signals
from probe.decoding import (
    autoregressive,
    caching,
    confidence,
    daedal,
    dimple,
    dinfer,
    dpad,
    dream,
    dreamon,
    eos,
    fast_cache,
    fast_dllm,
    flexmdm,
    klass,
    lavida,
    length,
    pc_sampler,
    prophet,
    remdm,
    slowfast,
    wino,
)
from probe.signals import encoder

__all__ = [
    "autoregressive",
    "caching",
    "calibrate",
    "confidence",
    "daedal",
    "dimple",
    "dinfer",
    "dpad",
    "dream",
    "dreamon",
    "encoder",
    "eos",
    "fast_cache",
    "fast_dllm",
    "flexmdm",
    "klass",
    "lavida",
    "length",
    "operations",
    "pc_sampler",
    "prophet",
    "remdm",
    "scores",
    "selections",
    "signals",
    "slowfast",
    "wino",
]
