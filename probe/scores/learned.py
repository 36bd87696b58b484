"""A trained router that says whether the picture is still needed: DyVTE."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import gelu, linear

from probe.errors import ProbeError
from probe.registry import scores

NAMES = ("0.weight", "0.bias", "2.weight", "2.bias")
"""Tensors of one router: two linear layers with a GELU between them, as an `nn.Sequential` saves them."""


def _flops(given: Mapping[str, Any]) -> int:
    width = 2 * given["text_hidden"].shape[1]
    hidden = router(given["file"], given["layer_index"], width)[0].shape[0]
    return int(2 * hidden * (width + 2))


@scores.register(flops=_flops)
def learned(n: int, text_hidden: Tensor, layer_index: int, *, file: str) -> Tensor:
    """One number for all visual tokens: how much the router wants to keep them, `logit_0 - logit_1`. `(n,)` float32.

    DyVTE (Wu et al., 2024, arXiv 2411.19628): in every layer an MLP (2d -> hidden -> 2, GELU) reads the mean hidden
    state of the text behind the picture and its last one; the first layer with `logit_1 > logit_0` withdraws the
    visual tokens for good. With `select: {threshold: {value: 0.0, inclusive: true}}`, at every layer, that is this
    score.

    `file` is a safetensors file with the routers' weights, `{layer}.0.weight (h, 2d)`, `{layer}.0.bias (h,)`,
    `{layer}.2.weight (2, h)`, `{layer}.2.bias (2,)`. No weights come with the project, and the names that the original
    saves are not established. Raises `ProbeError` where something is missing or has another shape.
    """
    if text_hidden.shape[0] == 0:
        raise ProbeError("the router of `learned` reads the text behind the picture, but there is none")
    seen = torch.cat([text_hidden.float().mean(0), text_hidden[-1].float()])
    w1, b1, w2, b2 = (t.to(seen.device) for t in router(file, layer_index, seen.shape[0]))
    logit = linear(gelu(linear(seen, w1, b1)), w2, b2)
    return (logit[0] - logit[1]).expand(n)


def router(file: str, layer: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The weights of one layer's router, float32, checked to read `width` numbers and give two logits."""
    stored = _load(str(Path(file).expanduser()))
    names = [f"{layer}.{name}" for name in NAMES]
    if missing := [name for name in names if name not in stored]:
        raise ProbeError(f"{file}: no tensor `{missing[0]}`; a router of layer {layer} needs {', '.join(names)}")
    w1, b1, w2, b2 = (stored[name].float() for name in names)
    hidden = w1.shape[0]
    wanted = ((hidden, width), (hidden,), (2, hidden), (2,))
    for name, tensor, shape in zip(names, (w1, b1, w2, b2), wanted, strict=True):
        if tuple(tensor.shape) != shape:
            raise ProbeError(f"{file}: `{name}` has the shape {tuple(tensor.shape)}, but {shape} would fit this model")
    return w1, b1, w2, b2


@lru_cache(maxsize=4)
def _load(path: str) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ProbeError(f"{path}: no safetensors file that can be read ({error})") from None
