"""A checkpoint's tensors into a module that was built on no device: none missing, none left over."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from probe.backbones.checkpoint import Shape, Tensors, check_names


def take(
    model: nn.Module,
    weights: Tensors,
    published: Mapping[str, str],
    dtype: torch.dtype,
    where: object,
    rows: Mapping[str, int] | None = None,
) -> None:
    """Assign every parameter and buffer of `model` from the tensor of its published name, in `dtype`.

    `published` names the tensor of each of the model's own names. `rows` gives, by own name, how many rows a stored
    tensor has where the model keeps only the first of them (a vocabulary that is cut). Raises `ProbeError` naming
    what is missing, unexpected or of another shape.
    """
    own, stored = model.state_dict(), rows or {}
    expected: dict[str, Shape] = {}
    for name, key in published.items():
        shape = tuple(own[name].shape)
        expected[key] = (stored.get(name, shape[0]), *shape[1:]) if shape else shape
    check_names(expected, weights.shapes, where)
    values = {
        name: weights.read(key, own[name].shape[0] if name in stored else None).to(dtype)
        for name, key in published.items()
    }
    model.load_state_dict(values, assign=True)
    model.eval().requires_grad_(False)
