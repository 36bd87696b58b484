"""Every step of every generation that LaViDa-LLaDA's block sampler made, over the prompt's cache and without it."""

from __future__ import annotations

from typing import Any

import pytest
from lavida_reference import check_generation, generations, model_of

from probe.decoding.caching import NoCache, PrefixLM
from probe.decoding.lavida import LavidaLlada
from probe.errors import ProbeError
from probe.loop import Rule

SCORES = {"low_confidence": "confidence", "margin": "margin", "entrophy": "entropy", "random": "random"}
BLOCK = 128
"""The original's default."""


def rule_of(case: dict[str, Any], mask: int) -> Rule:
    """The original call's arguments in this one's terms; `steps`, which it overwrites, is given all the same."""
    asked = case["kwargs"]
    length = asked["max_new_tokens"]
    drafts = asked.get("draft_tokens") or [[]]
    return Rule(
        gen_length=length,
        block_length=asked.get("block_length", BLOCK),
        steps=asked.get("steps", length),
        mask_id=mask,
        temperature=asked["temperature"],
        prior=tuple((slot, token) for slot, token in enumerate(drafts[0]) if token != mask),
        unmasking=LavidaLlada(
            score_by=SCORES[asked.get("remasking", "low_confidence")],  # type: ignore[arg-type]
            schedule=asked.get("schedule"),
            step_ratio=asked.get("step_ratio"),
            step_per_block=asked.get("step_per_block"),
            **(asked.get("schedule_kwargs") or {}),
        ),
        caching=PrefixLM() if asked["prefix_lm"] else NoCache(),
    )


@pytest.mark.cases("lavida_llada", generations)
def test_lavida_llada_generation(case: Any) -> None:
    root, picture, told = case
    mask = model_of(root).special.mask
    if told.get("expected", {}).get("raises"):
        with pytest.raises(ProbeError):
            rule_of(told, mask)
    else:
        check_generation(root, picture, told, rule_of(told, mask))
