"""Every step of every generation that the original loop made: which slots, how sure, what was written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_llada_v_vlm import features_of, ids_of, samples

from probe.backbones.base import SpecialIds
from probe.backbones.llada_v import LladaV
from probe.canvas import make_canvas
from probe.compile import ProbeTable
from probe.decoding.draw import Draw
from probe.decoding.schedule import linear
from probe.errors import ProbeError
from probe.loop import Finished, Rule, Step, denoise
from probe.tracer import Tracer


def schedules(root: Path) -> Iterator[tuple[str, Any]]:
    path = root / "schedule.json"
    if path.is_file():
        for i, row in enumerate(json.loads(path.read_text(encoding="utf-8"))["rows"]):
            yield f"schedule-{i}", row


@pytest.mark.cases("llada_v", schedules)
def test_schedule(case: Any) -> None:
    masks, wanted = case["masks"], case["tokens_per_step"]
    if isinstance(masks, int):
        masks, wanted = [masks], [wanted]
    assert [linear(m, case["steps"]) for m in masks] == wanted


def language_cases(root: Path) -> Iterator[tuple[str, Any]]:
    for folder in sorted(root.glob("*/generate")):
        table = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
        for case in table["cases"]:
            yield f"{folder.parent.name}-{case['name']}", (folder, table, case)


def picture_cases(root: Path) -> Iterator[tuple[str, Any]]:
    for name, (folder, case) in samples(root):
        if case.get("steps"):
            yield name, (folder, case)


def illegal_cases(root: Path) -> Iterator[tuple[str, Any]]:
    for folder in sorted(root.glob("*/generate")):
        table = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
        for i, case in enumerate(table.get("illegal", [])):
            yield f"{folder.parent.name}-illegal-{i}", (table["special"], case["args"])


def rule_of(args: dict[str, Any], special: SpecialIds, strings: dict[str, list[int]]) -> Rule:
    names = {"gen_length", "block_length", "steps", "temperature", "remasking", "cfg_scale"}
    suffix = args.get("generation_suffix")
    return Rule(
        **{"gen_length": 128, "block_length": 128, "steps": 128} | {k: v for k, v in args.items() if k in names},
        mask_id=args.get("mask_id", special.mask),
        suppressed=special.suppressed,
        stop=tuple(tuple(strings[s]) for s in args.get("stopping_criteria") or ()),
        suffix=tuple(strings[suffix]) if suffix else (),
    )


@torch.inference_mode()
def decode(model: LladaV, prompt: Any, rule: Rule, seed: int | None) -> tuple[list[Step], Finished]:
    suffix = model.embed(torch.tensor(rule.suffix)) if rule.suffix else None
    canvas = make_canvas([prompt], model.embed(torch.tensor(rule.mask_id)), rule.gen_length, suffix)
    generator = torch.Generator()
    generator.manual_seed(seed or 0)
    model.special = SpecialIds(rule.mask_id, model.special.eos, model.special.stop, model.special.suppressed)
    *steps, finished = denoise(canvas, Tracer(model, ProbeTable(()), canvas), rule, model.embed, [Draw(generator)])
    assert isinstance(finished, Finished)
    return steps, finished  # type: ignore[return-value]


def check(steps: list[Step], finished: Finished, case: dict[str, Any], rule: Rule) -> None:
    assert finished.output[0] == case["output"]
    overfull = any(wanted["k"] > wanted["eligible"] for wanted in case["steps"])
    if overfull:  # the original then commits slots in topk's order among equals, which is no rule
        return
    assert len(steps) == len(case["steps"])
    if "n_forward" in case:
        assert finished.passes == case["n_forward"]
    for step, wanted in zip(steps, case["steps"], strict=True):
        per_block = rule.steps // rule.n_blocks
        assert (step.clock.block, step.clock.step_in_block) == (wanted["block"], wanted["step"])
        assert step.clock.step == wanted["block"] * per_block + wanted["step"]
        assert step.counts == [wanted["k"]]
        assert step.masked_before[0] == wanted["masked_before"]
        assert int(step.eligible.sum()) == wanted["eligible"]
        shown = {s: i for i, s in enumerate(step.slots) if step.eligible[0, i]}
        told = {i: c for i, c in enumerate(wanted["confidence"]) if c is not None}
        assert {s for s in shown if s >= 0} == set(told)
        for slot, score in told.items():
            assert float(step.score[0, shown[slot]]) == pytest.approx(score, abs=2e-5)
            assert int(step.candidate[0, shown[slot]]) == wanted["x0"][slot]
        assert sorted(s for s, i in shown.items() if step.committed[0, i]) == sorted(wanted["transferred"])
        assert step.tokens[0].tolist() == wanted["tokens_after"][: rule.gen_length]


@pytest.mark.cases("llada_v", language_cases)
def test_language_generation(case: Any, model_at: Any) -> None:
    folder, table, told = case
    model = model_at((folder / table["weights"]).resolve())
    inputs = load_file(folder / "inputs.safetensors")
    ids = inputs["prompt_ids"]
    if "mask_id_inside_prompt" in told["name"]:
        ids = inputs["prompt_ids_with_mask"]
    prompt = model.without_pictures(ids[0].tolist(), 0)
    special = SpecialIds(
        table["special"]["mask_id"], table["special"]["eos_id"], table["special"]["eot_id"],
        tuple(table["special"]["suppressed"]),
    )  # fmt: skip
    rule = rule_of(told["args"], special, told.get("tokenizer_table") or {})
    steps, finished = decode(model, prompt, rule, told.get("manual_seed"))
    check(steps, finished, told, rule)
    stored = folder / "expected_logits.safetensors"
    name = f"{told['name']}.logits_gen"
    if stored.is_file() and name in (wanted := load_file(stored)):
        for step, row in zip(steps, wanted[name], strict=True):
            torch.testing.assert_close(step.logits[0], row[step.slots], atol=5e-4, rtol=1e-5)


@pytest.mark.cases("llada_v", illegal_cases)
def test_illegal_settings_are_refused(case: Any) -> None:
    special, args = case
    with pytest.raises(ProbeError, match="multiple"):
        rule_of(args, SpecialIds(special["mask_id"], special["eos_id"], special["eot_id"], ()), {})


@pytest.mark.cases("llada_v", picture_cases)
def test_generation_from_pictures(case: Any, model_at: Any) -> None:
    folder, told = case
    model = model_at(folder)
    prompt = model.with_pictures(ids_of(folder, told), features_of(model, folder, told))
    rule = rule_of(told["generate_args"], model.special, told.get("tokenizer_table") or {})
    steps, finished = decode(model, prompt, rule, told.get("manual_seed"))
    check(steps, finished, told, rule)
