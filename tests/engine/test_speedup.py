"""What is skipped is saved: time against executed FLOPs, with 1,024 visual tokens and 8 layers of width 512.

`python tests/engine/test_speedup.py` prints the table of docs/decoding.md. Ways of decoding take turns on one thread,
and the time is the processor's, so that what else the machine does disturbs little.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from probe import vocabulary as _registered  # noqa: F401
from probe.backbones.base import Prompt
from probe.compile import ProbeTable
from probe.decoding.caching import Caching, NoCache, PrefixLM
from probe.decoding.confidence import Confidence
from probe.decoding.fast_cache import FastPrefix
from probe.decoding.fast_dllm import Threshold
from probe.decoding.policy import Unmasking
from probe.generate import generate
from probe.loop import Rule
from probe.site import Role

VISUAL, QUESTION, SLOTS, BLOCK, TAU = 1024, 40, 256, 64, 0.026
WAYS: dict[str, tuple[Unmasking, Caching]] = {
    "plain loop": (Confidence(), NoCache()),
    "prefix cache (LaViDa)": (Confidence(), PrefixLM()),
    "prefix cache (Fast-dLLM)": (Confidence(), FastPrefix()),
    "threshold": (Threshold(tau=TAU), NoCache()),
    "threshold, prefix cache (Fast-dLLM)": (Threshold(tau=TAU), FastPrefix()),
}


def medium(folder: Path) -> Any:
    """The LLaDA-V class with random weights."""
    from transformers import SiglipVisionModel

    from probe.backbones import load
    from probe.zoo.export import export
    from probe.zoo.model import Miniature, language_config
    from probe.zoo.tokenizer import BOS, EOS, EOT, MASK, build, vocabulary
    from probe.zoo.tower import config as tower_config

    build(folder)
    words = vocabulary()
    torch.manual_seed(0)
    vision, config = tower_config(32, 2), language_config(len(words), hidden=512, layers=8, heads=8, mlp=1408)
    special = {"mask": words.index(MASK), "bos": words.index(BOS), "eos": words.index(EOS), "eot": words.index(EOT)}
    model, tower = Miniature(config, 32), SiglipVisionModel(vision)
    export(folder, model.state_dict(), tower.state_dict(), config, vision, special, folder)
    return load(folder)


def prompt_of(model: Any) -> Prompt:
    """Random visual tokens before a random question."""
    torch.manual_seed(1)
    n = VISUAL + QUESTION
    role = torch.full((n,), int(Role.QUESTION), dtype=torch.int8)
    role[:VISUAL] = int(Role.VISUAL)
    visual = torch.full((n,), -1)
    visual[:VISUAL] = torch.arange(VISUAL)
    none = torch.zeros(VISUAL, dtype=torch.int16)
    embeds = torch.randn(n, model.facts.width) * 0.02
    return Prompt(embeds, torch.full((n,), -1), role, visual, torch.zeros(VISUAL, 4), none, none)


def measure(turns: int) -> dict[str, dict[str, float]]:
    """Median seconds and FLOPs of every way, and passes."""
    with tempfile.TemporaryDirectory() as name:
        model = medium(Path(name))
    prompt, seconds, out = prompt_of(model), {way: [] for way in WAYS}, {}
    for turn in range(turns + 1):
        for way, (unmasking, caching) in WAYS.items():
            rule = Rule(
                gen_length=SLOTS,
                block_length=BLOCK,
                steps=16,
                mask_id=model.special.mask,
                suppressed=(model.special.mask,),
                unmasking=unmasking,
                caching=caching,
            )
            start = time.process_time()
            (result,) = generate(model, [prompt], rule, ProbeTable(()))
            if turn:  # the first turn pays for what libraries do once
                seconds[way].append(time.process_time() - start)
            flops = float(result.arrays["flops"].sum())
            out[way] = {"flops": flops, "passes": float(len(result.arrays["nominal_step"]))}
    for way, row in out.items():
        row["seconds"] = float(torch.tensor(seconds[way]).median())
        row["predicted"] = out["plain loop"]["flops"] / row["flops"]
    for row in out.values():
        row["measured"] = out["plain loop"]["seconds"] / row["seconds"]
    return out


@pytest.mark.slow
def test_what_is_skipped_is_saved() -> None:
    torch.set_num_threads(1)
    for way, row in measure(3).items():
        assert row["measured"] == pytest.approx(row["predicted"], rel=0.1), way


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"{'':36} passes   GFLOP  seconds  predicted  measured")
    for way, row in measure(int(sys.argv[1]) if sys.argv[1:] else 3).items():
        told = f"{row['passes']:6.0f} {row['flops'] / 1e9:7.1f} {row['seconds']:8.3f}"
        print(f"{way:36} {told} {row['predicted']:9.2f}x {row['measured']:8.2f}x")
