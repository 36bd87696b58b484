"""Length policies that need no file of their own."""

from __future__ import annotations

from dataclasses import dataclass

from probe.decoding.policy import Length
from probe.registry import lengths


@lengths.register(name="fixed")
@dataclass(frozen=True, kw_only=True)
class Fixed(Length):
    """The answer has `gen_length` slots from beginning to end."""
