"""A published checkpoint into a class of transformers: safetensors only, nothing missing and nothing left over.

transformers knows every name that its models' tensors have been published under, and spreads them over devices. Here
its report becomes one error.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers.utils import logging

from probe.backbones.checkpoint import Checkpoint, choose_dtype
from probe.backbones.placement import DISK, likely_device, place
from probe.errors import ProbeError

_MOST = 5
SMALL = 1 << 28
"""Bytes of weights that are read too quickly for a progress bar."""


def native_config(kind: Any, checkpoint: Checkpoint, kernels: Mapping[str, str]) -> Any:
    """transformers' config of a native class; `kernels` name the attention of its parts, by their config's name."""
    try:
        config = kind.config_class.from_dict(dict(checkpoint.config))
    except (AttributeError, KeyError, TypeError, ValueError, StrictDataclassError) as error:
        said = f"{checkpoint.folder}: config.json does not describe a {kind.__name__}"
        raise ProbeError(f"{said}: {error}") from error
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    if window is not None and getattr(text, "use_sliding_window", True):
        raise ProbeError(f"{checkpoint.folder}: sliding-window attention ({window} tokens) is not supported")
    for part, kernel in kernels.items():
        getattr(config, part)._attn_implementation = kernel
    return config


def load_native(
    kind: Any,
    checkpoint: Checkpoint,
    config: Any,
    *,
    device: str | torch.device,
    dtype: str | torch.dtype,
    device_map: object = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    tp_plan: str | None = None,
) -> Any:
    """The native model with the checkpoint's weights, on `device` or spread as `device_map` says.

    Raises `ProbeError` when a tensor is missing, left over or of another shape.
    """
    with checkpoint.tensors() as weights:  # says clearly what is wrong with the files themselves
        name = next((k for k in weights.shapes if k.endswith("embed_tokens.weight")), None)
        stored = weights.read(name, 1).dtype if name else torch.float32
    chosen = choose_dtype(dtype, stored, likely_device(device, device_map))
    settings = {"dtype": chosen, "local_files_only": True, "use_safetensors": True}
    if device_map is not None:
        with torch.device("meta"):
            shell = kind(config)
        decoder = shell.model.language_model
        placement = place(shell, decoder, checkpoint.source, device_map, chosen, max_memory)
        loose = [name for name in shell.state_dict() if name in placement.places and placement.of(name) == DISK]
        if loose:  # read without a module's forward, so that nothing fetches it
            raise ProbeError(f"`device_map` leaves {loose[0]} on disk; it must be on {placement.home}")
        settings["device_map"] = dict(placement.places)
    if tp_plan is not None:
        settings |= _parallel(kind, checkpoint, config, tp_plan, device_map)
    before, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # the report becomes an error of ours
    if sum(path.stat().st_size for path in checkpoint.files) < SMALL:
        logging.disable_progress_bar()
    try:
        model, report = kind.from_pretrained(
            checkpoint.folder, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **settings
        )
    except Exception as error:  # transformers raises many kinds; all of them mean the same to the user
        reason = str(error).strip().split("\n", 1)[0]
        raise ProbeError(f"{checkpoint.folder} cannot be loaded ({type(error).__name__}: {reason})") from error
    finally:
        logging.set_verbosity(before)
        if bar:
            logging.enable_progress_bar()
    kinds = {"missing": "missing_keys", "unexpected": "unexpected_keys", "of another shape": "mismatched_keys"}
    wrong = [f"{len(report[key])} {said}: {_some(report[key])}" for said, key in kinds.items() if report[key]]
    if wrong:
        raise ProbeError(f"{checkpoint.folder}: the weights do not fit the config. {'; '.join(wrong)}")
    return model if device_map is not None or tp_plan is not None else model.to(device)


def _parallel(kind: Any, checkpoint: Checkpoint, config: Any, plan: str, device_map: object) -> dict[str, Any]:
    """transformers' settings of tensor parallelism; raises where it cannot be."""
    from transformers.distributed import DistributedConfig

    if plan != "auto":
        raise ProbeError(f"tp_plan={plan!r}; known: auto, transformers' own plan for the class")
    if device_map is not None:
        raise ProbeError("`tp_plan` splits layers over all processes, `device_map` places whole ones; give one of them")
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        raise ProbeError("`tp_plan` needs a process per part: start it with torchrun --nproc-per-node N")
    size, text = int(os.environ["WORLD_SIZE"]), config.get_text_config()
    with torch.device("meta"):
        plans = kind(config).tp_plan
    if not any(".layers." in name for name in plans):
        raise ProbeError(f"transformers has no tensor-parallel plan for the decoder of {checkpoint.source}")
    for name in ("num_attention_heads", "num_key_value_heads"):
        if (heads := getattr(text, name)) % size:
            raise ProbeError(f"{size} processes cannot share {heads} {name} of {checkpoint.source} evenly")
    return {"distributed_config": DistributedConfig(tp_plan=plan)}


def _some(keys: Any) -> str:
    """Up to five keys; one of another shape is `(name, shape found, shape wanted)`."""
    said = sorted(k if isinstance(k, str) else f"{k[0]} {list(k[1])} instead of {list(k[2])}" for k in keys)
    return ", ".join(said[:_MOST]) + (f", and {len(said) - _MOST} more" if len(said) > _MOST else "")
