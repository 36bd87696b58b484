"""The same recipe gives the same answers and signals: twice, in another process, in batches, in shards, resumed."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hardship import contents, recording_recipe, same_runs, samples_of

import probe
from probe.compile import compile_recipe
from probe.generate import generate
from probe.loop import Rule
from probe.recipe import Recipe
from probe.trace import merge

ROOT = Path(__file__).resolve().parents[2]
COUNT = 5


def noisy_recipe() -> Recipe:
    """Sampling, random remasking and random pruning: everything that draws random numbers."""
    return (
        recording_recipe()
        .with_sets(["generate.temperature=0.7", "generate.remasking=random"])
        .replace(
            probes=[
                {
                    "at": {"site": "layer.input", "layer": 1},
                    "score": "random",
                    "select": {"top_k": {"keep": 0.5}},
                    "do": "drop",
                },
                {"at": {"site": "layer.attention", "layers": "all"}, "record": ["attention_mass", "visual_importance"]},
                {"at": {"site": "logits"}, "record": ["entropy", "margin"]},
            ]
        )
    )


@pytest.fixture(scope="module", params=["greedy", "noisy"])
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return recording_recipe() if request.param == "greedy" else noisy_recipe()


@pytest.fixture(scope="module")
def once(recipe: Recipe, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(recipe, tiny, tmp_path_factory.mktemp("once"))


def run(recipe: Recipe, tiny: Any, out: Path, **words: Any) -> Path:
    return probe.run(
        recipe, backbone=tiny, samples=samples_of(COUNT, "world/mixed"), out=out, timed=False, **words
    ).trace


def test_twice(recipe: Recipe, once: Path, tiny: Any, tmp_path: Path) -> None:
    np.random.seed(1)
    random.seed(1)
    again = run(recipe, tiny, tmp_path)
    same_runs(again, once)
    same_runs(again.with_name("hard.baseline.trace.h5"), once.with_name("hard.baseline.trace.h5"))


def test_in_shards(recipe: Recipe, once: Path, tiny: Any, tmp_path: Path) -> None:
    for count in (3,):
        out = tmp_path / str(count)
        shards = [run(recipe, tiny, out, shard=(i, count)) for i in random.Random(count).sample(range(count), count)]
        same_runs(merge(shards, out / "joined.trace.h5"), once)


def test_resumed_after_every_sample(recipe: Recipe, once: Path, tiny: Any, tmp_path: Path) -> None:
    from probe import runner

    honest = runner._one_sample
    for _ in range(COUNT):
        done: list[int] = []

        def one(*args: Any, done: list[int] = done, **kwargs: Any) -> Any:
            if done:
                raise KeyboardInterrupt
            done.append(args[3])
            return honest(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runner, "_one_sample", one)
            try:
                trace = run(recipe, tiny, tmp_path, resume=True)
            except KeyboardInterrupt:
                continue
    same_runs(trace, once)


def test_in_batches(recipe: Recipe, tiny: Any) -> None:
    """Answers and decisions are identical. Signals differ by rounding, as products of other shapes are summed
    in another order: less than one part in ten thousand."""
    samples = samples_of(5, "world/mixed")
    prompts = [tiny.encode(s.images, s.question) for s in samples]
    own = recipe.generate
    rule = Rule(
        4, 4, 4, tiny.special.mask, tiny.special.suppressed, own.temperature or 0.0,
        own.remasking or "low_confidence",  # type: ignore[arg-type]
    )  # fmt: skip
    table = compile_recipe(recipe, tiny.facts)
    alone = [generate(tiny, [p], rule, table, seed=3, samples=[i])[0] for i, p in enumerate(prompts)]
    for size in (2, 3, 5):
        for first in range(0, 5, size):
            numbers = list(range(first, min(first + size, 5)))
            together = generate(tiny, [prompts[i] for i in numbers], rule, table, seed=3, samples=numbers)
            for i, found in zip(numbers, together, strict=True):
                assert found.ids == alone[i].ids and found.text == alone[i].text
                for name, array in found.arrays.items():
                    if name.startswith(("seconds", "flops", "peak")):
                        continue
                    if array.dtype.kind == "f":
                        np.testing.assert_allclose(array, alone[i].arrays[name], rtol=1e-4, atol=1e-5, err_msg=name)
                    else:
                        np.testing.assert_array_equal(array, alone[i].arrays[name], err_msg=name)


@pytest.mark.slow
def test_in_other_processes(tmp_path: Path) -> None:
    """Another order of hashes, another working folder, another folder for traces."""
    traces = []
    for seed in ("0", "1"):
        here = tmp_path / seed
        here.mkdir()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        words = ["run", "prune/random", "--limit", "3", "--data", "world/short", "--no-time"]
        words += ["--set", "generate.temperature=0.5", "--out", f"out{seed}"]
        subprocess.run(
            [sys.executable, "-m", "probe", *words], cwd=here, env=environment, check=True, capture_output=True
        )
        traces.append(here / f"out{seed}" / "random.trace.h5")
    same_runs(*traces)
    assert len(contents(traces[0])) == 3
