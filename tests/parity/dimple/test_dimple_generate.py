"""Every step of every generation that the original sampler made: which slots, by which rule, over which rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dimple_examples import model_in, prompts_of
from safetensors.torch import load_file

from probe.backbones.dimple import Dimple as Model
from probe.canvas import make_canvas
from probe.compile import ProbeTable
from probe.decoding.caching import Crop, NoCache
from probe.decoding.dimple import Dimple
from probe.decoding.draw import Draw
from probe.loop import Finished, Rule, Step, denoise
from probe.tracer import Tracer


def cases(root: Path) -> Iterator[tuple[str, Any]]:
    table = json.loads((root / "generate.json").read_text(encoding="utf-8"))
    for example in table["examples"]:
        for case in example["cases"]:
            yield f"{example['name']}-{case['name']}", (root, example, case, table["mask_token_id"])


def policy_of(settings: dict[str, Any]) -> Dimple:
    """The sampler's settings, as they were resolved, in this one's terms. The original pools every batch."""
    return Dimple(
        pipeline=settings["decoding_pipeline"],
        algorithm=settings["alg"],
        threshold=settings["alg_p_threshold"] if settings["decoding_pipeline"] == "dim" else None,
        top_p=settings["top_p"],
        top_k=settings["top_k"],
        eps=settings["eps"],
        original_confidence=settings["use_original_confidence"],
        alg_temp=settings["alg_temp"],
        pooled=True,
    )


def rule_of(case: dict[str, Any], mask: int) -> Rule:
    settings = case["expected"]["resolved"]
    length = settings["max_new_tokens"]
    return Rule(
        gen_length=length,
        block_length=length,
        steps=settings["steps"],
        mask_id=mask,
        temperature=settings["temperature"],
        prior=tuple((slot, token) for slot, token in case["structure_prior"] or ()),
        unmasking=policy_of(settings),
        caching=Crop() if settings["use_cache"] else NoCache(),
    )


@torch.inference_mode()
def decode(model: Model, prompts: Any, rule: Rule, seed: int | None) -> tuple[list[Step], Finished]:
    canvas = make_canvas(prompts, model.embed(torch.tensor(rule.mask_id)), rule.gen_length)
    generator = torch.Generator()
    generator.manual_seed(seed or 0)
    tracer = Tracer(model, ProbeTable(()), canvas, seeds=list(range(len(prompts))))
    *steps, finished = denoise(canvas, tracer, rule, model.embed, [Draw(generator)] * len(prompts))
    assert isinstance(finished, Finished)
    return steps, finished  # type: ignore[return-value]


def mode(step: Step, rule: Rule) -> str:
    """By which rule a step committed, told from its scores alone (the last step commits what is left by either)."""
    threshold = rule.unmasking.threshold  # type: ignore[attr-defined]
    if not bool(step.committed.any()):
        return "none"
    if threshold and bool((step.score[step.eligible] > threshold).any()):
        return "threshold"
    return "scheduled"


@pytest.mark.cases("dimple", cases)
def test_dimple_generation(case: Any, near: Any) -> None:
    root, example, told, mask = case
    want, rule = told["expected"], rule_of(told, mask)
    prompts = prompts_of(root, example["name"])
    steps, finished = decode(model_in(root, "sdpa"), prompts, rule, told["torch_seed"])
    length = max(p.ids.shape[0] for p in prompts)
    assert length == example["prompt_length"]
    assert len(steps) == finished.passes == want["nfe_steps"]
    computed = [1 + rule.gen_length if s.work.prompt == "last" else length + rule.gen_length for s in steps]
    assert computed == want["forward_lengths"]
    assert [int(s.committed.sum()) for s in steps] == want["tokens_committed_per_step"]
    if told["order_depends_on_ties"]:
        assert all(bool((s.score[s.committed] == s.score[s.eligible].max()).all()) for s in steps[:-1])
        return
    stored = load_file(root / "generate_logits.safetensors")
    logits = stored.get(f"{example['name']}.{told['name']}.shifted_logits_answer")
    before = want["initial_answer_tokens"]
    for i, (step, tokens) in enumerate(zip(steps, want["history_answer_tokens"], strict=True)):
        assert step.masked_before == [[s for s, t in enumerate(row) if t == mask] for row in before]
        assert step.tokens.tolist() == tokens
        assert mode(step, rule) == want["commit_mode"][i]
        if logits is not None:
            near(step.logits, logits[i][:, step.slots], 5e-4)
        before = tokens
    assert finished.output == want["answer_tokens"]
    assert any(mask in row for row in finished.output) == want["mask_id_left"]
