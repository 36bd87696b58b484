"""Random numbers of one sample's generation: every draw of every policy goes through here.

One CPU generator per sample, so that a sample's noise depends on its seed and number alone, not on its batch or device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Draw:
    """The noise of one sample. Draws are made on the CPU, in the order in which a policy asks for them."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uniform numbers in [0, 1) of a shape."""
        return torch.rand(*shape, dtype=dtype, generator=self.generator)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Uniform int64 numbers in [0, high) of a shape."""
        return torch.randint(high, shape, generator=self.generator)

    def permutation(self, n: int) -> Tensor:
        """A random order of n things, `(n,)` int64."""
        return torch.randperm(n, generator=self.generator)

    def categorical(self, probabilities: Tensor) -> Tensor:
        """One index per row of `(row, n)` probabilities, `(row,)` int64."""
        return torch.multinomial(probabilities.cpu(), 1, generator=self.generator)[:, 0]

    def several(self, weights: Tensor, n: int) -> Tensor:
        """`n` different indices into `weights (m,)`, likelier where it is larger, `(n,)` int64."""
        return torch.multinomial(weights.cpu(), n, generator=self.generator)

    def poisson(self, rates: Tensor) -> Tensor:
        """Counts with these rates, of their shape."""
        return torch.poisson(rates.cpu(), generator=self.generator)

    def uniform_rows(self, length: int, rows: Tensor, width: int) -> Tensor:
        """Rows of `uniform(length, width, dtype=float64)` without holding it: the stream is drawn in chunks."""
        out = torch.empty(rows.shape[0], width, dtype=torch.float64)
        chunk = max(1, 2**22 // width)
        host = rows.cpu()
        for first in range(0, length, chunk):
            drawn = self.uniform(min(chunk, length - first), width, dtype=torch.float64)
            here = (host >= first) & (host < first + drawn.shape[0])
            out[here] = drawn[host[here] - first]
        return out


def draws(seed: int, samples: Sequence[int]) -> list[Draw]:
    """One source of noise per sample, by the run's seed and the sample's number."""
    out = []
    for sample in samples:
        generator = torch.Generator()
        generator.manual_seed(seed + sample)
        out.append(Draw(generator))
    return out
