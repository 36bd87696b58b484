"""The rows by name, in order: what each measures, its targets, where it runs, and the command that repeats it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import cast

from probe.bench.line import Line
from probe.bench.shapes import Bench
from probe.errors import ProbeError
from probe.registry import nearest


@dataclass(frozen=True)
class Row:
    """A row: the targets as the table names them, and `module:function` that measures it.

    `quick_steps` and `quick_repeats` are what `--quick` takes; `steps` otherwise.
    """

    name: str
    what: str
    targets: tuple[str, ...]
    function: str
    steps: int = 16
    quick_steps: int = 2
    quick_repeats: int = 3
    published: bool = True
    """Whether it can also be measured with `--backbone`."""


ROWS: tuple[Row, ...] = (
    Row("loop", "the loop without a probe against a minimal hand-written one", ("≤ 1.010x", "reported"),
        "loop:run", 4, 2, 5),
    Row("recording", "recording at every step and layer against none", ("≤ 1.080x",), "recording:run", 4, 2, 5),
    Row("eager", "the same against an eager run with output_attentions", ("≥ 1.400x", "≥ 2.000x", "reported"),
        "recording:run_eager", 4, 2, 2),
    Row("memory", "extra peak memory of the recording, and with twice the steps", ("≤ 5.00%", "≤ 0.50%"), "memory:run"),
    Row("published", "a published-loop equivalent against ours", ("≥ 1.300x", "reported"),
        "loop:run_published", 4, 2, 2),
    Row("speedup", "realised over predicted speed-up of pruners", ("≥ 0.900x",), "pruners:run", 8, 2, 2),
    Row("pruner", "time in the pruner itself", ("≤ 3.00%",), "pruners:run_pruner", 16, 8, 1),
    Row("writing", "trace writing against the run", ("≤ 2.00%",), "writing:run", 16, 4, 2),
    Row("prefix", "LaViDa's prefix cache with visual tokens cut against uncut", ("≥ 1.000x", "≥ 0.900x"),
        "prefix:run", 16, 16, 3),
    Row("batch", "eight samples one by one against one batch", ("≥ 1.000x",), "batch:run", 2, 1, 2),
    Row("startup", "`probe --help` and `probe check`", ("≤ 3.000x", "≤ 2 s"), "startup:run", 1, 1, 5, published=False),
    Row("scaling", "256 to 4,096 visual tokens dropped to a quarter", ("≥ 0.900x",), "scaling:run", 2, 1, 2),
    Row("full", "a published shape at full size: pace, speed-ups, share of the matrix peak", ("≥ 1.440x", "reported"),
        "full:run", 16, 16, 3),
)  # fmt: skip
BY_DEFAULT = tuple(row.name for row in ROWS if row.name != "full")
"""What `probe bench` measures without `--backbone`; with it, `full`."""
FULL = {
    "GSAI-ML/LLaDA-V": "LLaDA-V",
    "jacklishufan/lavida-dream-v1.0-instruct": "LaViDa-Dream",
}
"""Published shapes whose row stands in the table whether it was measured or not."""


def chosen(names: Sequence[str], published: str | None) -> list[Row]:
    """The rows of these names, in the order of the table. Raises `ProbeError` for a name that there is not."""
    known = [row.name for row in ROWS]
    for name in names:
        if name not in known:
            raise ProbeError(f"there is no row `{name}`; {nearest(name, known)}")
    wanted = names or (BY_DEFAULT if published is None else ("full",))
    return [row for row in ROWS if row.name in wanted]


def command_of(row: Row, published: str | None = None) -> str:
    """The command that measures one row."""
    if row.name != "full":
        return f"probe bench --rows {row.name}"
    name = published or next(iter(FULL))
    asked = "--tokens 3600 --answer 32 --steps 16"
    return f"probe bench --device cuda --backbone {name} --random-weights {asked} --dtype bfloat16"


def measure(
    bench: Bench,
    rows: Iterable[Row],
    *,
    steps: int | None = None,
    repeats: int | None = None,
    on_row: Callable[[str], None] | None = None,
    on_lines: Callable[[list[Line]], None] | None = None,
) -> list[Line]:
    """Measure rows one after the other. `steps` and `repeats` override what each takes by itself.

    `on_row` is told the row that begins, `on_lines` all lines that there are whenever one has ended.
    """
    lines: list[Line] = []
    for row in rows:
        if on_row is not None:
            on_row(row.name)
        if bench.published is not None and not row.published:
            raise ProbeError(f"row `{row.name}` needs no backbone; leave --backbone out")
        taken = steps or (row.quick_steps if bench.quick else row.steps)
        often = repeats or (row.quick_repeats if bench.quick else bench.repeats)
        here = replace(bench, shape=replace(bench.shape, steps=taken), repeats=often)
        if "model" in bench.__dict__:
            here.__dict__["model"] = bench.model
        module, function = row.function.split(":")
        run = cast("Callable[[Bench], list[Line]]", getattr(import_module(f"probe.bench.rows.{module}"), function))
        lines += run(here)
        if on_lines is not None:
            on_lines(lines)
        if "model" in here.__dict__:
            bench.__dict__["model"] = here.model
    return lines
