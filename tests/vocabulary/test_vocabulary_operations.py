"""Operations against brute force: every plan accounts for every token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from probe import operations, selections
from probe.operations.options import Ordering
from probe.site import Fate, Plan

seeds = st.integers(0, 999)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def kept_of(draw: st.DrawFn, most: int = 10) -> tuple[int, Tensor]:
    """Some of n tokens, in any order."""
    n = draw(st.integers(1, most))
    chosen = draw(st.lists(st.integers(0, n - 1), unique=True, max_size=n))
    return n, torch.tensor(chosen, dtype=torch.int64)


def accounts(plan: Plan, n: int, kept: Tensor) -> None:
    """The plan keeps what was chosen, says where everyone went, and its shapes agree."""
    k, m = plan.kept.shape[0], plan.appended
    assert sorted(plan.kept.tolist()) == sorted(kept.tolist())
    assert plan.into is not None
    assert plan.values is not None
    assert plan.into.shape == (n,)
    assert plan.values.shape[0] == k + m
    assert plan.into[plan.kept].tolist() == list(range(k))
    assert ((plan.into >= -1) & (plan.into < k + m)).all()
    gone = [j for j in range(n) if j not in kept.tolist()]
    if plan.size is not None:
        assert plan.size.shape == (k + m,)
        behind = [sum(1 for j in range(n) if plan.into[j] == p) for p in range(k + m)]
        assert plan.size.tolist() == [float(b) for b in behind]
        assert float(plan.size.sum()) == n - sum(1 for j in gone if plan.into[j] < 0)
    for place in range(k, k + m):
        assert (plan.into == place).any(), "an appended token stands for someone"


@given(kept_of(), st.data())
def test_orders(chosen: tuple[int, Tensor], data: st.DataObject) -> None:
    _, kept = chosen
    part = torch.tensor(
        data.draw(st.lists(st.integers(-1, 2), min_size=len(kept), max_size=len(kept))), dtype=torch.int64
    )
    order = lambda o: operations.drop(kept, part if o == "parts" else None, order=o).kept.tolist()  # noqa: E731
    assert order("raster") == sorted(kept.tolist())
    assert order("score") == order("unmerged_first") == kept.tolist()
    by_part = sorted(zip(part.tolist(), kept.tolist(), strict=True))
    assert order("parts") == [i for _, i in by_part]


def test_operations_without_new_states() -> None:
    kept, empty = torch.tensor([3, 1]), torch.empty(0, dtype=torch.int64)
    assert operations.drop(kept, None).fate is Fate.DROPPED
    assert operations.withdraw(empty).fate is Fate.WITHDRAWN
    assert operations.mask(kept).kept.tolist() == [1, 3]
    assert operations.mask(kept).fate is Fate.MASKED
    assert operations.skip_layers(empty, as_keys=True).fate is Fate.SKIPPED
    change = operations.reweight_attention(from_=("answer",), to=("visual",), factor=2.0)
    assert (change.source, change.target, change.factor) == (("answer",), ("visual",), 2.0)


@settings(max_examples=60, deadline=None)
@given(
    kept_of(),
    seeds,
    st.sampled_from(["mean", "size_mean", "add_mean", "add_weighted"]),
    st.sampled_from(["raster", "score"]),
)
def test_merging_into_the_most_similar_kept(chosen: tuple[int, Tensor], seed: int, mode: Any, order: Ordering) -> None:
    n, kept = chosen
    x, score = noise(n, 3, seed=seed), noise(n, seed=seed + 1).abs()
    size = torch.randint(1, 4, (n,), generator=torch.Generator().manual_seed(seed)).float()
    plan = operations.merge(kept, None, None, 0, x, size, score, assign="kept", mode=mode, order=order)
    assert plan.values is not None
    assert plan.into is not None
    stand = plan.kept.tolist()
    joined: dict[int, list[int]] = {i: [] for i in stand}
    for j in (j for j in range(n) if j not in stand):
        if stand:
            alike = [float(torch.cosine_similarity(x[j], x[i], 0)) for i in stand]
            best = stand[int(plan.into[j])]
            assert alike[stand.index(best)] >= max(alike) - 1e-5
            joined[best].append(j)
        else:
            assert plan.into[j] == -1
    for place, i in enumerate(stand):
        members = joined[i]
        everyone = [i, *members]
        if mode == "mean":
            expected = x[everyone].mean(0)
        elif mode == "size_mean":
            expected = (x[everyone] * size[everyone, None]).sum(0) / size[everyone].sum()
        elif mode == "add_mean":
            expected = x[i] + (x[members].mean(0) if members else 0)
        else:
            expected = x[i] + (x[members] * score[members, None]).sum(0)
        torch.testing.assert_close(plan.values[place], expected, atol=1e-5, rtol=1e-4)


@settings(max_examples=60, deadline=None)
@given(kept_of(), seeds, st.integers(0, 4), st.sampled_from(["none", "mean", "weighted"]))
def test_neighbours_add_to_kept_tokens(chosen: tuple[int, Tensor], seed: int, neighbours: int, append: Any) -> None:
    n, kept = chosen
    x, score = noise(n, 3, seed=seed), noise(n, seed=seed + 1).abs()
    plan = operations.merge(
        kept, None, None, 0, x, torch.ones(n), score, mode="add_weighted", neighbours=neighbours, append=append
    )
    assert plan.values is not None
    for place, i in enumerate(plan.kept.tolist()):
        near = sorted((j for j in range(n) if j != i), key=lambda j: -float(torch.cosine_similarity(x[i], x[j], 0)))
        expected = x[i] + sum((score[j] * x[j] for j in near[:neighbours]), torch.zeros(3))
        torch.testing.assert_close(plan.values[place], expected, atol=1e-5, rtol=1e-4)
    gone = [j for j in range(n) if j not in kept.tolist()]
    if append == "weighted" and gone:
        torch.testing.assert_close(
            plan.values[-1], sum((score[j] * x[j] for j in gone), torch.zeros(3)), atol=1e-5, rtol=1e-4
        )
    assert plan.appended == (append != "none" and bool(gone))


@settings(max_examples=60, deadline=None)
@given(kept_of(), seeds, st.booleans())
def test_what_was_matched_is_merged_and_sizes_are_carried(chosen: tuple[int, Tensor], seed: int, scaled: bool) -> None:
    n, kept = chosen
    x = noise(n, 3, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    into = torch.full((n,), -1)
    into[kept] = kept
    for j in (j for j in range(n) if j not in kept.tolist()):
        if kept.numel() and torch.rand(1, generator=draw) < 0.7:
            into[j] = kept[int(torch.randint(kept.shape[0], (1,), generator=draw))]
    scale: Any = "log_size" if scaled else "none"
    plan = operations.merge(kept, into, None, 0, x, torch.ones(n), carry_size=True, scale=scale)
    accounts(plan, n, kept)
    assert plan.values is not None
    assert plan.into is not None
    for place, i in enumerate(plan.kept.tolist()):
        members = [j for j in range(n) if into[j] == i]
        factor = 1 + torch.tensor(float(len(members))).log() if scaled else 1
        torch.testing.assert_close(plan.values[place], x[members].mean(0) * factor, atol=1e-5, rtol=1e-4)
    back = operations.unmerge(plan.values, plan.into)
    seen = operations.sources(plan.into, plan.values.shape[0])
    for j in range(n):
        if into[j] < 0:
            assert (back[j] == 0).all()
            assert not seen[:, j].any()
        else:
            assert torch.equal(back[j], plan.values[plan.into[j]])
            assert seen[:, j].nonzero().flatten().tolist() == [int(plan.into[j])]


def test_contextual_tokens_are_joined_and_dominant_ones_left_alone() -> None:
    x = torch.tensor([[1.0, 0], [0, 1], [0.9, 0.1], [0.2, 1]])
    kept, part = torch.tensor([0, 2, 1]), torch.tensor([0, 1, 1])
    plan = operations.merge(
        kept, None, part, 2, x, torch.ones(4), assign="targets", mode="add_mean", order="parts", carry_size=True
    )
    assert plan.kept.tolist() == [0, 1, 2]
    assert plan.into is not None
    assert plan.values is not None
    assert plan.into.tolist() == [0, 1, 2, 1]
    torch.testing.assert_close(plan.values, torch.stack([x[0], x[1] + x[3], x[2]]))
    assert plan.size is not None
    assert plan.size.tolist() == [1, 2, 1]
    alone = operations.merge(kept[:1], None, part[:1], 2, x, torch.ones(4), assign="targets")
    assert alone.into is not None
    assert alone.into.tolist() == [0, -1, -1, -1], "the last part chose nobody: nobody is joined"


@settings(max_examples=60, deadline=None)
@given(kept_of(), seeds, st.sampled_from(["mean", "weighted"]))
def test_one_token_stands_for_the_dropped(chosen: tuple[int, Tensor], seed: int, what: Any) -> None:
    n, kept = chosen
    x, score = noise(n, 3, seed=seed), noise(n, seed=seed + 1)
    plan = operations.append(kept, None, x, torch.ones(n), score, what=what, carry_size=True)
    accounts(plan, n, kept)
    assert plan.values is not None
    gone = [j for j in range(n) if j not in kept.tolist()]
    assert plan.appended == bool(gone)
    assert torch.equal(plan.values[: kept.shape[0]], x[plan.kept])
    if gone:
        expected = x[gone].mean(0) if what == "mean" else (score[gone, None] * x[gone]).sum(0)
        torch.testing.assert_close(plan.values[-1], expected, atol=1e-5, rtol=1e-4)


@settings(max_examples=60, deadline=None)
@given(kept_of(40), seeds, st.floats(0, 1), st.integers(1, 12))
def test_recycling(chosen: tuple[int, Tensor], seed: int, share: float, divisor: int) -> None:
    n, kept = chosen
    x, score = noise(n, 3, seed=seed), noise(n, seed=seed + 1)
    draw = torch.Generator().manual_seed(seed)
    plan = operations.recycle(
        kept,
        None,
        x,
        torch.ones(n),
        score,
        lambda m: torch.rand(m, generator=draw),
        share=share,
        divisor=divisor,
        carry_size=True,
    )
    accounts(plan, n, kept)
    gone = [j for j in range(n) if j not in kept.tolist()]
    if not gone:
        assert plan.appended == 0
        return
    m = min(int(share * len(gone)) + 1, len(gone))
    assert plan.appended == min(int(m / divisor) + 1, m)
    assert plan.into is not None
    assert plan.values is not None
    back = [j for j in gone if plan.into[j] >= 0]
    assert len(back) == m
    assert not [j for j in gone if j not in back] or min(score[back]) >= max(score[[j for j in gone if j not in back]])
    for place in range(kept.shape[0], plan.values.shape[0]):
        members = [j for j in gone if plan.into[j] == place]
        torch.testing.assert_close(plan.values[place], x[members].mean(0), atol=1e-4, rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 4), seeds)
def test_clusters_by_brute_force(m: int, count: int, seed: int) -> None:
    count = min(count, m)
    x = noise(m, 3, seed=seed)
    draw = torch.rand(m, generator=torch.Generator().manual_seed(seed))
    found = selections.clusters(x, count, draw)
    apart = [[float((x[i] - x[j]).norm()) / 3**0.5 for j in range(m)] for i in range(m)]
    near = [sorted(row)[:count] for row in apart]
    density = [
        float(torch.tensor(-sum(d * d for d in row) / len(row)).exp()) + 1e-6 * float(draw[i])
        for i, row in enumerate(near)
    ]
    torch.testing.assert_close(found.density, torch.tensor(density), atol=1e-5, rtol=1e-4)
    farthest = max(max(row) for row in apart)
    peak = []
    for i in range(m):
        denser = [apart[i][j] for j in range(m) if found.density[j] > found.density[i]]
        peak.append(min(denser, default=farthest) * float(found.density[i]))
    torch.testing.assert_close(found.peak, torch.tensor(peak), atol=1e-4, rtol=1e-3)
    centers = found.centers.tolist()
    assert len(set(centers)) == count
    for i in range(m):
        to = [apart[c][i] for c in centers]
        if i not in centers:
            assert to[int(found.assignment[i])] <= min(to) + 1e-5
        else:
            assert centers[int(found.assignment[i])] == i


def test_states_keep_their_dtype() -> None:
    x = noise(6, 4).bfloat16()
    kept, ones = torch.tensor([0, 3]), torch.ones(6)
    for plan in (
        operations.merge(kept, None, None, 0, x, ones, assign="kept"),
        operations.append(kept, None, x, ones),
        operations.recycle(kept, None, x, ones, noise(6), torch.zeros),
    ):
        assert plan.values is not None
        assert plan.values.dtype == torch.bfloat16


def test_a_weighted_sum_needs_weights() -> None:
    with pytest.raises(AssertionError):
        operations.append(torch.tensor([0]), None, noise(3, 2), torch.ones(3), None, what="weighted")
