"""Every row at a toy size: it runs, compares its outputs, and names the targets that the list names."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from probe.backbones import random_weights as published
from probe.bench import plain
from probe.bench.rows import loop, memory, pruners, recording
from probe.bench.shapes import Bench, prompt_of, table_of
from probe.bench.suite import BY_DEFAULT, FULL, ROWS, chosen, command_of, measure
from probe.bench.table import as_json, conditions, markdown, not_measured
from probe.errors import ProbeError

ISSUE = {  # what was asked for, by row
    "loop": ["≤ 1.010x"],
    "recording": ["≤ 1.080x"],
    "eager": ["≥ 1.400x", "≥ 2.000x"],
    "memory": ["≤ 5.00%"],
    "published": ["≥ 1.300x"],
    "speedup": ["≥ 0.900x"],
    "pruner": ["≤ 3.00%"],
    "writing": ["≤ 2.00%"],
    "prefix": ["≥ 1.000x"],
    "batch": ["≥ 1.000x"],
    "startup": ["≤ 3.000x", "≤ 2 s"],
    "scaling": ["≥ 0.900x"],
    "full": ["≥ 1.440x"],
}
PROCESSES = ("memory", "startup")
"""Rows that start processes of their own."""


def test_every_figure_that_was_asked_for_has_a_row_and_its_target() -> None:
    rows = {row.name: row for row in ROWS}
    assert rows.keys() == ISSUE.keys()
    for name, targets in ISSUE.items():
        assert set(targets) <= set(rows[name].targets), name
        assert name in command_of(rows[name]) or name == "full"
    assert set(BY_DEFAULT) == ISSUE.keys() - {"full"}


@pytest.mark.parametrize("name", [n for n in BY_DEFAULT if n not in (*PROCESSES, "speedup")])
def test_a_row_runs_and_compares_its_outputs(toy: Bench, name: str) -> None:
    (row,) = chosen([name], None)
    lines = measure(toy, [row], steps=2, repeats=1)
    assert lines
    for line in lines:
        assert line.row == name and line.equal and line.value is not None
        assert line.value.median > 0
        assert str(line.target) in row.targets


def test_pruners_are_measured_from_the_start_and_from_half_of_the_steps(toy: Bench) -> None:
    lines = measure(toy, chosen(["speedup"], None), steps=2, repeats=1)
    assert all(line.equal and str(line.target) == "≥ 0.900x" for line in lines)
    for name in ("FastV", "SparseVLM", "VTW", "DivPrune", "ToMe", "layer_skip", "progressive"):
        starts = {line.what.split(" from ")[1].split(" of ")[0] for line in lines if line.what.startswith(name)}
        assert starts == {"0%", "50%"}, name
    assert all(line.numbers["predicted"] > 1.1 for line in lines)


def test_memory_compares_processes_with_and_without_recording(toy: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def pretended(bench: Bench, *, recording: bool) -> tuple[tuple[float, float], list[list[list[int]]]]:
        return ((104.0, 107.12) if recording else (100.0, 100.0)), [[[1]], [[1], [2]]]

    monkeypatch.setattr(memory, "in_process", pretended)
    extra, grown = memory.run(toy)
    assert extra.value is not None and extra.value.median == pytest.approx(0.04)
    assert grown.value is not None and grown.value.median == pytest.approx(0.03)
    assert extra.met and not grown.met


def test_a_process_tells_its_peaks_and_its_tokens(toy: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    told = memory.told(replace(toy, shape=replace(toy.shape, layers=2)), recording=True)
    memory.child(json.loads(json.dumps(told)))
    found = json.loads(capsys.readouterr().out)
    assert all(2**20 < peak < 2**40 for peak in found["peaks"])
    assert [len(tokens) for tokens in found["tokens"]] == [4, 8]


@pytest.mark.slow
@pytest.mark.parametrize("name", PROCESSES)
def test_rows_with_processes_of_their_own(toy: Bench, name: str) -> None:
    small = replace(toy, shape=replace(toy.shape, layers=2), quick=True, memo={})
    lines = measure(small, chosen([name], None), repeats=1)
    assert len(lines) == 2 and all(line.equal and line.value is not None for line in lines)
    with pytest.raises(ProbeError, match="its process failed"):
        memory.in_process(replace(small, published="no/such", random_weights=True, memo={}), recording=False)


def test_the_hand_written_loops_agree_with_each_other(toy: Bench) -> None:
    model, prompt = toy.model, toy.prompt()
    minimal = plain.minimal(model, prompt, 8, 3).tokens
    assert [sum(t != model.special.mask for t in tokens) for tokens in minimal] == [3, 6, 8]
    assert minimal == plain.published(model, prompt, 8, 3).tokens == plain.eager(model, prompt, 8, 3).tokens
    everything = torch.ones(3, 8, 48, dtype=torch.bool)
    assert minimal == plain.without(model, prompt, 8, 3, everything, compact=False).tokens
    half = everything.clone()
    half[:, 4:, 1::2] = False
    confidence = [plain.without(model, prompt, 8, 3, x, compact=False).confidence[0] for x in (everything, half)]
    assert (confidence[0] / confidence[1] - 1).abs().max() > 1e-3


def test_an_engine_that_gives_other_tokens_is_refused(toy: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    real = plain.minimal

    def wrong(*args: Any) -> plain.Looked:
        out = real(*args)
        out.tokens[-1][0] += 1
        return out

    monkeypatch.setattr(plain, "minimal", wrong)
    with pytest.raises(ProbeError, match="nothing was timed"):
        loop.run(toy)


def test_a_recording_that_is_off_is_refused(toy: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    real = plain.eager

    def wrong(*args: Any) -> plain.Looked:
        out = real(*args)
        out.importance[1][2] = out.importance[1][2] * 1.01
        return out

    monkeypatch.setattr(plain, "eager", wrong)
    with pytest.raises(ProbeError, match="`visual_importance` is .* apart"):
        recording.run_eager(toy)


@pytest.mark.parametrize("case", [c for c in pruners.CASES if c.by_hand], ids=lambda c: c.name)
def test_a_pruner_that_removes_other_rows_than_it_says_is_refused(toy: Bench, case: pruners.Case) -> None:
    table = table_of(toy.model, case.recipe, case.dials(0.0, 4))
    result = toy.answer(table)
    pruners._check(toy, case, table, result)
    fates = result.arrays["visual_kept"].copy()
    fates[-1, -1] = np.roll(fates[-1, -1], 1) if (fates[-1, -1] == 1).any() else 1
    fates[-1] = fates[-1, -1]
    lying = replace(result, arrays=result.arrays | {"visual_kept": fates})
    with pytest.raises(ProbeError, match="rows cut out by hand"):
        pruners._check(toy, case, table, lying)


def test_prompts_depend_on_the_seed_alone(toy: Bench) -> None:
    assert torch.equal(toy.prompt().embeds, prompt_of(toy.model, toy.shape, 1).embeds)
    assert not torch.equal(toy.prompt().embeds, toy.prompt(sample=1).embeds)


SMALL = {
    "GSAI-ML/LLaDA-V": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4},
    "jacklishufan/lavida-dream-v1.0-instruct": {
        "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2
    },
}  # fmt: skip


@pytest.mark.parametrize("name", FULL)
def test_published_shapes_without_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, shapes_of, field = published.SHAPES[name]
    monkeypatch.setitem(published.SHAPES, name, (config | SMALL[name], shapes_of, field))
    bench = Bench(published=name, random_weights=True, published_layers=4)
    bench.shape = replace(bench.shape, visual=64, answer=4)
    lines = measure(bench, chosen([], name), steps=4, repeats=1)
    told = {line.what for line in lines}
    for word in ("unpruned", "recording", "DivPrune", "FastV", "VTW"):
        assert any(word in what for what in told), word
    assert any(what.startswith("prefix cache") for what in told) == ("lavida" in name)
    assert all(line.equal for line in lines)
    assert all("ms per pass" in line.note or "predicted" in line.note for line in lines)
    rest = not_measured(lines)
    assert rest and not any(FULL[name] in line.what for line in rest)
    page = markdown([*lines, *rest], conditions(bench))
    assert page.count("not measured") >= 4 and "--random-weights" in page
    assert '"lines"' in as_json(lines, conditions(bench))
