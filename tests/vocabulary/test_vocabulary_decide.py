"""From a recipe's words to a plan: combinations, protected tokens, own scores; and what is refused, with its place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from probe.compile import Edit, compile_recipe
from probe.decide import decide, score_of
from probe.errors import ProbeError
from probe.explain import explain
from probe.inputs import asked
from probe.recipe import parse_recipe
from probe.site import Clock, ModelFacts, Plan

FACTS = ModelFacts(name="model", layers=8, heads=4, width=16, vocabulary=100, encoder_layers=4)
HEAD = "schema: 1\nname: x\nprobes:\n  - at: {site: layer.after_attention, layer: 2}\n"


def clock(step: int = 0) -> Clock:
    return Clock(pass_index=step, step=step, block=0, step_in_block=step, nominal_steps=8, n_blocks=1)


def edit_of(text: str) -> Edit:
    edit = compile_recipe(parse_recipe(HEAD + text, source="x.yaml"), FACTS).probes[0].edit
    assert edit is not None
    return edit


class Tokens:
    """A source of n tokens with made-up states."""

    def __init__(self, n: int, seed: int = 0, **values: Any) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.asked: list[str] = []
        self.spent = 0
        self.values: dict[str, Any] = {
            "n": n,
            "original": n,
            "progress": 0.0,
            "hidden": torch.randn(n, 6, generator=draw),
            "embedding": torch.randn(n, 6, generator=draw),
            "keys": torch.randn(2, n, 3, generator=draw),
            "received": torch.rand(3, n, generator=draw),
            "attended": torch.rand(2, n, generator=draw),
            "size": torch.ones(n),
            "view": torch.arange(n) % 2,
            "newline": torch.arange(n) % 5 == 4,
            "cls": torch.arange(n) == 0,
            "columns": 3,
            "generator": torch.Generator().manual_seed(seed),
            "noise": torch.zeros,
        } | values

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def give(self, name: str, params: Mapping[str, Any]) -> Any:
        self.asked.append(name)
        return self.values[name]

    def spend(self, flops: int) -> None:
        self.spent += flops

    def doubt(self, score: Tensor) -> None:
        assert not score.isnan().any()

    @property
    def attention(self) -> Tensor:
        return self.values["received"].mean(0)


def run(text: str, source: Tokens, step: int = 0) -> Plan | None:
    return decide(edit_of(text), source, clock(step))


SCORE = "    score: attention\n"


def test_one_selection_and_one_operation() -> None:
    source = Tokens(10)
    plan = run(SCORE + "    select: {top_k: {keep: 0.3}}\n    do: drop\n", source)
    assert plan is not None
    assert plan.kept.tolist() == sorted(source.attention.topk(3).indices.tolist())


def test_keeping_everything_asks_for_no_score() -> None:
    source = Tokens(10)
    assert run(SCORE + "    select: {top_k: {keep: 1.0}}\n    do: drop\n", source) is None
    assert set(source.asked) <= {"n", "original", "progress"}
    assert run("    do: withdraw\n", Tokens(0)) is None


def test_only_what_is_read_is_asked_for() -> None:
    source = Tokens(6)
    run(
        "    score: {similarity: {space: keys, layer: 0}}\n    select: {greedy_diverse: {keep: 2}}\n    do: drop\n",
        source,
    )
    assert {"hidden", "embedding", "received"}.isdisjoint(source.asked)
    edit = edit_of(SCORE + "    select: {top_k: {keep: {rank: {scale: 2}}}}\n    do: recycle\n")
    names = {name for name, _ in asked(edit, clock())}
    assert {"received", "attended", "hidden", "noise", "score"} <= names
    assert "rotary_received" not in names


COMBINED = """
    score: attention
    select:
      then:
        keep: $keep
        of:
          - top_k: {keep: {budget: 0.5}}
          - deduplicate: {keep: rest, step: 2, score: {features: {space: hidden}}}
    do: drop
