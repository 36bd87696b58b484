"""Whole generations, pass by pass: the project's loop and policies on stub models against the originals' traces."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from decoding_stubs import Context, Saved, Sparse, Table, embed, prompt_of, tokens_of
from safetensors.torch import load_file
from torch import Tensor

from probe.canvas import make_canvas
from probe.decoding.caching import Crop, PrefixLM
from probe.decoding.confidence import Confidence, Llada
from probe.decoding.daedal import Daedal, DaedalLength
from probe.decoding.dimple import Dimple
from probe.decoding.draw import Draw, draws
from probe.decoding.dream import Dream, DreamBlocks, DreamQuota
from probe.decoding.dreamon import DreamOn, DreamOnLength
from probe.decoding.eos import EosFill
from probe.decoding.fast_cache import Dkv, FastDual, FastPrefix, SparseDllm
from probe.decoding.fast_dllm import Factor, Threshold
from probe.decoding.klass import Klass
from probe.decoding.lavida import LavidaLlada
from probe.decoding.pc_sampler import EntropyBound, PositionAware, WholeAnswer
from probe.decoding.policy import Caching, Length, Unmasking
from probe.decoding.prophet import Prophet
from probe.decoding.remdm import Remdm
from probe.decoding.rule import Rule
from probe.decoding.slowfast import SlowFast
from probe.decoding.wino import Wino
from probe.loop import Finished, denoise

LLADA_EOS, LLADA_EOT = 126081, 126348
LLADA_V_SUPPRESSED = (126081, 126080, 126346, 126347)


@dataclass
class Run:
    """What an original's settings mean here."""

    unmasking: Unmasking
    gen_length: int
    block_length: int | None = None
    steps: int = 1
    mask_id: int = 23
    caching: Caching = field(default_factory=Caching)
    length: Length = field(default_factory=Length)
    temperature: float = 0.0
    more: dict[str, Any] = field(default_factory=dict)

    def rule(self) -> Rule:
        return Rule(
            gen_length=self.gen_length,
            block_length=self.block_length or self.gen_length,
            steps=self.steps,
            mask_id=self.mask_id,
            temperature=self.temperature,
            unmasking=self.unmasking,
            caching=self.caching,
            length=self.length,
            **self.more,
        )


Params = dict[str, Any]


def sizes(p: Params) -> dict[str, Any]:
    """The settings that most originals spell alike."""
    return {
        "gen_length": p.get("gen_length") or p.get("max_new_tokens"),
        "block_length": p.get("block_length"),
        "steps": p.get("steps", 1),
        "mask_id": p.get("mask_id", p.get("mask_token_id")),
        "temperature": p.get("temperature") or 0.0,
    }


def llada(p: Params, entry: Params) -> Run:
    last = (LLADA_EOS, LLADA_EOT) if p.get("confidence_eos_eot_inf") else ()
    more = {
        "remasking": p.get("remasking", "low_confidence"),
        "suppressed": (LLADA_EOS,) if p.get("logits_eos_inf") else (),
        "cfg_scale": p.get("cfg_scale", 0.0),
    }
    return Run(Llada(last=last), **sizes(p), more=more)


def chosen(p: Params) -> Unmasking:
    """Fast-dLLM's choice: threshold, factor or LLaDA's fixed numbers."""
    if p.get("threshold") is not None:
        return Threshold(tau=p["threshold"])
    if p.get("factor") is not None:
        return Factor(f=p["factor"])
    return Confidence()


def fast(p: Params, entry: Params) -> Run:
    caching = {"none": Caching, "prefix": FastPrefix, "dual": FastDual}[p["cache"]]()
    run = Run(chosen(p), **sizes(p), caching=caching)
    if p.get("early_termination"):
        run.length = EosFill()
        run.more = {"eos": p["eos_id"]}
    return run


