"""Every step of every generation that LaViDa-Dream's sampler made, over the prompt's cache and without it."""

from __future__ import annotations

from typing import Any

import pytest
from lavida_reference import check_generation, decode, generations, model_of, text_prompt

from probe.decoding.caching import NoCache, PrefixLM
from probe.decoding.dream import Dream
from probe.errors import ProbeError
from probe.loop import Rule

HIDDEN_TOP_K = 50
"""What transformers 4.50 puts into every config, and the sampler reads from there."""
STEPS = 512
"""The original's default."""


def rule_of(case: dict[str, Any], mask: int) -> Rule:
    """The original call's arguments in this one's terms; what it ignores (blocks) is left out."""
    asked = case["kwargs"]
    settings = {"top_k": HIDDEN_TOP_K, "steps": STEPS, "eps": 1e-3, **asked}
    settings |= case.get("resolved", case.get("expected", {}).get("resolved", {}))
    length = settings["max_new_tokens"]
    unmasking = Dream(
        algorithm=settings["alg"],
        alg_temp=settings.get("alg_temp") or None,
        top_p=settings["top_p"],
        top_k=settings["top_k"],
        eps=settings["eps"],
        schedule=asked.get("schedule"),
        step_ratio=asked.get("step_ratio"),
        capped=True,
        **(asked.get("schedule_kwargs") or {}),
    )
    return Rule(
        gen_length=length,
        block_length=length,
        steps=settings["steps"],
        mask_id=mask,
        temperature=settings["temperature"],
        unmasking=unmasking,
        caching=PrefixLM() if asked["prefix_lm"] else NoCache(),
    )


@pytest.mark.cases("lavida_dream", generations)
def test_lavida_dream_generation(case: Any) -> None:
    root, picture, told = case
    mask = model_of(root).special.mask
    if told.get("expected", {}).get("raises"):
        with pytest.raises(ProbeError):
            decode(model_of(root), text_prompt(root), rule_of(told, mask), told["torch_seed"])
    else:
        check_generation(root, picture, told, rule_of(told, mask))
