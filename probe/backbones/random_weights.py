"""A backbone of the published shape whose weights are random: for timing and memory, where nothing is to be read.

The loading code is the one that reads the published folder; only the tensors come from a generator, straight onto
the device. So an 8-billion-parameter model costs no download, no disk and no copy in the computer's memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from probe.backbones import adapter_of, dimple_config, lavida_config, llada_v_config
from probe.backbones.base import Backbone
from probe.backbones.checkpoint import Checkpoint, Shape, Tensors
from probe.backbones.lavida import Lavida
from probe.backbones.llada_v import LladaV
from probe.backbones.tiny.dimple import dimple_shapes
from probe.backbones.tiny.files import write_json
from probe.backbones.tiny.tiled import published_shapes
from probe.errors import ProbeError
from probe.registry import nearest

SPREAD = 0.02
"""Standard deviation of the matrices, as of a fresh Llama."""
Config = dict[str, Any]


def _llada_v(config: Config) -> dict[str, Shape]:
    return published_shapes(LladaV, config)


def _lavida(config: Config) -> dict[str, Shape]:
    return published_shapes(Lavida, config)


SHAPES: Mapping[str, tuple[Config, Callable[[Config], dict[str, Shape]], str]] = {
    llada_v_config.PUBLISHED_NAME: (
        {**llada_v_config.PUBLISHED, "vocab_size": llada_v_config.PUBLISHED_TOKENS}, _llada_v, "num_hidden_layers"
    ),
    lavida_config.DREAM_NAME: (
        {**lavida_config.PUBLISHED_DREAM, "vocab_size": lavida_config.DREAM_TOKENS}, _lavida, "num_hidden_layers"
    ),
    lavida_config.LLADA_NAME: (
        lavida_config.PUBLISHED_LLADA | dict.fromkeys(("vocab_size", "embedding_size"), lavida_config.LLADA_TOKENS),
        _lavida,
        "n_layers",
    ),
    dimple_config.PUBLISHED_NAME: (dict(dimple_config.PUBLISHED), dimple_shapes, "num_hidden_layers"),
}  # fmt: skip
"""By published name: the config (its vocabulary cut to the tokenizer, as the loaders cut it), the tensors that it
asks for by published name, and the config's field for the number of layers."""


class RandomTensors(Tensors):
    """Tensors of given shapes, made when they are read. Norms (vectors called weight) scale by one, biases are zero."""

    def __init__(self, shapes: Mapping[str, Shape], device: torch.device, dtype: torch.dtype, seed: int) -> None:
        super().__init__({}, {})
        self._shapes, self._device, self._dtype = dict(shapes), device, dtype
        self._generator = torch.Generator(device).manual_seed(seed)

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Shapes by name."""
        return self._shapes

    def read(self, key: str, rows: int | None = None) -> Tensor:
        """A fresh tensor; the same name read twice gives other numbers."""
        shape = self._shapes[key] if rows is None else (rows, *self._shapes[key][1:])
        empty = torch.empty(shape, device=self._device, dtype=self._dtype)
        if len(shape) < 2:
            return empty.fill_(1.0 if key.endswith("weight") else 0.0)
        return empty.normal_(0, SPREAD, generator=self._generator)


@dataclass(frozen=True)
class RandomCheckpoint(Checkpoint):
    """A folder of small files beside which the weights are random."""

    shapes: Mapping[str, Shape] | None = None
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0

    @contextmanager
    def tensors(self, device: str = "cpu") -> Iterator[Tensors]:
        """The weights, which exist once they have been read."""
        yield RandomTensors(self.shapes or {}, torch.device(device), self.dtype, self.seed)

    @cached_property
    def fingerprint(self) -> str:
        """Which weights these are."""
        return f"random weights, seed {self.seed}"


def random_weights(
    name: str,
    *,
    layers: int | None = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "bfloat16",
    attention: str | None = None,
    seed: int = 0,
) -> Backbone:
    """The backbone of a published name with its published sizes and random weights.

    `layers` decoder layers instead of all. It has no tokenizer: prompts are embeddings. Raises `ProbeError` for a
    name whose shape is not known.
    """
    if name not in SHAPES:
        raise ProbeError(f"the shape of `{name}` is not known here; {nearest(name, list(SHAPES))}")
    published, shapes_of, field = SHAPES[name]
    if layers is not None and not 1 <= layers <= published[field]:
        raise ProbeError(f"{layers} layers of `{name}`; it has 1 to {published[field]}")
    config = published | ({} if layers is None else {field: layers})
    kind = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype), None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ProbeError(f"dtype={dtype!r}: the weights have no stored type to take instead; name one, like bfloat16")
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "config.json", config)
        checkpoint = RandomCheckpoint(Path(folder), name, None, shapes_of(config), kind, seed)
        load = cast(Any, adapter_of(checkpoint).function()).from_checkpoint
        return cast(Backbone, load(checkpoint, device=device, dtype=kind, attention=attention))
