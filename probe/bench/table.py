"""What is printed and written: the conditions, and a line for every figure with its target beside it."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from rich.table import Table

from probe.attend import kernel_name
from probe.bench.line import Line, written
from probe.bench.shapes import Bench
from probe.bench.suite import FULL, ROWS, command_of


def conditions(bench: Bench, jobs: int = 1) -> dict[str, str]:
    """Where the numbers come from; `jobs` processes shared the rows."""
    on_gpu = bench.device.startswith("cuda")
    kernel = "sdpa"
    if "model" in bench.__dict__:
        kernel = kernel_name(str(bench.model.lm.config._attn_implementation))  # type: ignore[union-attr]
    return {
        "device": torch.cuda.get_device_name(bench.device) if on_gpu else _processor(),
        "dtype": bench.dtype,
        "kernel": kernel,
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()}"
        + (f", in each of {jobs} processes that share the rows" if jobs > 1 else ""),
        "load": " ".join(f"{x:.2f}" for x in os.getloadavg()) + " (1, 5, 15 minutes)",
        "versions": f"python {platform.python_version()}, torch {version('torch')}, "
        f"transformers {version('transformers')}",
        "mode": "quick" if bench.quick else "whole",
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def not_measured(lines: Sequence[Line]) -> list[Line]:
    """Lines for the published shapes that were not run, with their command."""
    done = {line.shape.split(",")[0] for line in lines if line.row == "full"}
    (row,) = (r for r in ROWS if r.name == "full")
    from probe.bench.rows.full import PRUNED, REPORTED, STUDY

    out = []
    for name, short in FULL.items():
        if name not in done:
            note = f"not measured: wants a GPU; `{command_of(row, name)}`"
            for i, what in enumerate(("unpruned, recording on and off", *(w.name for w in PRUNED))):
                out.append(Line("full", f"{short}: {what}", STUDY if i == 1 else REPORTED, note=note))
    return out


def _value(line: Line, between: str = " ") -> str:
    if line.value is None:
        return "not measured"
    unit, v = line.target.unit, line.value
    number = written(v.median, unit)
    return f"{number}{between}({written(v.low, unit)} … {written(v.high, unit)})" if v.n > 1 else number


def _met(line: Line) -> str:
    return {True: "yes", False: "NO", None: ""}[line.met]


def render(lines: Sequence[Line], told: dict[str, str]) -> Table:
    """The table for a terminal."""
    table = Table(
        title="\n".join(f"{name}: {value}" for name, value in told.items()),
        title_justify="left",
        caption="measured: median over the turns and quartiles, of ratios within a turn; CPU: the same by this "
        "process's processor time; a row whose outputs differ is an error, not a number",
        caption_justify="left",
    )
    for column in ("row", "what", "target", "measured", "CPU", "met"):
        table.add_column(column, no_wrap=column != "what")
    for line in lines:
        cpu = "" if line.cpu is None else written(line.cpu.median, line.target.unit)
        below = [line.note, f"outputs equal: yes ({line.equal})" if line.equal else ""]
        what = "\n".join([line.what, *(f"[dim]{text}[/]" for text in below if text)])
        style = "bold red" if line.met is False else None
        table.add_row(line.row, what, str(line.target), _value(line, "\n"), cpu, _met(line), style=style)
    return table


def markdown(lines: Sequence[Line], told: dict[str, str]) -> str:
    """The table as Markdown: conditions, then a line each."""
    out = [f"- {name}: {value}" for name, value in told.items()]
    out += ["", "| row | what | target | measured | CPU | met | outputs equal | shape | note |"]
    out.append("|" + "---|" * 9)
    for line in lines:
        cpu = "" if line.cpu is None else written(line.cpu.median, line.target.unit)
        equal = f"yes: {line.equal}" if line.equal else ""
        cells = [line.row, line.what, str(line.target), _value(line), cpu, _met(line), equal, line.shape, line.note]
        out.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(out) + "\n"


def as_json(lines: Sequence[Line], told: dict[str, str]) -> str:
    """The table as JSON: `conditions`, and `lines` with every number (quartiles, seconds, FLOPs)."""
    data: dict[str, Any] = {"conditions": told, "lines": [line.record() for line in lines]}
    return json.dumps(data, indent=1, default=float).replace("NaN", "null") + "\n"
