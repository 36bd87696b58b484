"""Several processes for one sweep on one machine: siblings that share its folder, each with a backbone of its own.

They need nobody to hand out work: a unit that one of them is writing is left to it (`sweep_run`). A sibling is told
what to do on its standard input, which stays open: when it closes, because this process ended in whatever way, the
sibling finishes its sample and ends too.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from probe.recipe import Recipe, parse_recipe


@dataclass(frozen=True)
class Job:
    """What a sibling is to do: the sweep as YAML and `sweep_run.sweep`'s arguments. `begin` is where in the list of
    units it starts, as a share, so that siblings meet late.
    """

    recipe: str
    source: str
    out: str
    limit: int | None
    device: str
    dtype: str
    shard: tuple[int, int] | None
    retries: int
    plugins: tuple[str, ...]
    begin: float
    command: str


def threads_for(jobs: int) -> int:
    """Threads of each of so many processes that share this machine's processors."""
    return max(1, (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1) // jobs)


def accelerator(number: int, devices: int) -> str:
    """The accelerator of the process of this number, of those that this one may see."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name for name in visible.split(",") if name] or [str(i) for i in range(devices)]
    return names[number % devices]


@contextmanager
def siblings(jobs: Sequence[Job], folder: Path, threads: int, devices: int) -> Iterator[list[subprocess.Popen[str]]]:
    """The processes of these jobs, beside this one; at the end they are let go, and waited for.

    What they print goes to `FOLDER/job1.log`, ... `devices` is how many accelerators there are to share out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    running: list[subprocess.Popen[str]] = []
    try:
        for number, job in enumerate(jobs, 1):
            own = {"OMP_NUM_THREADS": str(threads)}
            if devices > 1:
                own["CUDA_VISIBLE_DEVICES"] = accelerator(number, devices)
            with open(folder / f"job{number}.log", "w", encoding="utf-8") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "probe.sweep_jobs"],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=os.environ | own,
                    text=True,
                    start_new_session=True,  # Ctrl-C is for this process; a sibling hears of it once, by its input
                )
            running.append(process)
            assert process.stdin is not None
            process.stdin.write(json.dumps(asdict(job)) + "\n")
            process.stdin.flush()
        yield running
    finally:
        for process in running:
            with suppress(OSError):
                assert process.stdin is not None
                process.stdin.close()
        for process in running:
            process.wait()


def start_jobs(jobs: Sequence[Job], folder: Path, device: str) -> AbstractContextManager[list[subprocess.Popen[str]]]:
    """Siblings of this process, with their share of its processors and accelerators; this one takes its share, too."""
    import torch

    threads = threads_for(len(jobs) + 1)
    torch.set_num_threads(threads)
    devices = torch.cuda.device_count() if device in ("auto", "cuda") else 1
    return siblings(jobs, folder, threads, devices)


def _end_with_the_lifeline() -> None:
    """Stop after this sample when the process that began this one is gone."""
    while sys.stdin.readline():
        continue
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> int:
    """A sibling's life. 0: nothing is left to do; the usual status of a signal when it was told to stop."""
    import torch

    from probe.plugins import load_plugins
    from probe.stopping import Stopped
    from probe.sweep_run import Worker, sweep

    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_the_lifeline, daemon=True).start()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    load_plugins([Path(p) for p in job["plugins"]])
    recipe: Recipe = parse_recipe(job["recipe"], source=job["source"])
    worker = Worker(job["device"], job["dtype"], command=job["command"])
    try:
        sweep(
            recipe,
            out=Path(job["out"]),
            limit=job["limit"],
            workers=worker.all,
            shard=tuple(job["shard"]) if job["shard"] else None,
            retries=job["retries"],
            begin=job["begin"],
        )
    except KeyboardInterrupt as stopped:
        return stopped.status if isinstance(stopped, Stopped) else 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
