"""Fixtures of the trace tests; what they are made of is in `trace_samples`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from trace_samples import run, trace_path  # noqa: F401
