"""A long run holds its memory flat; a sample that needs too much fails alone."""

from __future__ import annotations

import gc
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hardship import ended, forked, needs_fork, samples_of
from PIL import Image

import probe
import probe.vocabulary  # registers the signals
from probe.data import Sample
from probe.failures import free_memory, is_out_of_memory, reason_of
from probe.registry import scores, signals
from probe.site import Site
from probe.trace import open_trace, verify


def everything() -> str:
    """A recipe that records every signal at every site where it is given."""
    probes = []
    for site in Site:
        fitting = []
        for entry in signals:
            sites = entry.meta["site"]
            if site in (sites if isinstance(sites, tuple) else (sites,)):
                fitting.append(f"{{{entry.name}: {{as: {entry.name}_{site.name.lower()}}}}}")
        if fitting:
            where = "layers: all" if site.has_layers else ""
            probes.append(
                f"  - at: {{site: {site.value}{', ' if where else ''}{where}}}\n    record: [{', '.join(fitting)}]"
            )
    edit = "  - {at: {site: layer.input, layer: 2}, score: norm, select: {top_k: {keep: 0.5}}, do: drop}"
    return "schema: 1\nname: everything\nprobes:\n" + "\n".join([edit, *probes]) + "\n"


def resident() -> int:
    """Bytes of memory that the process holds now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


def held_over(tiny: Any, out: Path, count: int, *, timed: bool) -> np.ndarray:
    """Resident memory, in MB, as each sample begins."""
    seen: dict[int, float] = {}

    def look(at: Any) -> None:
        if at.sample not in seen:
            gc.collect()
            seen[at.sample] = resident() / 1e6

    recipe = probe.parse_recipe(everything())
    result = probe.run(recipe, backbone=tiny, samples=samples_of(count), out=out, on_progress=look, timed=timed)
    assert result.failed == 0 and len(seen) == count
    with open_trace(result.trace) as trace:
        assert len(trace.variables) > 20
    assert verify(result.trace) == []
    return np.array([seen[i] for i in range(count)])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_is_flat(tiny: Any, tmp_path: Path) -> None:
    held = held_over(tiny, tmp_path, 14, timed=False)
    assert held[-4:].mean() - held[4:8].mean() < 12, held


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_campaign_memory_is_flat_over_200_samples(tiny: Any, tmp_path: Path) -> None:
    held = held_over(tiny, tmp_path, 200, timed=True)
    early, late = held[20:60].mean(), held[-40:].mean()
    print(f"\nresident memory: samples 20..59 {early:.1f} MB, samples 160..199 {late:.1f} MB, peak {held.max():.1f} MB")
    assert late - early < 15, held[::10]


@needs_fork
def test_out_of_memory_at_one_sample_fails_that_sample(tiny: Any, tmp_path: Path) -> None:
    """A process with a limit of address space; at the second of three samples a score asks for more than that."""

    @scores.register
    def hungry(hidden: torch.Tensor) -> torch.Tensor:
        if hidden.shape[0] > 150:
            torch.ones(6 << 30, dtype=torch.uint8)
        return hidden.float().norm(dim=-1)

    recipe = probe.load_recipe("prune/random").replace(
        name="hungry",
        probes=[
            {
                "at": {"site": "layer.input", "layer": 1},
                "score": "hungry",
                "select": {"top_k": {"keep": 0.5}},
                "do": "drop",
            }
        ],
    )
    sizes = {"small": (40, 40), "large": (280, 280), "small again": (40, 40)}
    samples = [Sample(name, (Image.effect_noise(size, 60),), "What?") for name, size in sizes.items()]

    def limited() -> None:
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + (2 << 30), now + (2 << 30)))
        result = probe.run(recipe, backbone=tiny, samples=samples, out=tmp_path, timed=False)
        assert result.failed == 1 and "out of memory" in result.notes[0]

    try:
        assert ended(forked(limited)) == 0
    finally:
        del scores._entries["hungry"]
    with open_trace(tmp_path / "hungry.trace.h5") as trace:
        assert [bool(f) for f in trace.array("failed")] == [False, True, False]
        assert str(trace.array("failed")[1]).startswith("out of memory")


def test_what_a_failed_sample_held_is_given_back(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hundred MB in a frame of the exception are gone when the next sample begins."""
    from probe import runner

    honest = runner._one_sample
    held: list[float] = []

    def greedy(*args: Any, **kwargs: Any) -> Any:
        held.append(resident() / 1e6)
        if args[3] == 1:
            block = torch.ones(200_000_000, dtype=torch.uint8)
            cycle: list[Any] = [block]
            cycle.append(cycle)
            raise MemoryError
        return honest(*args, **kwargs)

    monkeypatch.setattr(runner, "_one_sample", greedy)
    recipe = probe.load_recipe("prune/random")
    result = probe.run(recipe, backbone=tiny, samples=samples_of(4), out=tmp_path, timed=False)
    assert result.failed == 1 and "out of memory" in result.notes[0]
    assert held[2] - held[1] < 100


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory: you tried"),
        np._core._exceptions._ArrayMemoryError((10**12,), np.dtype("f8")),  # type: ignore[attr-defined]
    ],
)
def test_what_running_out_of_memory_looks_like(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert reason_of(error).startswith("out of memory") and "\n" not in reason_of(error)
    free_memory()


def test_other_errors_are_none() -> None:
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert reason_of(ZeroDivisionError()) == "ZeroDivisionError"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0
