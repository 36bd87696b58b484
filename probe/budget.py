"""All pruners at one budget: what each recipe keeps when it is told the same `keep`, measured by running it.

Four numbers go by the name of retention. *Nominal*: the fewest visual tokens of any layer and step, over those of the
unpruned run: what is left right behind the intervention. *Layer average*: the mean over the layers of the first pass
in which tokens are missing. *Trajectory average*: the mean over layers and steps, which is what a generation costs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from probe.backbones import load
from probe.backbones.base import Backbone
from probe.calibrate import merges_for
from probe.compile import compile_recipe
from probe.data import named
from probe.errors import ProbeError
from probe.recipe import Recipe, load_recipe, shipped_recipes
from probe.registry import operations
from probe.runner import pick_device, run
from probe.trace import open_trace

NOT_SHARES = ("cumulative",)
"""Ways to say `keep` that are no share and are not replaced by one: the recipe is about how many."""


@dataclass(frozen=True)
class Line:
    """One recipe. Shares of the unpruned visual tokens, means over the samples; FLOPs as a share of the unpruned run's.

    `remark` says where the recipe's count is no share; `cannot` why it does not run here (then all numbers are NaN).
    """

    name: str
    nominal: float = float("nan")
    layer_average: float = float("nan")
    trajectory_average: float = float("nan")
    flops: float = float("nan")
    remark: str = ""
    cannot: str = ""


@dataclass(frozen=True)
class Measured:
    """Per sample: `(step, layer)` visual tokens, how many the sample has, executed FLOPs; by the sample's number."""

    tokens: dict[int, np.ndarray]
    original: dict[int, int]
    flops: dict[int, float]


def at_budget(recipe: Recipe, keep: float, facts: Any) -> tuple[Recipe, str]:
    """The recipe told to keep this share, and what must be said of it: where its count is no share of the tokens."""
    doing = {p.do.name for p in recipe.probes if p.do is not None}
    if all(operations[name].meta.get("changes") == "attention" for name in doing):
        told = recipe.with_sets([f"keep={keep}"]) if "keep" in recipe.dial else recipe
        return told, "no token leaves: attention alone is changed"
    if "keep" in recipe.dial:
        written = recipe.dial["keep"]
        if isinstance(written, dict):
            rule = next(iter(written))
            if rule in NOT_SHARES:
                return recipe, f"its own counts: {_flow(written)}"
            if rule == "share":
                return recipe.replace(dial=recipe.dial | {"keep": written | {"share": keep}}), ""
            told = recipe.with_sets([f"keep={keep}"])
            return told, f"told this share; by itself it keeps {_flow(written)}"
        if isinstance(written, list):
            return recipe.with_sets([f"keep={keep}"]), "this share at each of its layers"
        return recipe.with_sets([f"keep={keep}"]), ""
    if "r" in recipe.dial:
        acting = {p.layer for p in compile_recipe(recipe, facts).encoder if p.layer is not None}
        found = merges_for(facts.patches, len(acting), keep=keep)
        return recipe.with_sets([f"r={found.value}"]), f"no share: r = {found.value} merged per layer comes nearest"
    if doing <= {"withdraw"}:
        return recipe, "no share: withdraws every visual token"
    if doing <= {"skip_layers"}:
        return recipe, "no share: every visual token goes around some layers"
    return recipe, "no share: the recipe has no dial `keep`"


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_flow(v)}" for k, v in value.items()) + "}"
    return str(value)


def measure(
    names: Sequence[str] = (),
    *,
    keep: float = 0.25,
    backbone: str | Backbone = "miniature",
    data: str | None = None,
    samples: int = 2,
    sets: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    out: Path | None = None,
    on_recipe: Callable[[str], None] | None = None,
) -> list[Line]:
    """Run recipes (default: every shipped pruner) at one `keep`, one after the other; a line each, `none` first.

    `sets` are applied to all of them (`generate.steps=8`). Traces are kept in `out`, if it is given. A recipe that the
    backbone cannot run has a line that says why. Raises `ProbeError` where `keep` is no share.
    """
    if not 0 < keep <= 1:
        raise ProbeError(f"--keep {keep}: the budget is a share of the visual tokens, more than 0 and at most 1")
    model = load(backbone, device=pick_device(device), dtype=dtype) if isinstance(backbone, str) else backbone
    wanted = list(names) or [i.name for i in shipped_recipes() if i.name.startswith("prune/")]
    wanted = ["prune/none", *(n for n in wanted if n not in ("none", "prune/none"))]
    with tempfile.TemporaryDirectory() as scratch:
        folder = out or Path(scratch)
        lines: list[Line] = []
        bare: Measured | None = None
        for name in wanted:
            if on_recipe is not None:
                on_recipe(name)
            recipe = load_recipe(name).with_sets(sets)
            label = recipe.name
            try:
                told, remark = at_budget(recipe, keep, model.facts) if bare is not None else (recipe, "")
                if data is not None:
                    told = told.replace(data=named(data))
                found = _measured(told, model, samples, folder / label)
            except ProbeError as error:
                if bare is None:
                    raise
                lines.append(Line(label, cannot=_reason(str(error))))
                continue
            bare = bare or found
            lines.append(_line(label, found, bare, remark))
    return lines


def _reason(message: str) -> str:
    """An error without its place in the file, which is ours and not the reader's."""
    return message.split(": ", 1)[-1] if message.split(": ", 1)[0].count(":") >= 2 else message


def _measured(recipe: Recipe, model: Backbone, samples: int, folder: Path) -> Measured:
    result = run(recipe, backbone=model, limit=samples, out=folder, baseline=False, timed=False)
    with open_trace(result.trace) as trace:
        failed = trace.array("failed")
        if failed.any() and all(failed):
            raise ProbeError(str(failed[0]))
        rows = [i for i in range(trace.n_samples) if not failed[i] and trace.extents(i).get("visual")]
        if not rows:
            raise ProbeError("no sample has visual tokens")
        numbers = trace.samples
        return Measured(
            {int(numbers[i]): trace.row("visual_tokens", i) for i in rows},
            {int(numbers[i]): trace.extents(i)["visual"] for i in rows},
            {int(numbers[i]): float(trace.array("flops_total")[i]) for i in rows},
        )


def _line(label: str, found: Measured, bare: Measured, remark: str) -> Line:
    numbers = [n for n in found.tokens if n in bare.original]
    shares = [found.tokens[n] / bare.original[n] for n in numbers]
    if found is not bare and not remark and all((s == 1).all() for s in shares):
        remark = "never acted: its signal did not come, or the answers ended before its start"
    return Line(
        label,
        nominal=float(np.mean([s.min() for s in shares])),
        layer_average=float(np.mean([layer_average(s) for s in shares])),
        trajectory_average=float(np.mean([s.mean() for s in shares])),
        flops=float(np.mean([found.flops[n] / bare.flops[n] for n in numbers])),
        remark=remark,
    )


def layer_average(shares: np.ndarray) -> float:
    """Of `(step, layer)` shares: the mean over layers in the first step in which tokens are missing (none: 1)."""
    acting = np.flatnonzero((shares < 1).any(1))
    return float(shares[acting[0] if len(acting) else 0].mean())
