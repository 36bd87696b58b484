"""The settings of one generation, with everything resolved to ids and policies."""

from __future__ import annotations

from dataclasses import dataclass, field

from probe.decoding.policy import Caching, Length, Unmasking
from probe.decoding.unmask import Remasking
from probe.errors import ProbeError


def _confidence() -> Unmasking:
    from probe.decoding.confidence import Confidence  # which needs this file

    return Confidence()


@dataclass(frozen=True)
class Rule:
    """Settings of one generation.

    `stop` and `suffix` are token ids; `cfg_scale` 0 means no guidance; `prior` are (slot, token) pairs that stand
    before the first step. What `block_length` and `steps` must fit is the unmasking policy's to say.
    """

    gen_length: int
    block_length: int
    steps: int
    mask_id: int
    suppressed: tuple[int, ...] = ()
    temperature: float = 0.0
    remasking: Remasking = "low_confidence"
    cfg_scale: float = 0.0
    stop: tuple[tuple[int, ...], ...] = ()
    suffix: tuple[int, ...] = ()
    eos: int | None = None
    prior: tuple[tuple[int, int], ...] = ()
    vocabulary: int | None = None
    """Token ids are below it. For decoders that draw noise tokens."""
    unmasking: Unmasking = field(default_factory=_confidence)
    caching: Caching = field(default_factory=Caching)
    length: Length = field(default_factory=Length)

    def __post_init__(self) -> None:
        if self.gen_length < 1 or self.block_length < 1 or self.steps < 1:
            raise ProbeError(
                f"gen_length {self.gen_length}, block_length {self.block_length} and steps {self.steps} "
                "must be at least 1"
            )
        outside = [slot for slot, _ in self.prior if not 0 <= slot < self.gen_length]
        if outside:
            raise ProbeError(f"slot {outside[0]} of the given answer lies outside the {self.gen_length} slots")
        self.unmasking.check(self)

    @property
    def n_blocks(self) -> int:
        """Blocks of the answer, decoded left to right (the last one may be shorter)."""
        return -(-self.gen_length // self.block_length)

    @property
    def nominal_steps(self) -> int:
        """Steps that are asked for; adaptive policies may take fewer or more."""
        return self.unmasking.nominal_steps(self)
