"""Tokens of views under plans: against a plain account with dictionaries, for random plans of every kind."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probe.backbones.base import Features, Views
from probe.backbones.pruned import join, token_boxes
from probe.encoder_state import ViewState, shorten
from probe.errors import ProbeError
from probe.site import Fate, Plan

WIDTH = 3


def views_of(count: int, side: int) -> Views:
    """Views of side x side patches: a base view over the whole picture, tiles side by side below it."""
    box = []
    for v in range(count):
        left, wide = (0.0, 1.0) if v == 0 else ((v - 1) / (count - 1), 1 / (count - 1))
        for y in range(side):
            for x in range(side):
                box.append([left + wide * x / side, y / side, left + wide * (x + 1) / side, (y + 1) / side])
    picture = torch.zeros(count, dtype=torch.int16)
    base = tuple(v == 0 for v in range(count))
    token = torch.arange(count * side * side).view(count, -1)
    return Views(torch.tensor(box).view(count, side * side, 4), picture, base, (0,) * count, token, (token.numel(),))


@dataclass
class Token:
    """One token of the plain account: its number, its value, how many patches it counts for, the patches in it."""

    number: int
    value: list[float]
    size: float
    patches: set[int]


class Account:
    """What `shorten` should do, token by token."""

    def __init__(self, hidden: torch.Tensor) -> None:
        count, patches = hidden.shape[:2]
        self.views = [
            [Token(v * patches + p, hidden[v, p].tolist(), 1.0, {v * patches + p}) for p in range(patches)]
            for v in range(count)
        ]
        self.fate = dict.fromkeys(range(count * patches), Fate.KEPT)
        self.total = count * patches

    def apply(self, view: int, plan: Plan) -> None:
        before = self.views[view]
        target = [before[i] for i in plan.kept.tolist()]
        for _ in range(plan.appended):
            target.append(Token(self.total, [], 1.0, set()))
            self.total += 1
        held: list[set[int]] = [set() for _ in target]
        for i, token in enumerate(before):
            place = target.index(token) if token in target else -1
            if plan.into is not None:
                place = int(plan.into[i])
            if place >= 0:
                held[place] |= token.patches
            if token not in target:
                merged = plan.into is not None and place >= 0
                self.fate[token.number] = plan.fate if plan.into is None or merged else Fate.DROPPED
                if not merged:
                    for patch in token.patches - {token.number}:
                        self.fate[patch] = Fate.DROPPED
        for place, token in enumerate(target):
            token.patches = held[place]
            self.fate[token.number] = Fate.KEPT
            if plan.values is not None:
                token.value = plan.values[place].tolist()
            if plan.size is not None:
                token.size = float(plan.size[place])
        self.views[view] = target


def random_plan(n: int, chance: random.Random) -> Plan | None:
    """A plan over n tokens of one of the kinds that operations make."""
    kind = chance.choice(["none", "drop", "withdraw", "merge", "merge_some", "append"])
    if kind == "none" or n == 0:
        return None
    kept = chance.sample(range(n), chance.randint(1, n))
    if chance.random() < 0.7:
        kept.sort()
    k = len(kept)
    if kind == "withdraw":
        return Plan(torch.empty(0, dtype=torch.int64), Fate.WITHDRAWN)
    if kind == "drop":
        return Plan(torch.tensor(kept), Fate.DROPPED)
    m = 1 if kind == "append" else 0
    into = [
        kept.index(i) if i in kept else (k if m else chance.randrange(-1 if kind == "merge_some" else 0, k))
        for i in range(n)
    ]
    values = torch.randn(k + m, WIDTH)
    size = torch.rand(k + m) * 5 + 1 if chance.random() < 0.5 else None
    return Plan(torch.tensor(kept), Fate.MERGED, torch.tensor(into), values, size, m)


@settings(max_examples=120, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 3), st.integers(0, 1))
def test_any_plans_are_carried_out_as_a_plain_account_has_them(seed: int, count: int, side: int, lead: int) -> None:
    chance = random.Random(seed)
    torch.manual_seed(seed)
    views = views_of(count, side)
    hidden = torch.randn(count, lead + side * side, WIDTH)
    front = hidden[:, :lead].clone()
    state, account = ViewState.fresh(views, "cpu"), Account(hidden[:, lead:])
    for _ in range(chance.randint(1, 4)):
        plans = [random_plan(n, chance) for n in state.counts]
        groups = [(v,) for v in range(count)]
        state, hidden = shorten(state, hidden, groups, plans, lead=lead)
        for v, plan in enumerate(plans):
            if plan is not None:
                account.apply(v, plan)
    left = state.survivors()
    assert torch.equal(hidden[:, :lead], front)
    assert hidden.shape[1] == lead + max(1, *(len(view) for view in account.views))
    for v, tokens in enumerate(account.views):
        assert left.alive[v].tolist() == [t.number for t in tokens]
        assert hidden[v, lead : lead + len(tokens)].flatten().tolist() == pytest.approx(
            [x for t in tokens for x in t.value]
        )
        assert left.size[left.alive[v]].tolist() == pytest.approx([t.size for t in tokens])
        assert all(int(left.view[t.number]) == v for t in tokens)
    held = {patch: t.number for tokens in account.views for t in tokens for patch in t.patches}
    assert left.holder.tolist() == [held.get(p, -1) for p in range(count * side * side)]
    assert left.fate.shape[0] == account.total == left.view.shape[0]
    assert left.fate.tolist() == [int(account.fate[i]) for i in range(account.total)]
    alive = {t.number for tokens in account.views for t in tokens}
    assert {i for i, f in enumerate(left.fate.tolist()) if f == Fate.KEPT} == alive, "kept is alive, and only that"

    own, flat = token_boxes(left), views.box.flatten(0, 1)
    for tokens in account.views:
        for t in tokens:
            if t.patches:
                seen = flat[sorted(t.patches)]
                hull = torch.cat([seen[:, :2].amin(0), seen[:, 2:].amax(0)])
                assert torch.equal(own[t.number], hull)
    assert not own.isnan().any()
    joined = join(Features(hidden[:, lead:], None, left))
    assert joined.index.tolist() == [t.number for tokens in account.views for t in tokens]
    assert joined.tokens[0].flatten().tolist() == pytest.approx(
        [x for tokens in account.views for t in tokens for x in t.value]
    )


def test_sizes_and_padding_are_what_attention_sees() -> None:
    views = views_of(3, 2)
    state = ViewState.fresh(views, "cpu")
    assert state.bias(1, torch.float32) is None
    plans = [
        Plan(
            torch.tensor([1, 3]), Fate.MERGED, torch.tensor([0, 0, 1, 1]), torch.zeros(2, 2), torch.tensor([3.0, 1.0])
        ),
        None,
        Plan(torch.empty(0, dtype=torch.int64), Fate.WITHDRAWN),
    ]
    state, hidden = shorten(state, torch.zeros(3, 5, 2), [(0,), (1,), (2,)], plans, lead=1)
    least = torch.finfo(torch.float32).min
    assert hidden.shape == (3, 5, 2)
    wanted = [[0, math.log(3), 0, least, least], [0, 0, 0, 0, 0], [0, least, least, least, least]]
    bias = state.bias(1, torch.float32)
    assert bias is not None
    torch.testing.assert_close(bias[:, 0, 0], torch.tensor(wanted))
    assert torch.equal(state.bias(1, torch.float64) == torch.finfo(torch.float64).min, bias == least)


def test_one_plan_over_several_views_keeps_each_view_its_own() -> None:
    views = views_of(3, 2)
    state, hidden = ViewState.fresh(views, "cpu"), torch.arange(12.0).view(3, 4, 1)
    plan = Plan(torch.tensor([1, 4, 6, 7]))  # over views 0 and 2: tokens 1 of view 0, 0, 2 and 3 of view 2
    state, hidden = shorten(state, hidden, [(0, 2)], [plan])
    assert state.counts == (1, 4, 3)
    assert [a.tolist() for a in state.alive] == [[1], [4, 5, 6, 7], [8, 10, 11]]
    assert hidden[:, :, 0].tolist() == [[1, 0, 0, 0], [4, 5, 6, 7], [8, 10, 11, 0]]


def test_what_a_plan_may_not_say() -> None:
    state, hidden = ViewState.fresh(views_of(2, 1), "cpu"), torch.zeros(2, 1, 1)
    with pytest.raises(ProbeError, match="one view only"):
        shorten(state, hidden, [(0, 1)], [Plan(torch.tensor([0]), appended=1, values=torch.zeros(2, 1))])
    with pytest.raises(ProbeError, match="does not say what they are"):
        shorten(state, hidden, [(0,)], [Plan(torch.tensor([0]), appended=1)])
