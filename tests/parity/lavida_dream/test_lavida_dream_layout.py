"""Tiles, pooling, trimming and newlines, schedules, prompt pieces and rotary types, from numbers alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from lavida_reference import read_json, tensors
from torch import Tensor
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from probe.backbones import lavida_config as names
from probe.backbones.anyres import Geometry, Tiling
from probe.backbones.lavida import round_frequencies
from probe.backbones.layout import Clip, Layout, Plain, Tiled
from probe.backbones.prompt import to_ids
from probe.backbones.tiled_config import SIGLIP_SO400M, count_visual
from probe.decoding import schedule

COUNT_WORDS = {"one": 1, "two": 2, "three": 3, "four": 4}
NEWLINE = -1


def geometry(pool: str | None) -> Geometry:
    """The published tiles and canvases, pooled one way or another."""
    found = names.geometry({**names.VISION, "mm_spatial_pool_mode": pool or "bilinear"}, SIGLIP_SO400M)
    return found if pool else Geometry(found.tile, found.patch, found.pinpoints)


def layouts(root: Path) -> Iterator[tuple[str, Any]]:
    for row in read_json(root / "layout.json"):
        yield "{}x{}-{}".format(*row["size_wh"], row["pool_mode"]), row


def others(root: Path) -> Iterator[tuple[str, Any]]:
    for row in read_json(root / "layout_extra.json"):
        yield re.sub(r"\W+", "-", row["what"]), row


def tables(root: Path) -> Iterator[tuple[str, Any]]:
    for row in read_json(root / "schedules.json"):
        yield "{num_masked}-{steps}-{schedule}-{schedule_kwargs}".format(**row), row


def prompts(root: Path) -> Iterator[tuple[str, Any]]:
    for i, row in enumerate(read_json(root / "tokenizer_image_token.json")):
        yield f"{i}-bos{row['bos_token_id']}-{'adds' if row['tokenizer_adds_bos'] else 'bare'}", row


def rotaries(root: Path) -> Iterator[tuple[str, Any]]:
    for key in sorted(tensors(root / "rope_dtype.safetensors")):
        if key != "positions":
            yield key, (tensors(root / "rope_dtype.safetensors"), key)


def numbered(layout: Layout, patches: int) -> Tensor:
    """Tokens `(count,)` of features that are their view's number; `NEWLINE` at newlines."""
    views = torch.arange(layout.views).float()[:, None, None].expand(-1, patches, 1)
    exact = layout.tokens(views, torch.tensor([float(NEWLINE)]))[:, 0]
    tokens = exact.round()
    assert (exact - tokens).abs().max() < 1e-5  # a token of two views would be neither's number
    cells = layout.cells()
    assert torch.where(cells.newline, NEWLINE, cells.view.long()).tolist() == tokens.tolist()
    assert tokens.shape[0] == layout.count
    return tokens


@pytest.mark.cases("lavida_dream", layouts)
def test_layout(case: dict[str, Any]) -> None:
    shape = geometry(case["pool_mode"])
    tiling = Tiling(shape, *case["size_wh"])
    tokens = numbered(Tiled(tiling), shape.patches**2)
    newlines = (tokens == NEWLINE).nonzero().flatten().tolist()
    runs = [[int(view), len(list(run))] for view, run in groupby(tokens.tolist())]
    wanted = case["view_index_runs"]
    found = {
        "best_resolution_wh": list(tiling.canvas),
        "grid_wh": list(tiling.grid),
        "views": tiling.views,
        "pooled_side": shape.side,
        "base_tokens": shape.side**2,
        "unpadded_rows": tiling.shape[0],
        "unpadded_cols": tiling.shape[1],
        "newline_tokens": len(newlines),
        "first_newline_index": newlines[0],
        "total_visual_tokens": tiling.count,
    }
    assert {k: found[k] for k in found if k in case} == {k: case[k] for k in found if k in case}
    assert runs[: len(wanted)] == wanted
    assert count_visual([tuple(case["size_wh"])], shape) == case["total_visual_tokens"]


def described(what: str) -> list[Layout] | None:
    """The layouts of an input that a fixture describes in words; None for words that say nothing to us."""
    pictures = next((n for word, n in COUNT_WORDS.items() if re.search(rf"\b{word} images?\b", what)), 1)
    size = re.search(r"(\d+)x(\d+)", what)
    frames = re.search(r"(\d+) frames", what)
    if frames and (newlines := re.search(r"newline '(\w+)'", what)):
        return [Clip(geometry("bilinear"), int(frames[1]), newlines[1])]
    if "pad" in what and "stack" in what:
        return [Plain(geometry(None), 30, 20)] * pictures
    if "pad" in what and "list" in what:
        return [Plain(geometry("bilinear"), 30, 20, closed=True)] * pictures
    if "anyres" in what and size:
        off = "switched off" in what or "no-pool" in what
        return [Tiled(Tiling(geometry(None if off else "bilinear"), int(size[1]), int(size[2])))]
    return None


@pytest.mark.cases("lavida_dream", others)
def test_other_layouts(case: dict[str, Any]) -> None:
    found = described(case["what"])
    assert found is not None, f"nothing is known of {case['what']}"
    patches = geometry(None).patches ** 2
    assert [len(numbered(layout, patches)) for layout in found] == case["counts"]


@pytest.mark.cases("lavida_dream", tables)
def test_schedule(case: dict[str, Any]) -> None:
    more = case["schedule_kwargs"] or {}
    assert schedule.lavida(case["num_masked"], case["steps"], case["schedule"], **more) == case["transfer"]


@pytest.mark.cases("lavida_dream", prompts)
def test_prompt_pieces(case: dict[str, Any]) -> None:
    def encode(piece: str) -> list[int]:
        start = [case["bos_token_id"]] if case["tokenizer_adds_bos"] else []
        return start + [ord(c) for c in piece]

    assert to_ids(case["prompt"], encode, case["bos_token_id"]) == case["ids"]


@pytest.mark.cases("lavida_dream", rotaries)
def test_rotary_types(case: tuple[dict[str, Tensor], str], near: Any) -> None:
    """Frequencies and angles with float32 frequencies, and with those that a cast of the module rounds."""
    stored, key = case
    want, slowest = stored[key], stored["inv_freq_fp32"][-1].double()
    size = 2 * stored["inv_freq_fp32"].shape[0]
    config = Qwen2Config(
        hidden_size=size,
        num_attention_heads=1,
        head_dim=size,
        rope_parameters={"rope_type": "default", "rope_theta": float(round(float(slowest ** (-size / (size - 2)))))},
    )
    rotary = Qwen2RotaryEmbedding(config)
    if "after_module_cast" in key:
        round_frequencies(rotary, torch.bfloat16)
    kind = want.dtype if key.startswith(("cos", "sin")) else torch.float32
    cos, sin = rotary(torch.zeros(1, dtype=kind), stored["positions"][None])
    got = {"cos": cos[0], "sin": sin[0], "inv": rotary.inv_freq}[key[:3]]
    ulp = 2.0**-8 if key.startswith(("cos", "sin")) else 0.0  # bfloat16's, near 1
    near(got, want.to(got.dtype), 1e-6 if want.dtype == torch.float32 else ulp)
