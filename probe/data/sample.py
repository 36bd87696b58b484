"""One question about one or more pictures, or about a clip."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from PIL import Image

from probe.errors import ProbeError

LONGEST_SIDE = 16_384
"""Pixels. Some encoders pad pictures to squares: a strip of 20,000 x 1 pixels would become 400 megapixels."""


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

    def check(self) -> None:
        """Raise `ProbeError` where there is nothing to ask, or a text that no tokenizer takes."""
        if not self.question.strip():
            raise ProbeError(f"sample {self.id}: the question is empty; say what to ask")
        try:
            self.question.encode("utf-8")
        except UnicodeEncodeError as error:
            what = f"the question holds half of a surrogate pair ({error.reason})"
            raise ProbeError(f"sample {self.id}: {what}") from None
        for image in self.pictures:
            check_size(image, f"sample {self.id}: the picture")


def check_size(image: Image.Image, what: str) -> None:
    """Raise `ProbeError` for a picture without pixels, or one too long to be padded to a square."""
    if 0 in image.size or max(image.size) > LONGEST_SIDE:
        raise ProbeError(f"{what} is {image.width} x {image.height} pixels; 1 to {LONGEST_SIDE} are read on a side")
