"""Traces that may be damaged: which samples are whole, and a new trace of those. In a process of its own.

Damage to HDF5's own structures can make HDF5 stop the process or read without end. So the file is read by a child, row
by row; when it dies or hangs at a row, that row is lost and another child goes on behind it.
"""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from probe.errors import ProbeError

SECONDS = 60.0
"""How long reading one row may take."""
MOST_DEATHS = 8
"""After so many rows at which a child died or hung, the rest is given up."""


@dataclass(frozen=True)
class Examined:
    """What is wrong with a trace, one sentence each; how many rows it says it has; and which of them are whole."""

    problems: tuple[str, ...]
    rows: int
    whole: tuple[int, ...]
    header_is_whole: bool


@dataclass(frozen=True)
class Rescued:
    """A new trace of the whole samples of a damaged one: how many of how many, and what was wrong with the others."""

    path: Path
    kept: int
    rows: int
    problems: tuple[str, ...]


def examine(path: Path | str, *, seconds: float = SECONDS) -> Examined:
    """Check every checksum of a trace, whatever state it is in. Never raises for damage."""
    path = Path(path)
    problems: list[str] = []
    whole: list[int] = []
    rows, header_is_whole, start = 0, False, 0
    for _ in range(MOST_DEATHS):
        at = start
        died = "the process that read it ended"
        for said in _child("examine", seconds, path=str(path), start=start):
            if "died" in said:
                died = said["died"]
            elif "fault" in said:
                problems.append(said["fault"])
                return Examined(tuple(problems), 0, (), False)
            elif "opened" in said:
                rows, at = said["opened"], start
                if not start:
                    header_is_whole = not said["header"]
                    problems += said["header"]
            elif "row" in said:
                at = said["row"] + 1
                problems += said["problems"]
                if not said["problems"]:
                    whole.append(said["row"])
            elif "end" in said:
                return Examined(tuple(problems), rows, tuple(whole), header_is_whole)
        if not rows:
            problems.append(f"{path.name}: cannot be opened: {died}")
            return Examined(tuple(problems), 0, (), False)
        problems.append(f"{path.name}, row {at}: cannot be read: {died}")
        start = at + 1
        if start >= rows:
            return Examined(tuple(problems), rows, tuple(whole), header_is_whole)
    problems.append(f"{path.name}, rows {start} to {rows - 1}: given up; HDF5's own structures are damaged")
    return Examined(tuple(problems), rows, tuple(whole), header_is_whole)


def rescue(path: Path | str, out: Path | str, *, found: Examined | None = None, seconds: float = SECONDS) -> Rescued:
    """Write the whole samples of a damaged trace into a new one, which a run with `resume` then completes.

    `found` is what `examine` said, if it was asked already.
    """
    path, out = Path(path), Path(out)
    if out.exists() or out.with_name(out.name + ".partial").exists():
        raise ProbeError(f"{out} is already there; name a new file to rescue {path.name} into")
    found = found or examine(path, seconds=seconds)
    if not found.whole:
        why = found.problems[0] if found.problems else "it holds no samples"
        raise ProbeError(f"nothing of {path} can be rescued: {why}")
    problems, left = list(found.problems), list(found.whole)
    extra = {"rescued_from": path.name, "rescued": f"{len(left)} of {found.rows} samples"}
    if not found.header_is_whole:
        extra["header_damaged"] = "yes: recipe, names or descriptions are not what was written"
    for _ in range(MOST_DEATHS):
        died = ""
        for said in _child("rescue", seconds, path=str(path), rows=left, out=str(out), extra=extra):
            if "fault" in said:
                raise ProbeError(said["fault"])
            if "wrote" in said:
                left.remove(said["wrote"])
            died = said.get("died", died)
        if not died:
            lost = len(problems) - len(found.problems)
            return Rescued(out, len(found.whole) - lost, found.rows, tuple(problems))
        if left:
            problems.append(f"lost while it was copied: row {left.pop(0)} ({died})")
    raise ProbeError(f"{path} cannot be rescued: reading it stops the process again and again")


# -------------------------------------------------------------------- the child

_CODE = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from probe.trace_examine import child
child(sys.argv[2:])
"""


def _child(task: str, seconds: float, **words: Any) -> Iterator[dict[str, Any]]:
    """What a child says, line by line; `{"died": why}` at last if it did not end by itself."""
    command = [sys.executable, "-c", _CODE, json.dumps(sys.path), task, json.dumps(words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8")
    assert process.stdout is not None
    lines: queue.Queue[str | None] = queue.Queue()

    def listen(stream: Any) -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=listen, args=(process.stdout,), daemon=True).start()
    hung = False
    try:
        while True:
            try:
                line = lines.get(timeout=seconds)
            except queue.Empty:
                hung = True
                break
            if line is None:
                break
            yield json.loads(line)
    finally:
        if process.poll() is None and (hung or sys.exc_info()[0] is not None):
            process.kill()
        status = process.wait()
    if hung:
        yield {"died": f"HDF5 was still reading after {seconds:.0f} s"}
    elif status < 0:
        yield {"died": f"HDF5 stopped the process ({signal.Signals(-status).name})"}
    elif status:
        yield {"died": f"the process that read it ended with status {status}"}


def _say(**words: Any) -> None:
    sys.stdout.write(json.dumps(words) + "\n")
    sys.stdout.flush()


def child(words: Sequence[str]) -> None:
    """Run one task: read rows and say what is wrong with each, or copy them into a new trace."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):
        pass
    task, given = words[0], json.loads(words[1])
    try:
        (_examine if task == "examine" else _rescue)(**given)
    except ProbeError as error:
        _say(fault=str(error))


def _examine(path: str, start: int) -> None:
    from probe.trace import open_trace
    from probe.trace_summary import problems

    cut: list[str] = []
    try:
        trace = open_trace(path)
    except ProbeError as error:
        cut.append(str(error))
        try:
            trace = open_trace(path, damaged=True)
        except ProbeError:
            _say(fault=str(error))
            return
    with trace:
        _say(opened=trace.n_samples, header=[*cut, *problems(trace, rows=[])])
        for row in range(start, trace.n_samples):
            _say(row=row, problems=problems(trace, rows=[row]))
    _say(end=True)


def _rescue(path: str, rows: list[int], out: str, extra: dict[str, str]) -> None:
    from probe.trace import TraceWriter, open_trace

    with open_trace(path, damaged=True) as trace:
        header = replace(trace.header, extra={**trace.header.extra, **extra})
        resume = Path(out + ".partial").exists()
        with TraceWriter(Path(out), header, trace.declared(), resume=resume) as writer:
            for row in rows:
                record = trace.record(row)
                if record.sample not in writer.done:
                    writer.write(record)
                _say(wrote=row)
