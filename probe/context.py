"""Whether a sample fits into its model. No probe, no file."""

from __future__ import annotations

from typing import Any, cast

from probe.backbones.base import Backbone, Prompt
from probe.errors import ProbeError


def check_length(backbone: Backbone, prompt: Prompt, answer: int) -> None:
    """Raise `ProbeError` for a sequence longer than the model's context, or a prompt that was cut to fit.

    `answer` counts the positions behind the prompt: slots and suffix.
    Published loaders cut such a prompt silently; an answer to a part of the question is worse than none.
    """
    taken = prompt.embeds.shape[0]
    right = "shorten the question, give fewer or smaller pictures, or lower generate.gen_length"
    cut = getattr(backbone, "max_length", None)
    if isinstance(cut, int) and prompt.n_visual and taken >= cut:
        raise ProbeError(f"the prompt fills all {cut:,} positions that the model takes and was cut to them; {right}")
    most = getattr(cast(Any, backbone.lm).config, "max_position_embeddings", None)
    if isinstance(most, int) and taken + answer > most:
        raise ProbeError(
            f"the sample takes {taken + answer:,} positions ({taken:,} of the prompt, {answer:,} of the answer), "
            f"more than the model's {most:,}; {right}"
        )
