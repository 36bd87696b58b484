"""The language model against the original's logits, hidden states, attentions and layer internals."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from probe.backbones.llada_v import LladaV

TOLERANCE = {"attentions": 1e-5}
BF16 = 2.0
"""Both sides round every intermediate to 8 bits, in different orders, so they may be as far from each other as twice
the distance of the original's bfloat16 logits from its own float32 logits."""


def models(root: Path) -> Iterator[Path]:
    yield from sorted(p / "lm" for p in root.glob("lm_*") if (p / "lm" / "config.json").is_file())


def quantities(root: Path) -> Iterator[tuple[str, Any]]:
    """Every expected tensor of every model: `(folder, run, quantity)`."""
    for folder in models(root):
        for key in sorted(load_file(folder / "expected.safetensors")):
            run, quantity = key.split(".", 1)
            yield f"{folder.parent.name}-{key}", (folder, run, quantity)


def plain_logits(root: Path) -> Iterator[tuple[str, Any]]:
    for name, (folder, run, quantity) in quantities(root):
        if quantity == "logits":
            yield name, (folder, run)


@cache
def inputs(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "inputs.safetensors")


@cache
def expected(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "expected.safetensors")


def call(model: LladaV, folder: Path, run: str, renumber: bool = False) -> dict[str, Any]:
    """Keyword arguments of the language model for one run."""
    given = {k.split(".", 1)[1]: v for k, v in inputs(folder).items() if k.startswith(f"{run}.")}
    position = given.get("position_ids")
    if "inputs_embeds_full" in given:
        keep = given["keep"]
        embeds = given["inputs_embeds_full"][:, keep]
        position = keep.expand(embeds.shape[0], -1)
    else:
        embeds = given["inputs_embeds"] if "inputs_embeds" in given else model.embed(given["input_ids"])
    mask = given["attention_mask_4d"].bool() if "attention_mask_4d" in given else given.get("attention_mask")
    return {
        "inputs_embeds": embeds.to(model.dtype),
        "attention_mask": mask,
        "position_ids": None if renumber else position,
    }


@pytest.fixture(scope="module")
def observed(observe: Any) -> Any:
    """What hooks see in one run, computed once: `observed(model, folder, run, renumber=False)`."""

    @cache
    def once(model: LladaV, folder: Path, run: str, renumber: bool = False) -> dict[str, Tensor]:
        return observe(model, call(model, folder, run, renumber))

    return once


@pytest.mark.cases("llada_v", quantities)
def test_language_model(case: Any, model_at: Any, observed: Any, near: Any) -> None:
    folder, run, quantity = case
    want = expected(folder)[f"{run}.{quantity}"]
    if quantity == "logits_bf16":
        source = next(k.split(".")[0] for k in inputs(folder) if k.endswith(".input_ids"))
        model = model_at(folder, "eager", torch.bfloat16)
        got = observed(model, folder, source)["logits"]
        exact = expected(folder).get(f"{source}.logits", got)
        assert (got - want.float()).norm() <= BF16 * (exact - want.float()).norm()
        return
    base, _, variant = quantity.rpartition("_") if quantity.startswith("logits_") else (quantity, "", "")
    attention = "sdpa" if variant == "sdpa" else "eager"
    got = observed(model_at(folder, attention), folder, run, variant == "renumbered")
    assert base in got and variant in ("", "sdpa", "renumbered"), f"nothing is known of the quantity {quantity}"
    near(got[base], want, TOLERANCE.get(base, 5e-4))


@pytest.mark.cases("llada_v", plain_logits)
@pytest.mark.parametrize("attention", ["sdpa", "probe", "probe_eager"])
def test_attention_implementations_agree(case: Any, attention: str, model_at: Any, observed: Any, near: Any) -> None:
    folder, run = case
    pytest.importorskip("probe.attend")
    got = observed(model_at(folder, attention), folder, run)
    near(got["logits"], expected(folder)[f"{run}.logits"], 5e-4)
