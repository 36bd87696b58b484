"""What an intervention asks for, and of whom: the inputs of scores, selections and operations by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch

from probe.compile import Edit
from probe.selections.counts import Count
from probe.site import Clock, Site

TOKEN_AXIS = {
    **dict.fromkeys(("hidden", "layer_input", "embedding", "box", "view", "row", "size", "image_features"), 0),
    **dict.fromkeys(("keys", "received", "attended"), 1),
}
"""Along which axis an input has one entry per alive visual token."""

TEXT_INPUT = {"hidden": "text_hidden", "keys": "text_keys"}
"""What a score reads of the text rows in place of the visual tokens'."""


class Source(Protocol):
    """Where an intervention's inputs come from, for one sample at one place and time."""

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        ...

    def give(self, name: str, params: Mapping[str, Any]) -> Any:
        """The input of this name (see `probe.scores`, `probe.selections`, `probe.operations`).

        `params` are those of the part that asks: `layer`, `queries`, `form`, ... say which attention or keys are meant.
        Always there: `n`, `original`, `progress`, `generator`.
        """
        ...

    def spend(self, flops: int) -> None:
        """Note the FLOPs of matrix products that the decision cost."""
        ...

    def doubt(self, score: torch.Tensor) -> None:
        """Note how many values of a score are NaN (they rank last)."""
        ...


def asked(edit: Edit, clock: Clock) -> Iterator[tuple[str, dict[str, Any]]]:
    """Everything that an intervention may ask of its source at this clock: `(name, parameters of the part)`."""
    calls = [c for part in (edit.score, edit.select, edit.do) if part is not None for c in part.walk()]
    for call in calls:
        params = call.params(clock)
        for name in call.entry.reads(params):
            yield name, params
            if name == "text_score" and edit.score is not None:
                given = edit.score.params(clock)
                yield from ((TEXT_INPUT[n], given) for n in edit.score.entry.reads(given) if n in TEXT_INPUT)
        keep = params.get("keep")
        if isinstance(keep, Count) and "rank" in keep.reads and edit.score is not None:
            yield "attended", edit.score.params(clock)


def reads_prompt(edit: Edit, site: Site, clock: Clock) -> str | None:
    """Why an intervention must see prompt rows that are computed in the very pass; None when it need not."""
    if site is Site.BEFORE_LM or edit.do.entry.meta.get("changes") == "attention":
        return None
    for name, params in asked(edit, clock):
        if name in ("hidden", "layer_input"):
            return "reads the hidden states of visual tokens"
        if name in ("text_hidden", "text_keys"):
            return "reads the question's rows"
        if name in ("received", "attended") and (params.get("queries") in PROMPT_QUERIES or params.get("projected")):
            return f"scores with attention from `{params.get('queries')}` rows"
    return None


PROMPT_QUERIES = ("question", "system", "visual", "raters", "raters_answer")
"""Query sets that stand in the prompt."""
