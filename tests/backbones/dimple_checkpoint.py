"""Small random Dimple checkpoints on disk, with every file that the published folder has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from probe.backbones.base import SpecialIds
from probe.backbones.tiny.dimple import IDS, PREPROCESSOR, TEMPLATE, dimple_shapes, write_dimple_tokenizer
from probe.backbones.tiny.dimple import write_dimple as write

__all__ = ["IDS", "PREPROCESSOR", "STAND_IN", "TEMPLATE", "shapes_of", "write_dimple", "write_tokenizer"]

STAND_IN = SpecialIds(mask=IDS["<|mask|>"], eos=IDS["<|im_end|>"], stop=IDS["<|im_end|>"], suppressed=())
shapes_of, write_tokenizer = dimple_shapes, write_dimple_tokenizer


def write_dimple(folder: Path, **settings: Any) -> Path:
    """As the package's own builder, with code beside the weights, as published."""
    write(folder, **settings)
    for code in ("configuration_dimple.py", "modeling_dimple.py", "tokenization_dimple.py"):
        (folder / code).write_text("raise SystemExit('code of a checkpoint was run')\n", encoding="utf-8")
    return folder
