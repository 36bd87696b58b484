"""A sample that failed: the reason in one line, and memory that it must not keep. No model, no file."""

from __future__ import annotations

import gc

import torch

from probe import heap
from probe.errors import ProbeError

MOST_NOTES = 10
"""Failed samples that a run's notes say one by one; the trace has the reason of every one."""

_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the host or on the device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_MEMORY)


def reason_of(error: BaseException) -> str:
    """Why a sample failed, in one line."""
    if isinstance(error, ProbeError):
        return str(error)
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if is_out_of_memory(error):
        return f"out of memory ({first or type(error).__name__}); this sample needs more than there is"
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def free_memory() -> None:
    """Give back what a failed sample held. Call it when nothing refers to its exception any more."""
    gc.collect()
    heap.give_back()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def failure_notes(failures: list[tuple[int, str]], in_trace: int) -> list[str]:
    """What a run says of its failed samples: the first ones, how many more, and how many an earlier run left."""
    notes = [f"sample {number} failed: {reason}" for number, reason in failures[:MOST_NOTES]]
    if len(failures) > MOST_NOTES:
        notes.append(f"{len(failures) - MOST_NOTES} more samples failed; `failed` in the trace says why")
    if in_trace > len(failures):
        notes.append(f"{in_trace - len(failures)} samples had failed before this run was resumed")
    return notes
