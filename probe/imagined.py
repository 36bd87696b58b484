"""Made-up tensors of the right shapes, for what an intervention would decide if it were asked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probe.errors import ProbeError


@dataclass
class Imagined:
    """A `Source` of made-up tensors for n visual tokens; `wild` draws them with long tails."""

    n: int
    original: int
    progress: float
    layer: int
    heads: int
    wild: bool

    def __post_init__(self) -> None:
        self._draw = torch.Generator().manual_seed(1 + self.wild)

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def spend(self, flops: int) -> None:
        """Nobody pays."""

    def doubt(self, score: Tensor) -> None:
        """Nothing imagined is a finding."""

    def _values(self, *shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=self._draw)
        return (4 * drawn).exp() if self.wild else drawn.sigmoid()

    def give(self, name: str, params: Mapping[str, Any]) -> Any:
        """The input of this name, as `pass_source` and `encoder_source` have it."""
        n, width, text = self.n, 8, 12 if self.wild else 9
        simple = {"n": n, "original": self.original, "progress": self.progress, "layer_index": self.layer}
        if name in simple:
            return simple[name]
        if name in ("hidden", "layer_input", "embedding", "image_features"):
            return self._values(n, width)
        match name:
            case "generator":
                return self._draw
            case "noise":
                return lambda m: torch.rand(m, generator=self._draw)
            case "columns":
                return max(math.isqrt(n), 1)
            case "newline" | "cls":
                return torch.zeros(n, dtype=torch.bool)
            case "row":
                return torch.arange(n)
            case "view":
                return torch.zeros(n, dtype=torch.int64)
            case "size":
                return torch.ones(n)
            case "box":
                return self._boxes()
            case "keys":
                return self._values(2, n, width)
            case "received":
                many = self._values(1 if params.get("form") == "head_mean_logits" else self.heads, n)
                return many if self.wild else many / (1000 * n)  # far apart, for thresholds lie between
            case "attended":
                return self._values(text, n)
            case "rotary_received":
                return self._values(n)
            case "n_queries":
                return torch.tensor(text)
            case "text_hidden":
                return self._values(text, width)
            case "text_keys":
                return self._values(2, text, width)
            case "text_row":
                return n + torch.arange(text)
            case "text_features":
                return self._values(width)
        raise ProbeError(f"`{name}` cannot be made up")

    def _boxes(self) -> Tensor:
        side = max(math.ceil(math.sqrt(self.n)), 1)
        at = torch.arange(self.n)
        x, y = (at % side) / side, (at // side) / side
        return torch.stack([x, y, x + 1 / side, y + 1 / side], 1)
