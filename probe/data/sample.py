"""One question about one or more pictures, or about a clip."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from PIL import Image


@dataclass(frozen=True)
class Sample:
    """What a run is given for one answer.

    ``images`` are pictures in the order of their places in the prompt; ``frames``, instead, those of one clip.
    ``answers`` are the accepted references, best one counts; empty when none is known. ``metric`` is a name
    in ``probe.data.METRICS``, or empty when there is nothing to compare with. ``generate`` holds what the
    task suggests for ``gen_length``, ``steps`` and ``block_length`` (tokens, denoising steps, tokens); a
    recipe may say otherwise. ``judge`` scores a prediction where somebody else's rule counts, in place of ``metric``,
    which then only names it.
    """

    id: str
    images: tuple[Image.Image, ...]
    question: str
    answers: tuple[str, ...] = ()
    metric: str = ""
    task: str = "own"
    generate: Mapping[str, int] = field(default_factory=dict)
    frames: tuple[Image.Image, ...] = ()
    judge: Callable[[str], float] | None = None

    @property
    def pictures(self) -> tuple[Image.Image, ...]:
        """All that is to be seen: the images, or the frames of the clip."""
        return self.images or self.frames
