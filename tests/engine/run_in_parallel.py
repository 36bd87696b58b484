"""Run by torchrun: answers of a model whose heads are split over processes, against those of the whole model.

Arguments: names of interventions, or `all`; a folder with a checkpoint. Every process prints a line of JSON for each
intervention and cache.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from interventions import EDITS
from test_device_map import ask

from probe.backbones import load
from probe.errors import ProbeError

CACHES = (None, "none", "{dllm_cache: {}}", "{sparse_dllm: {}}")


def main(wanted: list[str], folder: Path) -> None:
    parallel, plain = load(folder, tp_plan="auto", dtype="float64"), load(folder, dtype="float64")
    rank = torch.distributed.get_rank()
    for name in wanted:
        for cache in CACHES:
            try:
                expected = ask(plain, EDITS.get(name, ""), cache)
            except ProbeError:
                continue
            found = ask(parallel, EDITS.get(name, ""), cache)
            off = {"ids": float(found.ids != expected.ids)}
            for key in expected.arrays.keys() - {"seconds", "seconds_total", "peak_memory"}:
                one, other = np.nan_to_num(expected.arrays[key], nan=-7), np.nan_to_num(found.arrays[key], nan=-7)
                same = one.shape == other.shape
                off[key] = float(np.abs(one.astype(float) - other.astype(float)).max(initial=0)) if same else np.inf
            worst = max(off, key=lambda key: off[key])
            line = {"rank": rank, "edit": name, "cache": cache, "off": off[worst], "at": worst}
            sys.stdout.write(json.dumps(line) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(["", *EDITS] if sys.argv[1] == "all" else sys.argv[1].split(","), Path(sys.argv[2]))
    torch.distributed.destroy_process_group()
