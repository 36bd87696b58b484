"""Memory that a pass frees stays with the process, for the next pass.

glibc hands large freed blocks back to the system, and takes them anew, page by page, in every pass. On a CPU that was
measured to take up to a seventh of a run's time, at some moments and not at others.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Names of glibc's settings (malloc.h): how much may be free at the heap's end, and what is no part of the heap."""
LARGEST = 2**31 - 1
ONCE_LARGEST = 32 << 20
"""The most that older versions take for M_MMAP_THRESHOLD."""


@cache
def keep_freed() -> bool:
    """Have the C library keep what is freed, once per process; returns whether it does.

    Nothing is done where it is not glibc, or where the environment has settings of its own (`MALLOC_...`,
    `GLIBC_TUNABLES`).
    """
    if not sys.platform.startswith("linux") or any(n.startswith(("MALLOC_", "GLIBC_TUNABLES")) for n in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    in_heap = mallopt(M_MMAP_THRESHOLD, 1 << 30) or mallopt(M_MMAP_THRESHOLD, ONCE_LARGEST)
    return bool(in_heap and mallopt(M_TRIM_THRESHOLD, LARGEST))
