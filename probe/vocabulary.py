"""Importing this registers every built-in signal, score, selection, operation and decoding policy. Needs torch."""

import probe.decoding.autoregressive
import probe.decoding.caching
import probe.decoding.confidence
import probe.operations
import probe.scores
import probe.selections
import probe.signals  # noqa: F401
