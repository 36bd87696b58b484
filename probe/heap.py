"""Memory that a pass frees stays with the process, for the next pass.

glibc hands large freed blocks back to the system, and takes them anew, page by page, in every pass. On a CPU that was
measured to take up to a seventh of a run's time, at some moments and not at others.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Names of glibc's settings (malloc.h): how much may be free at the heap's end, and what is no part of the heap."""
LARGEST = 2**31 - 1
ONCE_LARGEST = 32 << 20
"""The most that older versions take for M_MMAP_THRESHOLD, and where the one that adapts itself ends."""


@cache
def keep_freed() -> bool:
    """Have the C library keep what is freed, once per process; returns whether it does.

    Nothing is done where it is not glibc, or where the environment has settings of its own (`MALLOC_...`,
    `GLIBC_TUNABLES`).
    """
    if not sys.platform.startswith("linux") or any(n.startswith(("MALLOC_", "GLIBC_TUNABLES")) for n in os.environ):
        return False
    return _keep()


def _mallopt() -> Any:
    """glibc's function, or None."""
    try:
        return ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return None


def _keep() -> bool:
    mallopt = _mallopt()
    if mallopt is None:
        return False
    in_heap = mallopt(M_MMAP_THRESHOLD, 1 << 30) or mallopt(M_MMAP_THRESHOLD, ONCE_LARGEST)
    return bool(in_heap and mallopt(M_TRIM_THRESHOLD, LARGEST))


@contextmanager
def by_default() -> Iterator[None]:
    """The heap as a process has it that does not keep what is freed: for comparing with one."""
    mallopt = _mallopt() if keep_freed() else None
    if mallopt is not None:  # where glibc's own thresholds end up once large blocks have come and gone
        mallopt(M_MMAP_THRESHOLD, ONCE_LARGEST)
        mallopt(M_TRIM_THRESHOLD, 2 * ONCE_LARGEST)
    try:
        yield
    finally:
        if mallopt is not None:
            _keep()


def give_back() -> bool:
    """Return to the system what the heap holds freed, now; whether the C library can. For after a run that failed."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return False
    return bool(trim(0))
