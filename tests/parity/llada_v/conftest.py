"""Models of the `llada_v` fixtures, loaded once per session."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from probe.backbones import load
from probe.backbones.base import SpecialIds
from probe.backbones.llada_v import LladaV

PER_LAYER = ("attentions", "attn_in", "mlp_in", "attn_out", "mlp_out", "q_rot", "k_rot", "v")

Loader = Callable[..., LladaV]


def special_of(table: dict[str, Any]) -> SpecialIds:
    """The stand-in ids of a fixture, in the adapter's terms."""
    return SpecialIds(table["mask_id"], table["eos_id"], table["eot_id"], tuple(table["suppressed"]))


def find_special(folder: Path) -> SpecialIds:
    """The stand-in ids that a model's folder names, wherever it does; ids 0..4 where none are named."""
    for name, key in (("special_ids.json", None), ("cases.json", "special"), ("case.json", "special")):
        if (folder / name).is_file():
            table = json.loads((folder / name).read_text(encoding="utf-8"))
            table = table.get(key) if key else table
            if table:
                return special_of(table)
    return SpecialIds(0, 1, 2, (1, 3, 4))


@cache
def _load(folder: Path, attention: str, dtype: torch.dtype) -> LladaV:
    model = load(folder, attention=attention, dtype=dtype, special=find_special(folder))
    assert isinstance(model, LladaV)
    return model


@pytest.fixture(scope="session")
def model_at() -> Loader:
    """`model_at(folder, attention="eager", dtype=torch.float32)`: the model in a fixture's folder."""

    def load_once(folder: Path, attention: str = "eager", dtype: torch.dtype = torch.float32) -> LladaV:
        return _load(folder, attention, dtype)

    return load_once


@pytest.fixture(scope="session")
def near() -> Callable[..., None]:
    """`near(got, want, atol)`: equal shapes, and equal values to within `atol` and 1e-5 of the value."""

    def check(got: Tensor, want: Tensor, atol: float, rtol: float = 1e-5) -> None:
        torch.testing.assert_close(got, want, atol=atol, rtol=rtol, check_dtype=False)

    return check


def check_view(view: Tensor, want: dict[str, Any], near: Any) -> None:
    """One view `(3, side, side)` against its statistics, sampled pixels and hash."""
    raw = ((view * 0.5 + 0.5) * 255).round().to(torch.uint8)
    assert hashlib.sha256(raw.contiguous().numpy().tobytes()).hexdigest() == want["sha256_uint8_chw"]
    for sample in want.get("samples", []):
        near(view[:, sample["row"], sample["col"]], torch.tensor(sample["rgb"]), 1e-6)
    exact = view.double()
    got = {"mean": exact.mean(), "std": exact.std(), "min": exact.min(), "max": exact.max()}
    for name, value in got.items():
        if name in want:
            assert float(value) == pytest.approx(want[name], abs=1e-5 if name != "std" else 1e-4)
    if "channel_means" in want:
        near(exact.mean((1, 2)), torch.tensor(want["channel_means"]).double(), 1e-5)


@pytest.fixture(scope="session")
def check_views(near: Any) -> Any:
    def check(views: Tensor, wanted: list[dict[str, Any]]) -> None:
        assert views.shape[0] == len(wanted)
        for view, want in zip(views, wanted, strict=True):
            check_view(view, want, near)

    return check


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = heads.shape[-1] // 2
    turned = torch.cat([-heads[..., half:], heads[..., :half]], -1)
    return heads * cos[:, None] + turned * sin[:, None]


@torch.no_grad()
def observe_forward(model: LladaV, arguments: dict[str, Any], rows: int | None = None) -> dict[str, Tensor]:
    """One forward with hooks on the adapter's modules; attentions of the last `rows` queries only."""
    seen: dict[str, list[Tensor]] = {name: [] for name in (*PER_LAYER, "output")}
    handles = []

    def on_attention(module: Any, args: Any, kwargs: Any, out: Any) -> None:
        hidden = kwargs["hidden_states"]
        cos, sin = kwargs["position_embeddings"]
        shape = (*hidden.shape[:-1], -1, module.head_dim)
        seen["attn_in"].append(hidden)
        seen["attn_out"].append(out[0])
        seen["attentions"].append(out[1] if rows is None or out[1] is None else out[1][:, :, -rows:].clone())
        seen["v"].append(module.v_proj(hidden))
        seen["q_rot"].append(rotate(module.q_proj(hidden).view(shape).transpose(1, 2), cos, sin))
        seen["k_rot"].append(rotate(module.k_proj(hidden).view(shape).transpose(1, 2), cos, sin))

    def on_mlp(module: Any, args: Any, out: Any) -> None:
        seen["mlp_out"].append(out)

    for layer in model.layers:
        handles += [
            layer.attention.register_forward_hook(on_attention, with_kwargs=True),
            layer.pre_mlp_norm.register_forward_hook(lambda m, a, out: seen["mlp_in"].append(out)),
            layer.mlp.register_forward_hook(on_mlp),
            layer.layer.register_forward_hook(lambda m, a, out: seen["output"].append(out)),
        ]
    try:
        last = model.lm(**arguments).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    found = {name: torch.stack(seen[name]) for name in PER_LAYER if all(v is not None for v in seen[name])}
    prenorm = seen["output"].pop()
    hidden = torch.stack([arguments["inputs_embeds"], *seen["output"], last])
    return {**found, "prenorm": prenorm, "hidden_states": hidden, "logits": model.head(last)}


@pytest.fixture(scope="session")
def observe() -> Callable[..., dict[str, Tensor]]:
    """`observe(model, arguments, rows=None)`: everything the fixtures know about one forward."""
    return observe_forward
