"""Cases of the `pruners` set, and our vocabulary composed on them as a recipe composes it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from probe.compile import Edit, compile_recipe
from probe.decide import decide, score_of
from probe.recipe import Recipe
from probe.site import Clock, ModelFacts, Plan

FACTS = ModelFacts(name="model", layers=64, heads=8, width=32, vocabulary=100, encoder_layers=26, class_token=True)
CLOCK = Clock(pass_index=0, step=0, block=0, step_in_block=0, nominal_steps=16, n_blocks=1)


@dataclass(frozen=True)
class Case:
    """One case: what the original was given, what it gave, and how close a result must be."""

    method: str
    name: str
    function: str
    params: dict[str, Any]
    inputs: dict[str, Any]
    expected: dict[str, Any]
    compare: dict[str, Any]
    tags: tuple[str, ...] = ()

    @property
    def raises(self) -> bool:
        """Whether the original fails on this input."""
        return "raises" in self.expected

    @property
    def tie(self) -> bool:
        """Whether only invariants hold."""
        return "tie" in self.tags


@cache
def load(folder: Path, method: str) -> tuple[Case, ...]:
    """The cases of one method's file."""
    manifest = json.loads((folder / f"{method}.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / manifest.get("file", f"{method}.safetensors"))
    by_name = {c["name"]: c for c in manifest["cases"]}

    def values(table: Mapping[str, Any]) -> dict[str, Any]:
        return {k: tensors[v["tensor"]] if "tensor" in v else v.get("value") for k, v in table.items()}

    cases = []
    for c in manifest["cases"]:
        source = by_name[c["params"].get("input_tensors_of", c["name"])]
        params = {**(source["params"] if source is not c else {}), **c["params"]}
        cases.append(
            Case(
                method,
                c["name"],
                c["function"],
                params,
                values(source["inputs"]) | values(c["inputs"]),
                values(c["expected"]),
                c.get("compare", {}),
                tuple(c.get("tags") or ()),
            )
        )
    return tuple(cases)


RULES: dict[str, tuple[str, Callable[[Case], bool]]] = {
    "tome_match": ("tome", lambda c: "metric" in c.inputs),
    "tome_chain": ("tome", lambda c: "x0" in c.inputs),
    "tome_block": ("tome", lambda c: "x" in c.inputs and "metric" not in c.inputs),
    "tome_schedule": ("tome", lambda c: "num_layers" in c.params),
    "divprune": ("divprune", lambda c: True),
    "fastv": ("fastv", lambda c: True),
    "raters": ("sparsevlm", lambda c: "v" in c.inputs),
    "sparse_rank": ("sparsevlm", lambda c: "attn" in c.inputs and "scale" in c.params),
    "sparse_list": ("sparsevlm", lambda c: "token_list" in c.params),
    "sparse_clusters": ("sparsevlm", lambda c: "noise" in c.inputs),
    "sparse_chain": ("sparsevlm", lambda c: "input_embeddings" in c.inputs),
    "sparse_heads": ("sparsevlm", lambda c: "rater_abs" in c.inputs),
    "trim": ("trim", lambda c: True),
    "vtw_withdraw": ("vtw", lambda c: "hidden" in c.inputs),
    "vtw_layer": ("vtw", lambda c: "logits_full" in c.inputs),
    "pyramiddrop": ("pyramiddrop", lambda c: True),
    "visionzip": ("visionzip", lambda c: True),
    "dart": ("dart", lambda c: True),
    "prumerge": ("prumerge", lambda c: True),
    "fastervlm": ("others", lambda c: "faster" in c.function.lower()),
    "vispruner": ("others", lambda c: "vispruner" in c.function.lower()),
    "hiprune": ("others", lambda c: "hiprune" in c.function.lower()),
    "holov": ("others", lambda c: "holov" in c.function.lower()),
    "folder": ("others", lambda c: "folder" in c.function.lower()),
    "globalcom2": ("others", lambda c: "globalcom2" in c.function.lower()),
    "study_fastv": ("study_variants", lambda c: {"q", "k"} <= set(c.inputs) and "t_emb" not in c.inputs),
    "study_divprune": ("study_variants", lambda c: "pivot" in c.params),
    "study_progressive": ("study_variants", lambda c: "fractions" in c.params),
    "study_tome": ("study_variants", lambda c: "key0" in c.inputs),
    "study_trim": ("study_variants", lambda c: "ln_w" in c.inputs),
    "study_sparsevlm": ("study_variants", lambda c: "t_emb" in c.inputs),
}
"""Which cases a test reads: the file they are in, and how they are told apart from its others."""


def of(rule: str) -> Callable[[Path], Iterator[tuple[str, Case]]]:
    """A finder of the cases that a rule names."""
    method, claims = RULES[rule]

    def find(folder: Path) -> Iterator[tuple[str, Case]]:
        if (folder / f"{method}.json").is_file():
            yield from ((f"{method}-{c.name}", c) for c in load(folder, method) if claims(c))

    return find


def every_case(folder: Path) -> Iterator[tuple[str, tuple[Case, list[str]]]]:
    """Every case of the set with the rules that claim it."""
    for path in sorted(folder.glob("*.json")):
        for c in load(folder, path.stem):
            yield f"{path.stem}-{c.name}", (c, [r for r, (m, claims) in RULES.items() if m == c.method and claims(c)])


@dataclass
class Given:
    """A decision's source: the tensors of a case under the names of our vocabulary."""

    values: dict[str, Any]
    seed: int = 0
    spent: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def give(self, name: str, params: Mapping[str, Any]) -> Any:
        if name in self.values:
            return self.values[name]
        n = self.values["n"]
        if name == "original":
            return n
        if name == "progress":
            return 0.0
        if name == "generator":
            return torch.Generator().manual_seed(self.seed)
        if name in ("size", "view"):
            return torch.ones(n) if name == "size" else torch.zeros(n, dtype=torch.int64)
        raise KeyError(f"the case has no `{name}`")

    def spend(self, flops: int) -> None:
        self.spent += flops

    def doubt(self, score: Tensor) -> None:
        assert not score.isnan().any()


def edit_of(
    select: Any, do: Any = "drop", score: Any = None, *, site: str = "layer.after_attention", layer: Any = 2
) -> Edit:
    """An intervention, spelled as in a recipe; where the class token looks, at the output of the encoder."""
    if "'queries': 'cls'" in repr((score, select, do)):
        site, layer = "encoder.output", None
    at = {"site": site} if layer is None else {"site": site, "layer": layer}
    probe = {"at": at, "select": select, "do": do} | ({} if score is None else {"score": score})
    recipe = Recipe.model_validate({"schema": 1, "name": "case", "probes": [probe]})
    edit = compile_recipe(recipe, FACTS).probes[0].edit
    assert edit is not None
    return edit


def plan_of(edit: Edit, **values: Any) -> Plan:
    """What an intervention decides on a case; where nothing changes, the plan that keeps everything."""
    plan = decide(edit, Given(values), CLOCK)
    return Plan(torch.arange(values["n"])) if plan is None else plan


def scored(edit: Edit, **values: Any) -> Tensor:
    """What an intervention's score says on a case."""
    found = score_of(edit, Given(values), CLOCK)
    assert found is not None
    return found


def mask_of(kept: Tensor, n: int) -> Tensor:
    """`(n,)` bool, true at the kept tokens."""
    return torch.zeros(n, dtype=torch.bool).scatter_(0, kept, True)


def check(case: Case, got: Mapping[str, Any]) -> None:
    """Everything that is expected and that we have, as close as the case asks; all of it where there is no tie."""
    compared = 0
    for key, want in case.expected.items():
        kind = case.compare.get(key, {"kind": "exact"})
        if key == "raises" or kind["kind"] == "any" or (case.tie and key not in got):
            continue
        assert key in got, f"nothing of ours stands for `{key}`"
        have = got[key]
        compared += 1
        if isinstance(want, Tensor):
            have = torch.as_tensor(have)
            assert tuple(have.shape) == tuple(want.shape), key
            if kind["kind"] == "exact":
                assert torch.equal(have.to(want.dtype), want), key
            else:
                torch.testing.assert_close(have.to(want.dtype), want, rtol=kind["rtol"], atol=kind["atol"], msg=key)
        elif kind["kind"] == "exact":
            assert have == want, key
        else:
            torch.testing.assert_close(
                torch.as_tensor(have, dtype=torch.float64),
                torch.as_tensor(want, dtype=torch.float64),
                rtol=kind["rtol"],
                atol=kind["atol"],
                msg=key,
            )
    assert compared or case.tie or case.raises, "nothing was compared"


def check_best(kept: Tensor, score: Tensor, count: int) -> None:
    """The invariant of a top-k where scores tie: `count` different tokens, none worse than one that is gone."""
    assert kept.shape[0] == count == kept.unique().shape[0]
    gone = ~mask_of(kept, score.shape[0])
    if count and gone.any():
        assert score[kept].min() >= score[gone].max()
