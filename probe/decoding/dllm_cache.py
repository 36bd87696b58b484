"""dLLM-Cache (Liu et al., arXiv 2506.06295): when features are refreshed, and which answer rows in between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from probe.decoding.policy import Ask, Caching, Delta, State, Work
from probe.errors import ProbeError
from probe.registry import cachings
from probe.site import Phase

if TYPE_CHECKING:
    from probe.decoding.rule import Rule


def refreshes(step: int, prompt_interval: int, gen_interval: int) -> tuple[bool, bool]:
    """Whether step `step` (1-based) recomputes the prompt's rows, and all of the answer's."""
    return (step - 1) % prompt_interval == 0, (step - 1) % gen_interval == 0


def least_similar(old: Tensor, new: Tensor, ratio: float) -> Tensor:
    """The `int(ratio n)` of n answer rows whose value vector turned most: sorted `(batch, chosen)` indices.

    `old`, `new (batch, row, width)`: value projections cached and now; by cosine similarity. Equal ones, such as those
    of untouched masks in the first layer, are taken in the order of `torch.topk`, as published.
    """
    count = int(old.shape[1] * ratio)
    likeness = torch.nn.functional.cosine_similarity(old, new, dim=-1)
    return likeness.topk(count, dim=1, largest=False).indices.sort(dim=1).values


@cachings.register(name="dllm_cache")
@dataclass(frozen=True, kw_only=True)
class DllmCache(Caching):
    """dLLM-Cache: every layer stores what it adds to each row, and computes only some rows anew.

    The prompt's every `prompt` passes, the answer's (and suffix's) every `answer` passes; in between, in each layer,
    the share `ratio` of the answer's rows whose value vectors turned most. The residual stream is always fresh.
    Approximate. Defaults: LLaDA-V's demo.
    """

    exact = False
    stores = True
    prompt: int = 25
    answer: int = 7
    ratio: float = 0.25

    def check(self, rule: Rule, shift: int) -> None:
        """Intervals of at least 1, a share."""
        if self.prompt < 1 or self.answer < 1:
            raise ProbeError(f"a cache refreshed every {min(self.prompt, self.answer)} passes: it takes at least 1")
        if not 0 <= self.ratio <= 1:
            raise ProbeError(f"a cache that recomputes a share of {self.ratio} of the answer: it takes 0 to 1")

    def plan(self, state: State, ask: Ask) -> Work:
        """By the intervals; passes are counted from the first of the generation."""
        prompt, answer = refreshes(state.passes + 1, self.prompt, self.answer)
        return self._of(Delta(prompt, answer, self.ratio))

    def refreshed(self, state: State, ask: Ask) -> Work | None:
        """Everything."""
        return self._of(Delta(True, True))

    @staticmethod
    def _of(delta: Delta) -> Work:
        return Work(delta=delta, phase=Phase.REFRESH if delta.whole else Phase.DENOISE)
