"""Freed memory stays with the process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PASSES = """
import resource, torch
from probe.heap import keep_freed
print(keep_freed())
def one():
    with torch.inference_mode():
        for size in (6_000_000, 2_000_000, 12_000_000):  # floats: up to 48 MB, more than glibc's heap takes by itself
            x = torch.empty(size).fill_(1.0)
            del x
one(); one()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5): one()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**more: str) -> tuple[str, int]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", PASSES], env=kept | more, capture_output=True, text=True, check=True)
    said, count = done.stdout.split()
    return said, int(count)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_passes_take_no_new_pages() -> None:
    said, count = faults()
    if said != "True":
        pytest.skip("this C library has no such setting")
    assert 4 * count < faults(MALLOC_TRIM_THRESHOLD_="131072")[1]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_settings_of_the_environment_stand() -> None:
    assert faults(MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"
