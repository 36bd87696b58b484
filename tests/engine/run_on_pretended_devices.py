"""Run by a test in a process of its own: answers of models that lie on two pretended devices, against those on one.

Arguments: folders of checkpoints. Prints a line of JSON for each folder, intervention and cache: what differs.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
from interventions import EDITS
from pretended_devices import KIND, PretendedDevices
from test_device_map import ask, spread_over

from probe.backbones import load

CACHES = (None, "none", "{dllm_cache: {}}", "{sparse_dllm: {}}")


def main(folder: Path, wanted: list[str]) -> None:
    options = (
        {"experts": "eager"} if "gemma" in (folder / "config.json").read_text() else {}
    )  # the fast ones are device-specific
    one, other = f"{KIND}:1", f"{KIND}:0"
    with PretendedDevices():
        plain = load(folder, device_map=one, **options)
        spread = load(folder, device_map=spread_over(plain, [one, other], [other], one), **options)
    for name in wanted:
        for cache in CACHES:
            print(
                json.dumps({"folder": folder.name, "edit": name, "cache": cache, **compare(plain, spread, name, cache)})
            )


def compare(plain: Any, spread: Any, name: str, cache: str | None) -> dict[str, str]:
    try:
        with PretendedDevices(), torch.no_grad():
            expected = ask(plain, EDITS.get(name, ""), cache)
    except Exception as error:
        return {"refused": str(error)[:300]}
    try:
        with PretendedDevices(), torch.no_grad():
            found = ask(spread, EDITS.get(name, ""), cache)
    except Exception as error:
        frames = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
        return {"failed": f"{str(error)[:200]} ({' '.join(frames[-6:])})"}
    if found.ids != expected.ids:
        return {"differs": f"{found.ids} instead of {expected.ids}"}
    for key in expected.arrays.keys() - {"seconds", "seconds_total", "peak_memory"}:
        if not np.array_equal(found.arrays[key], expected.arrays[key], equal_nan=found.arrays[key].dtype.kind == "f"):
            return {"differs": key}
    return {"same": str(len(found.ids))}


if __name__ == "__main__":
    for argument in sys.argv[2:]:
        main(Path(argument), ["", *EDITS] if sys.argv[1] == "all" else sys.argv[1].split(","))