"""


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 20), st.integers(1, 20), st.integers(0, 99))
def test_a_combination_fills_its_budget(n: int, keep: int, seed: int) -> None:
    source = Tokens(n, seed)
    plan = run(COMBINED.replace("$keep", str(keep)), source)
    if keep >= n:
        assert plan is None
        return
    assert plan is not None
    assert plan.kept.shape[0] == keep
    best = source.attention.topk(keep // 2).indices.tolist()
    assert set(best) <= set(plan.kept.tolist())


def test_scores_of_parts_are_their_own_or_the_probes() -> None:
    source = Tokens(12)
    text = """
    score: attention
    select:
      union:
        of:
          - top_k: {keep: 2}
          - top_k: {keep: 2, score: {norm: {p: 1.0}}}
    do: drop
"""
    plan = run(text, source)
    assert plan is not None
    by_norm = source.values["hidden"].abs().sum(1).topk(2).indices.tolist()
    assert plan.kept.tolist() == sorted({*source.attention.topk(2).indices.tolist(), *by_norm})


def test_parts_may_change_over_the_steps() -> None:
    text = SCORE + "    select: {union: {of: [{top_k: {keep: {0%: 4, 50%: 2}}}, {top_k: {keep: 1}}]}}\n    do: drop\n"
    kept = [run(text, Tokens(9), step) for step in (0, 3, 4)]
    assert [p.kept.shape[0] for p in kept if p is not None] == [4, 4, 2]


def test_protected_tokens_stay_and_count() -> None:
    source = Tokens(20)
    plan = run(SCORE + "    select: {top_k: {keep: 8}}\n    do: {drop: {protect: [newline, cls]}}\n", source)
    assert plan is not None
    safe = [0, 4, 9, 14, 19]
    assert set(safe) <= set(plan.kept.tolist())
    rest = [i for i in source.attention.sort(descending=True).indices.tolist() if i not in safe]
    assert plan.kept.tolist() == sorted([*safe, *rest[:3]])
    fewer = run(SCORE + "    select: {top_k: {keep: 2}}\n    do: {drop: {protect: [newline]}}\n", source)
    assert fewer is not None
    assert fewer.kept.tolist() == [4, 9, 14, 19]
    assert run(SCORE + "    select: {top_k: {keep: 20}}\n    do: {drop: {protect: [newline]}}\n", source) is None


def test_matching_knows_protected_tokens_itself() -> None:
    source = Tokens(8)
    text = "    score: features\n    select: {bipartite: {r: 3}}\n    do: {merge: {protect: [cls], carry_size: true}}\n"
    plan = run(text, source)
    assert plan is not None
    assert plan.into is not None
    assert plan.kept.shape[0] == 5
    assert plan.into.tolist().count(int(plan.into[0])) == 1, "nothing joins the class token"


def test_budgets_see_groups_and_scores_inside_them() -> None:
    text = """
    score: {combine: {of: [attention, {similarity: {space: hidden, stat: variance}}], normalise: mean}}
    select: {budget: {keep: 6, groups: {crops: 3}, of: {top_k: {keep: rest, score: attention}}}}
    do: {drop: {order: score}}
"""
    source = Tokens(12)
    plan = run(text, source)
    assert plan is not None
    assert plan.kept.shape[0] == 6
    crop = torch.arange(12) // 4
    for c in range(3):
        inside = plan.kept[crop[plan.kept] == c]
        best = (4 * c + source.attention[crop == c].sort(descending=True).indices).tolist()
        assert inside.tolist() == best[: len(inside)]


def test_dilation_inside_a_combination_counts_towards_it() -> None:
    text = """
    score: attention
    select:
      then:
        keep: 7
        of: [{dilate: {of: {top_k: {keep: 1}}, rows: []}}, {top_k: {keep: rest}}]
    do: drop
