"""What a trace of the unpruned model advises: synthetic traces of both kinds, and those that cannot say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from probe.errors import ProbeError
from probe.recipe import load_recipe
from probe.site import SEGMENTS, Fate
from probe.suggest import portrait, suggest
from probe.trace import SampleRecord, TraceHeader, TraceWriter, Variable, open_trace

LAYERS, SLOTS, VISUAL = 8, 6, 12
HEADER = TraceHeader(
    recipe_name="attention_mass",
    recipe_yaml="schema: 1\nname: attention_mass\nbackbone: some/model\ndata: {task: world/long, limit: 3}\n",
    recipe_hash="0",
    backbone="some/model",
    coords={"segment": ["answer"], "segment_key": list(SEGMENTS)},
)
VARIABLES = [
    Variable("attention_mass", ("step", "layer", "segment", "segment_key"), "1", "mass"),
    Variable("confidence", ("step", "position"), "1", "confidence"),
    Variable("visual_kept", ("step", "layer", "visual"), "1", "fate", dtype="uint8"),
]


def sample(number: int, visual: np.ndarray, sure: np.ndarray, fate: Fate = Fate.KEPT) -> SampleRecord:
    """A sample whose answer looks at the picture like `visual (step, layer)` and is as sure as `sure (step)`."""
    steps = visual.shape[0]
    mass = np.zeros((steps, LAYERS, 1, len(SEGMENTS)))
    mass[:, :, 0, SEGMENTS.index("visual")] = visual
    mass[:, :, 0, SEGMENTS.index("answer")] = 1 - visual
    confidence = np.tile(sure[:, None], (1, SLOTS))
    for step in range(steps):
        confidence[step, : step * SLOTS // steps] = np.nan  # slots that are filled by then
    kept = np.full((steps, LAYERS, VISUAL), int(fate))
    arrays = {"attention_mass": mass, "confidence": confidence, "visual_kept": kept}
    return SampleRecord(sample=number, arrays=arrays)


def write(path: Path, samples: list[SampleRecord], variables: list[Variable] = VARIABLES) -> Path:
    with TraceWriter(path, HEADER, variables) as writer:
        for record in samples:
            writer.write(record)
    return path


def noisy(visual: np.ndarray, seed: int) -> np.ndarray:
    return visual * np.random.default_rng(seed).uniform(0.9, 1.1, visual.shape)


def from_scratch(number: int, steps: int) -> SampleRecord:
    """High everywhere, to the end; sure after three quarters of the steps."""
    sure = np.where(np.arange(steps) >= round(0.75 * steps) - 1, 0.9, 0.3)
    return sample(number, noisy(np.full((steps, LAYERS), 0.6), number), sure)


def adapted(number: int, steps: int, until: float = 1.0) -> SampleRecord:
    """One spike, at layer 3; after `until` of the steps the answer hardly looks at all."""
    visual = np.full((steps, LAYERS), 0.05)
    visual[:, 3] = 0.7
    visual[round(until * steps) :] *= 0.1
    return sample(number, noisy(visual, number), np.full(steps, 0.8))


def test_attention_over_all_layers_and_late_confidence_advise_late_and_progressive(tmp_path: Path) -> None:
    path = write(tmp_path / "a.trace.h5", [from_scratch(i, 8 + 4 * i) for i in range(3)])
    with open_trace(path) as trace:
        late, progressive = suggest(trace)
    assert (late.recipe.name, progressive.recipe.name) == ("late_step", "progressive")
    assert late.recipe.dial["start"] == 0.75
    assert progressive.recipe.dial["at"] == ["75%"]
    assert late.recipe.backbone == "some/model"
    assert (late.recipe.data.task, late.recipe.data.limit) == ("world/long", None)
    assert f"{LAYERS} of {LAYERS} layers" in late.text.replace("\n# ", " ")
    assert "trained from scratch" in late.text.replace("\n# ", " ")


def test_a_spike_advises_skipping_the_layers_around_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.trace.h5", [adapted(i, 8 + 4 * i) for i in range(3)])
    with open_trace(path) as trace:
        (found,) = suggest(trace)
    assert found.recipe.name == "layer_skip"
    assert found.recipe.dial["layer"] == [0, 1, 5, 6, 7]
    assert found.recipe.dial["start"] == 0.0
    assert "1 of 8 layers" in found.text.replace("\n# ", " ")


def test_looking_in_the_first_steps_only_sets_the_start(tmp_path: Path) -> None:
    path = write(tmp_path / "a.trace.h5", [adapted(i, 20, until=0.25) for i in range(2)])
    with open_trace(path) as trace:
        (found,) = suggest(trace)
    assert found.recipe.dial["start"] == 0.25
    early = np.full((20, LAYERS), 0.6)
    early[6:] = 0.1
    path = write(tmp_path / "b.trace.h5", [sample(0, early, np.full(20, 0.9))])
    with open_trace(path) as trace:
        late, progressive = suggest(trace)
    assert late.recipe.dial["start"] == pytest.approx(0.3)
    assert progressive.recipe.dial["at"] == ["50%", "75%"]


def test_flat_confidence_leaves_half() -> None:
    found = portrait([np.full((10, LAYERS, 5), 0.2)], [np.full((10, SLOTS), 0.99)])
    assert found.sure_at is None
    assert found.looked_until == 1.0


def test_traces_that_cannot_say_are_refused_with_what_to_record(tmp_path: Path) -> None:
    blind = [v for v in VARIABLES if v.name != "attention_mass"]
    record = from_scratch(0, 8)
    arrays = {k: v for k, v in record.arrays.items() if k != "attention_mass"}
    cases = {
        "none": ([SampleRecord(sample=0, arrays=arrays)], blind, "probe run record/attention_mass"),
        "pruned": (
            [sample(0, np.full((8, LAYERS), 0.5), np.ones(8), Fate.DROPPED)],
            VARIABLES,
            "removed visual tokens",
        ),
        "short": ([from_scratch(0, 3)], VARIABLES, "fewer than 4 steps"),
        "failed": ([SampleRecord(sample=0, failed="no")], VARIABLES, "no sample with visual tokens"),
    }
    for name, (samples, variables, words) in cases.items():
        path = write(tmp_path / f"{name}.trace.h5", samples, variables)
        with open_trace(path) as trace, pytest.raises(ProbeError, match=words):
            suggest(trace)


def test_suggestions_are_written_and_run(probe_command: Callable[..., str]) -> None:
    quick = ("-s", "generate.gen_length=8", "-s", "generate.steps=4", "--limit", "1", "--no-time")
    probe_command("run", "record/attention_mass", "--data", "world/long", *quick, "-o", "rec")
    said = probe_command("suggest", "rec/attention_mass.trace.h5", "-o", "advice")
    files = sorted(Path("advice").glob("*.yaml"))
    assert files
    assert all(str(f) in said for f in files)
    for file in files:
        recipe = load_recipe(file)
        assert recipe.generate.steps == 4
        probe_command("run", file, "--limit", "1", "--no-baseline", "-o", f"out-{file.stem}")
    assert "schema: 1" in probe_command("suggest", "rec/attention_mass.trace.h5")
