"""A checkpoint's tensors into a module that was built on no device: none missing, none left over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from probe.backbones.base import Backbone
from probe.backbones.checkpoint import Shape, Tensors, check_names
from probe.backbones.placement import STORES, dispatch, on_disk, place
from probe.errors import ProbeError


@dataclass(frozen=True)
class Spread:
    """How a model is spread over devices (`placement.place`)."""

    device_map: object
    max_memory: Mapping[int | str, int | str] | None = None


def take(
    model: nn.Module,
    weights: Tensors,
    published: Mapping[str, str],
    dtype: torch.dtype,
    where: object,
    rows: Mapping[str, int] | None = None,
    spread: Spread | None = None,
) -> Callable[[], None]:
    """Assign every parameter and buffer of `model` from the tensor of its published name, in `dtype`.

    `published` names the tensor of each of the model's own names. `rows` gives, by own name, how many rows a stored
    tensor has where the model keeps only the first of them (a vocabulary that is cut). `spread` is how the model is
    spread over devices; else everything is where the weights were opened. Raises `ProbeError` naming what is missing,
    unexpected or of another shape.

    Returns what is to be called once buffers that no checkpoint holds have been filled, on the model's device.
    """
    own, stored = model.state_dict(), rows or {}
    expected: dict[str, Shape] = {}
    for name, key in published.items():
        shape = tuple(own[name].shape)
        expected[key] = (stored.get(name, shape[0]), *shape[1:]) if shape else shape
    check_names(expected, weights.shapes, where)

    def read(name: str) -> Tensor:
        return weights.read(published[name], own[name].shape[0] if name in stored else None).to(dtype)

    if spread is None or not isinstance(model, Backbone):
        model.load_state_dict({name: read(name) for name in published}, assign=True)
        model.eval().requires_grad_(False)
        return lambda: None
    placement = place(model, model.lm, model.source, spread.device_map, dtype, spread.max_memory)
    buffers = dict(model.named_buffers())  # small, and read without a fetch
    away = {name: key for name, key in published.items() if name not in buffers}
    index = on_disk(away, weights, dtype, placement, stored)
    home = str(placement.home)
    if waits := [n for n in model.used_directly() if placement.of(n) in STORES and placement.of(n) != home]:
        raise ProbeError(f"`device_map` leaves {waits[0]} on {placement.of(waits[0])}; it must be on {home}")
    places = {n: placement.computes(n) if n in buffers else placement.of(n) for n in published if n not in index}
    values = {name: read(name).to(there) for name, there in places.items()}
    model.load_state_dict(values, assign=True, strict=False)
    model.eval().requires_grad_(False)
    model.home = placement.home
    return lambda: dispatch(model, placement, index)