"""
    source = Tokens(12)
    plan = run(text, source)
    assert plan is not None
    top = int(source.attention.argmax())
    assert plan.kept.shape[0] == 7
    assert {max(top - 1, 0), top, min(top + 1, 11)} <= set(plan.kept.tolist())


def test_a_learned_threshold_keeps_all_or_nothing() -> None:
    text = "    score: {norm: {p: 2.0}}\n    select: {threshold: {value: -1.0}}\n    do: withdraw\n"
    assert run(text, Tokens(5)) is None
    plan = run(text.replace("-1.0", "99.0"), Tokens(5))
    assert plan is not None
    assert plan.kept.numel() == 0


def test_flops_of_scores_selections_and_operations_are_those_of_torchs_counter() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    texts = [
        "    score: {similarity: {space: hidden}}\n    select: {greedy_diverse: {keep: 3}}\n    do: drop\n",
        "    score: {similarity: {space: keys, heads: full}}\n    select: {greedy_diverse: {keep: 3}}\n    do: drop\n",
        "    score: {features: {space: keys}}\n    select: {bipartite: {r: 3}}\n    do: merge\n",
        SCORE + "    select: {top_k: {keep: 3}}\n    do: {merge: {assign: kept, by: {features: {space: keys}}}}\n",
        SCORE
        + "    select: {top_k: {keep: 3}}\n    do: {merge: {mode: add_weighted, neighbours: 2, append: weighted}}\n",
        SCORE + "    select: {top_k: {keep: 3}}\n    do: {append: {what: weighted}}\n",
        SCORE
        + "    select: {then: {of: [{top_k: {keep: 3}}, {stride: {keep: 2}}]}}\n    do: {merge: {assign: targets}}\n",
    ]
    for text in texts:
        source = Tokens(11)
        with FlopCounterMode(display=False) as counter:
            assert run(text, source) is not None
        assert source.spent == counter.get_total_flops(), text
        assert source.spent > 0


def test_the_score_alone() -> None:
    source = Tokens(7)
    found = score_of(edit_of(SCORE + "    select: {top_k: {keep: 3}}\n    do: drop\n"), source, clock())
    assert found is not None
    assert torch.equal(found, source.attention)


REFUSED = [
    (
        "attention",
        "{union: {of: [{top_k: {keep: 0.1}}, {strid: {keep: 2}}]}}",
        "drop",
        r"x\.yaml:6:\d+: .*select\.union\.of\[1\]: there is no selection `strid`; did you mean `stride`",
    ),
    (
        "attention",
        "{union: {of: [{top_k: {keap: 0.1}}]}}",
        "drop",
        r"x\.yaml:6:36: .*select\.union\.of\[0\]\.top_k\.keap: unknown parameter `keap`.*did you mean `keep`",
    ),
    (
        "attention",
        "{union: {of: [{top_k: {keep: 3.5}}]}}",
        "drop",
        r"x\.yaml:6:42: .*of\[0\]\.top_k\.keep: a share to keep lies between 0 and 1",
    ),
    (
        "attention",
        "{union: {of: []}}",
        "drop",
        r"x\.yaml:6:26: .*select\.union\.of: should be a list of selections, at least one",
    ),
    ("attention", "{union: {of: [{top_k: {}, stride: {}}]}}", "drop", r"of\[0\]: names 2 things"),
    (
        "attention",
        "{then: {of: [{top_k: {keep: 2}}, {deduplicate: {keep: 2}}]}}",
        "drop",
        r"score: the selection `deduplicate` needs vectors to compare tokens by \(such as `features`\), but "
        r"`attention` gives one number per token here",
    ),
    (
        None,
        "{then: {of: [{top_k: {keep: 2, score: {attention: {leyer: 1}}}}]}}",
        "drop",
        r"x\.yaml:5:64: .*of\[0\]\.top_k\.score\.attention\.leyer: unknown parameter",
    ),
    (
        None,
        "{then: {of: [{top_k: {keep: 2, score: {attention: {layer: 1}}}}]}}",
        "drop",
        r"x\.yaml:5:\d+: .*score\.attention\.layer: layer 3 has not run yet when layer 2 does",
    ),
    (
        None,
        "{then: {of: [{top_k: {keep: 2}}]}}",
        "drop",
        r"select\.then\.of\[0\]: the selection `top_k` needs a `score`",
    ),
    ("attention", "{stride: {keep: 2}}", "drop", r"score: the selection `stride` looks at no score; remove `score`"),
    ("features", "{bipartite: {r: 2, keep: 3}}", "merge", "takes one of `r` and `keep`, not both"),
    ("features", "bipartite", "merge", "needs one of `r` and `keep`"),
    (
        "attention",
        "{top_k: {keep: 2}}",
        "merge",
        "select: the operation `merge` needs a selection that says who joins whom",
    ),
    (
        "attention",
        "{top_k: {keep: 2}}",
        "{drop: {order: parts}}",
        "select: the operation `drop` needs a combination of selections",
    ),
    (None, "{stride: {keep: 2}}", "recycle", "do: the operation `recycle` needs a `score` with one number per token"),
    ("attention", "{top_k: {keep: rest}}", "drop", "`rest` speaks of the `keep` of a combination"),
    (
        "{norm: {p: 1.0}}",
        "{top_k: {keep: {rank: {scale: 2}}}}",
        "drop",
        r"select\.top_k\.keep: `rank` is that of attention rows",
    ),
    (None, None, "{skip_layers: {as_keys: true}}", "do: `skip_layers` acts at `layer.input`, not at `layer.after_att"),
    (
        "{attention: {projected: true}}",
        "{top_k: {keep: 2}}",
        "drop",
        r"score\.attention\.projected: `projected` looks at the layer that is about to run",
    ),
    (
        "{attention: {heads: {top: 0}}}",
        "{top_k: {keep: 2}}",
        "drop",
        r"x\.yaml:5:\d+: .*heads: heads must be mean, max, sum",
    ),
]
"""Score, selection and operation of a probe (None: not written), and what is said of them."""


@pytest.mark.parametrize(("score", "select", "do", "words"), REFUSED)
def test_what_does_not_fit_is_refused_with_its_place(
    score: str | None, select: str | None, do: str, words: str
) -> None:
    parts = {"score": score, "select": select, "do": do}
    with pytest.raises(ProbeError, match=words):
        edit_of("".join(f"    {key}: {value}\n" for key, value in parts.items() if value is not None))


def test_reweighting_is_spelled_with_from_and_to() -> None:
    text = "schema: 1\nname: x\nprobes:\n  - at: {site: layer.attention, layers: all}\n"
    do = "    do: {reweight_attention: {from: [answer], to: [visual, newline], factor: 2.0}}\n"
    recipe = parse_recipe(text + do)
    edit = compile_recipe(recipe, FACTS).probes[0].edit
    assert edit is not None
    change = edit.do.entry.function(**edit.do.params(clock()))
    assert (change.source, change.target) == (("answer",), ("visual", "newline"))
    assert "from [answer], to [visual, newline], factor 2.0" in " ".join(explain(recipe, FACTS).split())
    with pytest.raises(ProbeError, match="`answr` is none of the choices; did you mean `answer`"):
        compile_recipe(parse_recipe(text + do.replace("[answer]", "[answr]")), FACTS)


def test_a_recipe_in_words_tells_of_what_is_inside() -> None:
    recipe = parse_recipe(HEAD + COMBINED.lstrip("\n").replace("$keep", "12.5%"))
    said = " ".join(explain(recipe, FACTS, 64).split())
    assert (
        "8 of 64 visual tokens (12.5%), chosen by then [of top_k [keep {budget: 0.5}, round floor], deduplicate" in said
    )
    assert "by features [space hidden]" in said
    assert "on_cache" not in said