def lavida_llada(p: Params, entry: Params) -> Run:
    by = {"low_confidence": "confidence", "margin": "margin", "entrophy": "entropy", "random": "random"}
    settings = {
        "score_by": by[p["remasking"]],
        "schedule": p["schedule"],
        "step_ratio": p.get("step_ratio"),
        "step_per_block": p.get("step_per_block"),
        **(p["schedule_kwargs"] or {}),
    }
    return Run(LavidaLlada(**settings), **sizes(p), caching=PrefixLM() if p["prefix_lm"] else Caching())


def lladav(p: Params, entry: Params) -> Run:
    """The sets' stand-in tokenizer turns a stop string into these ids."""
    strings = {"<|eot_id|>": (LLADA_EOT,), "\n": (198,), "AB": (11, 12)}
    more = {
        "suppressed": LLADA_V_SUPPRESSED,
        "stop": tuple(strings[s] for s in p.get("stopping") or ()),
        "suffix": tuple(p.get("suffix_ids", ())),
    }
    if entry["source_key"] == "lladav_hook":
        rule = Confidence() if p["threshold"] is None else Factor(f=p["threshold"])
        return Run(rule, **sizes(p), more=more, caching=FastPrefix(refresh=p["prefix_refresh_interval"]))
    return Run(Confidence(), **sizes(p), more=more)


def dkv(p: Params, entry: Params) -> Run:
    return Run(Confidence(), **sizes(p), caching=Dkv(refresh=p["cache_reloading_step"]))


def sparse(p: Params, entry: Params) -> Run:
    return Run(Confidence(), **sizes(p), caching=SparseDllm())


def tempered(p: Params) -> dict[str, Any]:
    """The settings of Dream's kind that differ from their defaults."""
    names = {"alg": "algorithm", "eps": "eps", "top_p": "top_p", "top_k": "top_k", "alg_temp": "alg_temp"}
    return {mine: p[name] for name, mine in names.items() if name in p}


def fdream(p: Params, entry: Params) -> Run:
    if p["alg"] == "confidence_threshold":
        return Run(DreamQuota(tau=p["threshold"]), **sizes(p))
    return Run(Dream(**tempered(p)), **sizes(p))


def fdream_block(p: Params, entry: Params) -> Run:
    caching = {"prefix": FastPrefix, "dual": FastDual}[p["cache"]](boundary="commit")
    if p["alg"] == "confidence_threshold":
        return Run(DreamBlocks(algorithm="maskgit_plus", tau=p["threshold"]), **sizes(p), caching=caching)
    return Run(DreamBlocks(tau=None, **tempered(p)), **sizes(p), caching=caching)


def lavida_dream(p: Params, entry: Params) -> Run:
    settings = {"schedule": p["schedule"], "step_ratio": p.get("step_ratio"), **(p.get("schedule_kwargs") or {})}
    return Run(Dream(**tempered(p), **settings), **sizes(p), caching=PrefixLM() if p["prefix_lm"] else Caching())


def dimple(p: Params, entry: Params) -> Run:
    settings = {
        "pipeline": p["decoding_pipeline"],
        "algorithm": p["alg"],
        "threshold": p["alg_p_threshold"],
        "original_confidence": p.get("use_original_confidence", True),
        "top_p": p.get("top_p"),
        "top_k": p.get("top_k"),
    }
    caching = Crop() if p.get("use_cache") else Caching()
    return Run(Dimple(**settings, **{k: p[k] for k in ("eps", "alg_temp") if k in p}), **sizes(p), caching=caching)


def prophet(p: Params, entry: Params) -> Run:
    """Constraints are answer offsets whose tokens stand from the start."""
    settings = {**p["thresholds"], "answer_length": p["answer_length"]}
    start = p["answer_start_pos"] - len(entry["prompt"][0])
    prior = tuple((int(slot), token) for slot, token in (p.get("constraints") or {}).items())
    return Run(Prophet(answer_start=start, **settings), **sizes(p), more={"prior": prior})


