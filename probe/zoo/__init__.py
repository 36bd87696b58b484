"""The embedded miniature: its world, its tokenizer, its training, its weights.

``llada_v_mini`` is a checkpoint folder in the published LLaDA-V format, some seven megabytes;
``MINIATURE`` is its path.
Importing this package imports nothing heavy.
"""

from __future__ import annotations

from pathlib import Path

MINIATURE = Path(__file__).with_name("llada_v_mini")
