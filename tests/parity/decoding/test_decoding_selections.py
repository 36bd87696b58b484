"""Single-step scores, selections and cache choices, of every rule that `selections.json` names.

A rule's name carries its parameters (`fastdllm_threshold_0.9`): it is read by pattern, never looked up.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from probe.decoding import dllm_cache, propose, scores, select, sparse_dllm

NUMBER = r"(\d+(?:\.\d+)?)"
MASK_ID = 23
"""The sets' stand-in for the mask token (their README); dInfer's rules never propose it."""


def read(root: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not (root / "selections.json").is_file():
        return {}, {}
    return json.loads((root / "selections.json").read_text(encoding="utf-8")), load_file(
        root / "selections.safetensors"
    )


def rules(kind: Callable[[dict[str, Any]], bool]) -> Any:
    """Finds `(rule name, what is expected, the entry with its tensors read)` of the entries that `kind` takes."""

    def find(root: Path) -> Iterator[tuple[str, Any]]:
        table, tensors = read(root)
        for entry in table.get("selections", []):
            if kind(entry):
                loaded = {k: tensors[v] for k, v in entry.items() if isinstance(v, str) and v in tensors}
                more = {k.rpartition("/")[2]: v for k, v in tensors.items() if k.startswith(f"sel/{entry['case']}/")}
                for rule, want in entry["expected"].items():
                    yield f"{entry['case']}-{rule}", (rule, want, {**more, **loaded})

    return find


def is_selection(entry: dict[str, Any]) -> bool:
    return "mask" in entry


def is_gumbel(entry: dict[str, Any]) -> bool:
    return "noise" in entry


def is_calibrated(entry: dict[str, Any]) -> bool:
    return "freq" in entry


def is_score(entry: dict[str, Any]) -> bool:
    return not (is_selection(entry) or is_gumbel(entry) or is_calibrated(entry))


def parameters(pattern: str, rule: str) -> list[float] | None:
    found = re.fullmatch(pattern, rule)
    return None if found is None else [float(x) for x in found.groups()]


def pick(rule: str, score: Tensor, eligible: Tensor) -> Tensor:
    """What the rule of that name commits."""
    if given := parameters(rf"fastdllm_threshold_{NUMBER}", rule):
        return select.threshold(score, eligible, given[0])
    if given := parameters(rf"fastdllm_factor_{NUMBER}", rule) or parameters(rf"lladav_hook_threshold_{NUMBER}", rule):
        return select.factor(score, eligible, given[0])
    if given := parameters(rf"dllm_reimpl_factor_{NUMBER}", rule):
        return select.factor(score, eligible, given[0], last_rank_free=False)
    if given := parameters(r"topk_(\d+)", rule):
        return select.top_k(score, eligible, [int(given[0])] * len(score))
    if given := parameters(rf"dinfer_threshold_{NUMBER}", rule):
        return select.threshold_or_best(score, eligible, given[0])
    if given := parameters(rf"dinfer_hierarchy_{NUMBER}_low{NUMBER}", rule):
        return select.hierarchy(score, eligible, *given)
    raise AssertionError(f"a rule of no family that is known here: {rule}")


@pytest.mark.cases("decoding", rules(is_selection))
def test_selection(case: Any) -> None:
    rule, want, entry = case
    logits, eligible = entry["logits"], entry["mask"]
    dinfer = rule.startswith("dinfer")
    if dinfer:
        logits = propose.forbid(logits, [MASK_ID])
    candidate = logits.argmax(-1)
    probability = logits.softmax(-1) if dinfer else logits.double().softmax(-1)
    committed = pick(rule, scores.confidence(probability, candidate), eligible)
    assert torch.where(eligible, candidate, entry["x"]).tolist() == want["x0"]
    assert [row.nonzero()[:, 0].tolist() for row in committed] == want["transfer"]


@pytest.mark.cases("decoding", rules(is_score))
def test_score(case: Any) -> None:
    """`dream_maskgit_plus_topp0.9`: family, algorithm, truncation; `forced`: the second best token was drawn."""
    rule, want, entry = case
    found = re.fullmatch(
        rf"(dream|dimple_orig)(?:_(maskgit_plus|topk_margin|entropy|origin))?(?:_T{NUMBER})?"
        rf"(?:_topp{NUMBER})?(?:_topk(\d+))?(_forced)?",
        rule,
    )
    assert found, f"a score of no family that is known here: {rule}"
    family, algorithm, temperature, top_p, top_k, forced = found.groups()
    settings: dict[str, Any] = {
        "temperature": float(temperature or 0),
        "top_p": float(top_p) if top_p else None,
        "top_k": int(top_k) if top_k else None,
    }
    candidate = entry["logits"].topk(2, dim=-1).indices[:, 1] if forced else None
    got, x0 = scores.dream(
        entry["logits"], algorithm or "maskgit_plus", candidate, original=family == "dimple_orig", **settings
    )
    assert x0.tolist() == want["x0"]
    torch.testing.assert_close(got, torch.tensor(want["conf"]), atol=1e-5, rtol=0)
    given = want.get("sampler_probs") or f"{rule.removesuffix('_forced')}_probs"
    given = given.rpartition("/")[2]
    if given in entry:
        handed = propose.truncate(entry["logits"], **settings).softmax(-1)
        torch.testing.assert_close(handed, entry[given], atol=1e-5, rtol=0)


@pytest.mark.cases("decoding", rules(is_calibrated))
def test_calibrated_score(case: Any) -> None:
    rule, want, entry = case
    found = re.fullmatch(rf"(pc|linear)_l{NUMBER}_a{NUMBER}", rule)
    assert found, f"a score of no family that is known here: {rule}"
    decay, cap = float(found[2]), float(found[3])
    frequency = entry["freq"][entry["tokens"]]
    offset = torch.arange(frequency.shape[-1])
    if found[1] == "pc":
        got = scores.position_aware(entry["prob"], frequency, offset, decay, cap)
    else:
        got = scores.position_mixed(entry["prob"], frequency, offset, frequency.shape[-1], decay, cap)
    torch.testing.assert_close(got.flatten(), torch.tensor(want).flatten(), atol=1e-5, rtol=0)


@pytest.mark.cases("decoding", rules(is_gumbel))
def test_gumbel(case: Any) -> None:
    rule, want, entry = case
    got = propose.gumbel(entry["logits"], float(rule), entry["noise"])
    assert got.argmax(-1).tolist() == want["argmax"]
    assert str(got.dtype) == f"torch.{want['dtype']}"
    if f"out_{rule}" in entry:
        torch.testing.assert_close(got, entry[f"out_{rule}"], atol=1e-5, rtol=1e-9)


def cache_choices(root: Path) -> Iterator[tuple[str, Any]]:
    table, tensors = read(root)
    for entry in table.get("cache", []):
        yield entry["case"], {k: tensors.get(v, v) if isinstance(v, str) else v for k, v in entry.items()}


@pytest.mark.cases("decoding", cache_choices)
def test_cache_choice(case: Any) -> None:
    """Which columns Sparse-dLLM keeps, and which rows dLLM-Cache recomputes."""
    if case["case"].startswith("sparse_evict"):
        low, high = case["block_start"], case["block_start"] + case["block_len"]
        rest = torch.tensor([i for i in range(case["k"].shape[2]) if not low <= i < high])
        importance = sparse_dllm.importance(case["q_block"], case["k"][:, :, rest], case["kernel_size"])
        assert rest[sparse_dllm.keep(importance, case["keep_ratio"])[0]].tolist() == case["kept_set"]
    elif case["case"].startswith("dllm_cache_refresh_index"):
        got = dllm_cache.least_similar(case["old_v"], case["new_v"], case["transfer_ratio"])
        assert got.tolist() == case["expected"]
    else:
        raise AssertionError(f"a choice of no family that is known here: {case['case']}")
