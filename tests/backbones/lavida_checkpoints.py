"""Small random LaViDa checkpoints in the published layout, and ways to change them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from probe.backbones.tiny.tiled import DREAM, DREAM_TOKENS, LLADA, LLADA_TOKENS, ROWS, write_lavida
from probe.backbones.tiny.tiled import LAVIDA_PICTURES as PICTURES
from probe.backbones.tiny.tiled import LAVIDA_VISION as VISION

__all__ = ["ADDED", "CONFIGS", "PICTURES", "ROWS", "VISION", "edit_config", "edit_weights", "write_checkpoint"]

CONFIGS = {"dream": DREAM, "llada": LLADA}
ADDED = {"dream": DREAM_TOKENS, "llada": LLADA_TOKENS}
write_checkpoint = partial(write_lavida, seed=1)


def edit_config(folder: Path, **changes: Any) -> None:
    """Change settings of a written checkpoint; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}), encoding="utf-8")


def edit_weights(folder: Path, change: Any) -> None:
    """Have `change(name -> tensor)` edit the shard that it finds its tensors in (called for each shard)."""
    from safetensors.torch import load_file

    for path in sorted(folder.glob("*.safetensors")):
        weights = {name: value.clone() for name, value in load_file(path).items()}  # the file is mapped, not read
        change(weights)
        save_file(weights, path)