def pc(p: Params, entry: Params) -> Run:
    if p["score"] in ("pc", "linear"):
        mix = {"pc": "product", "linear": "linear"}[p["score"]]
        frequency = dict(enumerate(entry["tensors"]["pc/freq"].tolist()))
        return Run(PositionAware(mix=mix, decay=p["lambd"], cap=p["alpha"], frequency=frequency), **sizes(p))
    if p["score"] in ("entropy", "margin"):
        return Run(WholeAnswer(score_by=p["score"]), **sizes(p))
    if p["score"] == "eb":
        return Run(EntropyBound(gamma=p["gamma"]), **sizes(p))
    assert p["score"] == "remdm", p["score"]
    settings = {"init_ratio": p["init_unmask_ratio"], "per_pass": p["unmask_k"], "loops": p["loop_steps"]}
    return Run(Remdm(**settings), **sizes(p))


def klass(p: Params, entry: Params) -> Run:
    settings = {"confidence": p["conf_threshold"], "divergence": p["kl_threshold"], "history": p["kl_history_length"]}
    return Run(Klass(**settings), **sizes(p))


def slowfast(p: Params, entry: Params) -> Run:
    settings = {
        "explore": p["k_exploration_steps"],
        "reach_confidence": p["cycle_len_confidence_threshold"],
        "stability": p["cycle_length_stability_window"],
        "deviation": p["cycle_length_stability_std_dev_threshold"],
        "tau": p["high_confidence_threshold"],
    }
    return Run(SlowFast(**settings), **sizes(p))


def wino(p: Params, entry: Params) -> Run:
    return Run(Wino(accept=p["threshold"], confirm=p["threshold_back"]), **sizes(p))


def daedal(p: Params, entry: Params) -> Run:
    length = DaedalLength(
        max_length=p["max_gen_length"],
        factor=p["expansion_factor"],
        tail=p["eos_check_tokens"],
        enough=p["eos_confidence_threshold"],
        enough_later=p["expand_eos_confidence_threshold"],
        low=p["low_conf_threshold"],
    )
    settings = {**sizes(p), "gen_length": p["initial_gen_length"]}
    return Run(Daedal(tau=p["high_conf_threshold"]), **settings, length=length, more={"eos": p["eos_id"]})


def dreamon(p: Params, entry: Params) -> Run:
    length = DreamOnLength(
        expand=p["expand_id"],
        max_length=p["max_gen_len"],
        delete_eos=p["delete_eos_token"],
        eos_to_right=p["pad_eos_to_right"],
    )
    settings = {**sizes(p), "gen_length": p["min_gen_len"]}
    decoder = DreamOn(per_pass=p["number_transfer_tokens"], **tempered(p))
    return Run(decoder, **settings, length=length, more={"eos": p["eos_id"], "suffix": tuple(p["suffix"])})


RUNS: dict[str, Callable[[Params, Params], Run]] = {
    "llada": llada,
    "fast": fast,
    "fast_old": fast,
    "lavida_llada": lavida_llada,
    "lladav": lladav,
    "lladav_hook": lladav,
    "fdream": fdream,
    "fdream_block": fdream_block,
    "lavida_dream": lavida_dream,
    "dimple": dimple,
    "prophet": prophet,
    "pc": pc,
    "klass": klass,
    "slowfast": slowfast,
    "wino": wino,
    "daedal": daedal,
    "dreamon": dreamon,
    "dkv": dkv,
    "sparse": sparse,
}


def traces(root: Path) -> Iterator[tuple[str, Any]]:
    if (root / "traces.json").is_file():
        tensors = load_file(root / "traces.safetensors")
        for entry in json.loads((root / "traces.json").read_text(encoding="utf-8")):
            yield entry["case"], (entry, tensors)


def stub_of(entry: Params, tensors: dict[str, Tensor]) -> Table:
    p, group = entry["params"], entry["case"].partition("/")[0]
    table = {name: tensors[f"{group}/{name}"] for name in entry["tables"]}
    kind = p.get("stub", "table")
    if kind == "context":
        stub: Table = Context(table["TA"], left=table["TBl"], right=table["TBr"], own=table["TCc"])
    elif kind == "sparse":
        stub = Sparse(table["ids"], values=table["vals"], background=p["background"], vocabulary=p["vocab"])
    elif kind == "table":
        stub = Table(table["T"], prefill=table.get("Tprefill"))
    else:
        raise AssertionError(f"a stub of no kind that is known here: {kind}")
    stub.shift = int(p.get("shifted", False))
    stub.mask_id = p.get("mask_id", p.get("mask_token_id"))
    return stub


