"""The embedded miniatures: their world, their tokenizers, their training, their weights.

``llada_v_mini`` is a checkpoint folder in the published LLaDA-V format, some seven megabytes; ``MINIATURE`` is its
path. ``llava_next_mini`` and ``lavida_dream_mini`` are the contrast pair, in their own classes' formats.
Importing this package imports nothing heavy.
"""

from __future__ import annotations

from pathlib import Path

MINIATURE = Path(__file__).with_name("llada_v_mini")
