"""Devices that are not there: tensors that say they are on one, and operations that refuse to mix two.

Everything is computed on the CPU, so what comes out is comparable to the last bit. As on real devices, only copies
cross over, scalars mix with everything, and an index may lie on the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

KIND = "pretended"
"""The name that torch's spare kind of device gets, for the whole process."""
_setup_privateuseone_for_python_backend(KIND)
aten = torch.ops.aten
CROSSING = {aten.copy_.default, aten._copy_from.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}


class Placed(torch.Tensor):
    """A CPU tensor that says it is elsewhere."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device) -> Any:
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=device,
        )  # fmt: skip

    def __init__(self, inner: torch.Tensor, device: torch.device) -> None:
        self.inner = inner

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Placed({self.inner}, {self.device})"

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class PretendedDevices(TorchDispatchMode):
    """While it is active, `pretended:0`, `pretended:1`, ... can be used like any device."""

    def __enter__(self) -> Any:
        self.lifting = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(..., device=...)` comes by here
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(self.lifting)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    given = kwargs.get("device")
    there = None if given is None else torch.device(given)
    if there is None:
        there = _where(func, args, tensors)
    if given is not None:
        kwargs = {**kwargs, "device": torch.device("cpu") if there.type == KIND else there}
    origin = {id(x.inner): x for x in tensors if isinstance(x, Placed)}
    out = func(*tree_map(_bare, args), **tree_map(_bare, kwargs))

    def wrapped(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or isinstance(x, Placed) or x.device.type == "meta":
            return x
        if id(x) in origin:
            return origin[id(x)]
        return Placed(x, there) if there.type == KIND else x

    return tree_map(wrapped, out)


def _bare(x: Any) -> Any:
    return x.inner if isinstance(x, Placed) else x


def _where(func: Any, args: Any, tensors: list[torch.Tensor]) -> torch.device:
    if not tensors:
        return torch.device("cpu")
    if func in CROSSING:
        return args[0].device
    strict = [x for x in tensors if x.dim() and not (func in INDEXING and x.device.type == "cpu")]
    devices = {x.device for x in strict}
    if len(devices) > 1:
        raise RuntimeError(f"{func}: tensors on {', '.join(sorted(map(str, devices)))}")
    if devices:
        return devices.pop()
    return next((x.device for x in tensors if x.device.type == KIND), tensors[0].device)
