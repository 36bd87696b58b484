"""Operations on the pictures themselves, before the encoder cuts them into views."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from probe.registry import operations
from probe.site import Site


@operations.register(default_select="all", changes="pictures", sites=(Site.IMAGES,))
def resize(size: tuple[int, int], *, scale: Annotated[float, Field(gt=0, le=1)] = 0.5) -> tuple[int, int]:
    """Show the model smaller pictures: width and height times `scale`, at least one pixel each. Needs no selection.

    How many visual tokens that saves is the model's own rule: one that looks at tiles takes fewer of them, and has the
    base view at full size all the same; one that sees pictures at their own size has `scale` squared as many.
    """
    width, height = size
    return max(1, round(width * scale)), max(1, round(height * scale))
