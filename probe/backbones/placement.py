"""A model's modules spread over devices: where each of them lives, and where it computes.

`accelerate` works out automatic maps, and puts the hooks on modules that move their inputs and fetch weights from a
CPU or from disk. Weights on disk are read from the checkpoint's own safetensors, each time they are needed.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from probe.backbones.checkpoint import Tensors
from probe.errors import ProbeError

AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")
"""Maps that accelerate works out: over all devices evenly (`auto`, `balanced`), sparing the first, or one by one."""
DISK = "disk"
STORES = ("cpu", DISK)
"""Places where weights wait while an accelerator computes."""


@dataclass(frozen=True)
class Placement:
    """`places`: a module's or a tensor's name to a device or `disk`; what is not on an accelerator computes at `home`.

    `home` is where a sequence is looked after: its embeddings, its layout, what probes record and decide.
    """

    places: Mapping[str, str]
    home: torch.device

    def of(self, name: str) -> str:
        """The place of a module or a tensor: that of the longest name which it begins with. KeyError: none."""
        parts = name.split(".")
        keys = (".".join(parts[:n]) for n in range(len(parts), -1, -1))
        return next(self.places[key] for key in keys if key in self.places)

    def computes(self, name: str) -> torch.device:
        """Where a module computes."""
        place = self.of(name)
        return self.home if place == DISK or (place == "cpu" and self.home.type != "cpu") else torch.device(place)


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: its hook's device, if it has been dispatched, else its weights'."""
    hook = module.__dict__.get("_hf_hook")
    for one in getattr(hook, "hooks", (hook,)):
        device = getattr(one, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(module.parameters()).device


def likely_device(device: str | torch.device, device_map: object) -> torch.device:
    """The kind of device that a model will compute on, before anything is placed."""
    if device_map is None:
        return torch.device(device)
    if isinstance(device_map, Mapping):
        used = [_name(v) for v in device_map.values() if _name(v) not in STORES]
        return torch.device(used[0] if used else "cpu")
    if device_map in AUTOMATIC:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return torch.device("cpu" if device_map == DISK else _name(device_map))


def place(
    root: nn.Module,
    decoder: nn.Module,
    source: str,
    device_map: object,
    dtype: torch.dtype,
    max_memory: Mapping[int | str, int | str] | None = None,
) -> Placement:
    """Where everything in a model goes that was built on no device; `decoder` is its stack of layers.

    `device_map` is one of `AUTOMATIC`, one device, or names of modules to devices, `cpu` or `disk`; `max_memory` is
    what an automatic map may use of each device, as accelerate takes it. Raises `ProbeError` where a name fits nothing,
    a tensor has no place, or encoder and projector are not on one device.
    """
    _accelerate()
    others = beside(root, decoder)
    if isinstance(device_map, Mapping):
        places = {str(k): _name(v) for k, v in device_map.items()}
    elif device_map in AUTOMATIC:
        places = _worked_out(root, decoder, others, str(device_map), dtype, max_memory)
    else:
        places = {"": _name(device_map)}
    names = {name for name, _ in (*root.named_modules(), *root.named_parameters(), *root.named_buffers())}
    if unknown := [k for k in places if k not in names]:
        known = ", ".join(name for name, _ in root.named_children())
        raise ProbeError(f"`device_map` names {unknown[0]!r}, which {source} does not have; its modules begin: {known}")
    homeless = [name for name in root.state_dict() if not any(_inside(name, k) for k in places)]
    if homeless:
        raise ProbeError(f"`device_map` has no place for {homeless[0]} and {len(homeless) - 1} more of {source}")
    used = [v for v in places.values() if v not in STORES]
    first = Placement(places, torch.device(used[0] if used else "cpu"))
    embedding = next(name for name, found in root.named_parameters() if found is cast(Any, decoder).embed_tokens.weight)
    found = Placement(_flat(root, places), first.computes(embedding))
    sides = {name: str(found.computes(name)) for name in _leaves(root, others)}
    if len(set(sides.values())) > 1:
        one, other = list(dict.fromkeys(sides.values()))[:2]
        said = ", ".join(next(f"{name} on {d}" for name, d in sides.items() if d == device) for device in (one, other))
        raise ProbeError(f"`device_map` puts the image encoder of {source} on several devices ({said}); give it one")
    return found


def dispatch(model: nn.Module, placement: Placement, index: Mapping[str, Mapping[str, str]]) -> None:
    """Hooks on a model whose tensors are in their places; `index` says where those on disk are read from."""
    places = {name: place for name, place in placement.places.items() if name}
    if "" in placement.places:  # the root's own forward is never called: its children are what is placed
        for name, _ in (*model.named_children(), *model.named_parameters(recurse=False)):
            places.setdefault(name, placement.places[""])
    if set(places.values()) == {str(placement.home)}:
        return
    logger = logging.getLogger("accelerate.big_modeling")
    before, logger.disabled = logger.disabled, True  # it warns that what was asked for was done
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ... and of parameters that are no modules
            _accelerate().dispatch_model(
                model,
                places,
                main_device=str(placement.home),
                offload_index=dict(index) or None,
                skip_keys="past_key_values",
                force_hooks=True,
            )
    finally:
        logger.disabled = before


def on_disk(
    published: Mapping[str, str], weights: Tensors, dtype: torch.dtype, placement: Placement, cut: Mapping[str, int]
) -> dict[str, dict[str, str]]:
    """Where tensors that stay on disk are read from, by own name. Raises where rows are cut off, which a file's are
    not.
    """
    index = {}
    for name, key in published.items():
        if placement.of(name) != DISK or key not in weights.shapes:
            continue
        if name in cut:
            raise ProbeError(
                f"`device_map` leaves {name} on disk, but only the tokenizer's rows of it are used; give it a device, "
                'or load with vocab="full"'
            )
        index[name] = {"safetensors_file": str(weights.path(key)), "weight_name": key, "dtype": _dtype(dtype)}
    return index


def _worked_out(
    root: nn.Module,
    decoder: nn.Module,
    others: list[str],
    how: str,
    dtype: torch.dtype,
    max_memory: Mapping[int | str, int | str] | None,
) -> dict[str, str]:
    """accelerate's map: layers stay whole, and so does everything beside decoder and head."""
    from accelerate.utils import get_balanced_memory, infer_auto_device_map

    layers = cast(Any, decoder).layers
    whole = list({type(x).__name__ for x in layers} | {type(root.get_submodule(name)).__name__ for name in others})
    memory = None if max_memory is None else dict(max_memory)
    if how != "sequential":
        low = how == "balanced_low_0"
        memory = get_balanced_memory(root, memory, no_split_module_classes=whole, dtype=dtype, low_zero=low)
    found = infer_auto_device_map(root, memory, no_split_module_classes=whole, dtype=dtype)
    places = {str(k): _name(v) for k, v in found.items()}
    if others and "" not in places:  # views go through encoder and projector in one piece
        first = Placement(places, torch.device("cpu")).of(others[0])
        places |= dict.fromkeys(others, first)
    return places


def beside(root: nn.Module, decoder: nn.Module) -> list[str]:
    """The modules of a model beside decoder and head: encoder and projectors."""
    path = next(name for name, found in root.named_modules() if found is decoder).split(".")
    names = []
    for depth in range(len(path)):
        parent = ".".join(path[:depth])
        for name, child in root.get_submodule(parent).named_children():
            if name not in (path[depth], "lm_head") and next(child.parameters(), None) is not None:
                names.append(f"{parent}.{name}" if parent else name)
    return names


def _leaves(root: nn.Module, parts: list[str]) -> list[str]:
    """The parameters of these parts."""
    return [name for part in parts for name, _ in root.get_submodule(part).named_parameters(prefix=part)]


def _flat(root: nn.Module, places: Mapping[str, str]) -> dict[str, str]:
    """The same places without a name inside another: what holds for the rest of a module is said of its children."""
    out: dict[str, str] = {}

    def walk(name: str, module: nn.Module, place: str | None) -> None:
        place = places.get(name, place)
        if not any(key != name and _inside(key, name) for key in places):
            out.update({} if place is None else {name: place})
            return
        begin = f"{name}." if name else ""
        for child, inner in module.named_children():
            walk(begin + child, inner, place)
        for own in (key for key in module.state_dict() if "." not in key):
            if (there := places.get(begin + own, place)) is not None:
                out[begin + own] = there

    walk("", root, None)
    return out


def _inside(name: str, key: str) -> bool:
    return not key or name == key or name.startswith(f"{key}.")


def _name(device: object) -> str:
    """A device as text: 0 is the accelerator's first."""
    if device == DISK:
        return DISK
    try:
        known = torch.device(cast(Any, device))
    except (RuntimeError, TypeError):
        known = None
    if known is None or known.type == "meta":
        wanted = f"{', '.join(AUTOMATIC)}, a device, or names of modules to devices, `cpu` or `disk`"
        raise ProbeError(f"`device_map` says {device!r}; expected {wanted}")
    return str(known)


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _accelerate() -> Any:
    try:
        import accelerate
    except ImportError as error:
        raise ProbeError("`device_map` needs accelerate: pip install 'dmllm-probe[devices]'") from error
    return accelerate
