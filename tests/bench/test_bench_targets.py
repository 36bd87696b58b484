"""The targets themselves, on this machine: minutes, and only where nothing else runs."""

from __future__ import annotations

import pytest
import torch

from probe.bench.shapes import Bench
from probe.bench.suite import BY_DEFAULT, chosen, measure


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_DEFAULT)
def test_a_row_keeps_to_its_targets(name: str) -> None:
    torch.set_num_threads(1)
    bench = Bench(quick=True)
    for line in measure(bench, chosen([name], None)):
        assert line.value is not None
        assert line.met is not False, f"{line.what}: {line.value.median} is not {line.target} ({line.note})"