def prompts_of(entry: Params) -> list[list[int]]:
    """Embedding prompts have no ids: LaViDa's slots are shown as token 1, LLaDA-V's slot i as -1 - i."""
    if "prompt" in entry:
        return entry["prompt"]
    p = entry["params"]
    if "prefix" in p:
        return [p["prefix"]]
    return [[1] * p["prompt_len"]] if "prompt_len" in p else [[-1 - i for i in range(p["P_len"])]]


def commits_between(inputs: list[list[list[int]]]) -> list[list[list[int]]]:
    """`[sample, slot, old, new]` of everything that differs between one input and the next."""
    return [
        [
            [b, i, old, new]
            for b, (was, now) in enumerate(zip(before, after, strict=True))
            for i, (old, new) in enumerate(zip(was, now, strict=True))
            if old != new
        ]
        for before, after in pairwise(inputs)
    ]


@torch.inference_mode()
def play(entry: Params, tensors: dict[str, Tensor]) -> tuple[Table, Finished]:
    stub, prompts = stub_of(entry, tensors), prompts_of(entry)
    rule = RUNS[entry["source_key"]](entry["params"], {**entry, "tensors": tensors}).rule()
    saved = {name: tensors[key] for name, key in (entry.get("extra_tensors") or {}).items()}
    noise: list[Draw] = [Saved(b, saved) for b in range(len(prompts))] if saved else draws(0, range(len(prompts)))
    suffix = embed(torch.tensor(rule.suffix)) if rule.suffix else None
    canvas = make_canvas([prompt_of(p) for p in prompts], embed(torch.tensor(rule.mask_id)), rule.gen_length, suffix)
    *_, finished = denoise(canvas, stub, rule, embed, noise)
    assert isinstance(finished, Finished)
    return stub, finished


@pytest.mark.cases("decoding", traces)
def test_trace(case: Any) -> None:
    entry, tensors = case
    want = entry["expected"]
    stub, finished = play(entry, tensors)
    final = tokens_of(finished.canvas)
    if "older" in entry["params"].get("note", ""):
        assert final == want["final"]  # that file runs one pass too many where a refresh finishes a block
        return
    assert len(stub.rows) == want["n_calls"]
    for got, told in zip(stub.rows, want.get("calls", []), strict="calls" in want):
        if "rows" in told:
            assert got == told["rows"]
        else:
            assert got == [list(range(told["lo"], told["hi"]))] * len(got)
    if "commits" in want:
        assert commits_between([*stub.inputs, final]) == want["commits"]
        assert final == want["final"]
    if "returned" in want:
        assert finished.output == want["returned"]
        end = len(finished.output[0]) - len(entry["params"].get("suffix_ids", ())) + entry["params"]["P_len"]
        got_commits = [[c for c in step if c[1] < end] for step in commits_between(stub.inputs)]
        assert got_commits == want["commits_between_calls"]
    for got, told in zip(stub.unconditional, [want.get("uncond_first_call")], strict=False):
        assert got == told
    if "inputs" in want:
        # what the original keeps beyond the visible window is masks
        fed = [
            [r + [stub.mask_id] * (len(t) - len(r)) for r, t in zip(*both, strict=True)]
            for both in zip(stub.inputs, want["inputs"], strict=True)
        ]
        assert fed == want["inputs"]
    if "windows" in want:
        assert [len(fed[0]) for fed in stub.inputs] == want["windows"]
    if "generated_length" in want:
        assert len(finished.output[0]) - len(entry["params"]["suffix"]) == want["generated_length"]
    if "inputs" in want:
        assert final == want["final"]
