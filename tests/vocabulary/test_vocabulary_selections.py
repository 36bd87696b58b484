"""Selections against brute force on Python lists."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from probe.errors import ProbeError
from probe.selections import (
    bipartite,
    budget,
    cluster,
    deduplicate,
    dilate,
    greedy_diverse,
    merges_per_layer,
    pivots,
    ranked,
    stride,
    then,
    threshold,
    top_k,
    union,
    window,
)
from probe.selections.combinations import Groups, group_of
from probe.selections.pivots import pivot_turns
from probe.selections.plain import ByOutliers, Fence
from probe.site import Choice

seeds = st.integers(0, 999)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def well_formed(kept: Tensor, n: int) -> None:
    assert kept.dtype == torch.int64
    assert kept.unique().shape[0] == kept.shape[0]
    assert ((kept >= 0) & (kept < n)).all()


# --- one number per token --------------------------------------------------------------------------------------------


@given(st.lists(st.one_of(st.floats(-3, 3, width=32), st.just(float("nan"))), max_size=20), st.integers(0, 25))
def test_top_k_is_sorting(values: list[float], count: int) -> None:
    order = sorted(
        range(len(values)), key=lambda i: (values[i] != values[i], -values[i] if values[i] == values[i] else 0)
    )
    assert top_k(torch.tensor(values), count, keep=count).tolist() == order[:count]


@given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=20), st.booleans())
def test_threshold_keeps_what_is_above(values: list[float], inclusive: bool) -> None:
    score = torch.tensor(values)
    for value in (0.5, "mean", Fence(1.5)):
        kept = threshold(score, value=value, inclusive=inclusive)
        well_formed(kept, len(values))
        gone = [i for i in range(len(values)) if i not in kept.tolist()]
        if kept.numel() and gone:
            assert min(values[i] for i in kept.tolist()) >= max(values[i] for i in gone)
        if value == 0.5:
            assert sorted(kept.tolist()) == [i for i, v in enumerate(values) if v > 0.5 or (inclusive and v == 0.5)]


def stride_of(n: int, count: int | None, **options: Any) -> list[int]:
    here = torch.arange(n)
    return stride(n, count, n, here, **({"keep": count} | options)).tolist()


@given(st.integers(1, 200), st.integers(1, 200))
def test_a_stride_of_a_number_is_even(n: int, count: int) -> None:
    kept = stride_of(n, min(count, n))
    assert len(kept) == min(count, n)
    assert kept == [i * max(1, n // min(count, n)) for i in range(len(kept))]


def test_strides_by_step_and_by_outliers() -> None:
    assert stride_of(10, None, step=3) == [0, 3, 6, 9]
    assert stride_of(10, None, step=3, leave_last=True) == [0, 3, 6]
    score = torch.zeros(36)
    score[:3] = 9.0  # a twelfth are outliers: a step of int(12 / 3)
    here = torch.arange(36)
    assert stride(36, None, 36, here, None, score, step=ByOutliers(1.5, 3)).tolist() == list(range(0, 36, 4))
    with pytest.raises(ProbeError, match="no step of at least 1"):
        stride(36, None, 36, here, None, torch.ones(36), step=ByOutliers(1.5, 3))


def test_a_stride_over_all_tokens_keeps_what_is_left() -> None:
    candidate = torch.tensor([0, 1, 3, 5, 6, 7, 9])  # of ten; a budget of five makes a step of two: 0 2 4 6 8
    assert candidate[stride(7, 3, 10, candidate, 5, keep="rest", over="all")].tolist() == [0, 6]


# --- diversity -------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), seeds, st.sampled_from(["max_min", "max_sum"]), st.data())
def test_greedy_diversity_by_brute_force(n: int, seed: int, objective: str, data: st.DataObject) -> None:
    x = noise(n, 3, seed=seed)
    pairs = torch.nn.functional.normalize(x, dim=-1)
    pairs = pairs @ pairs.T
    count, first = data.draw(st.integers(1, n)), data.draw(st.integers(0, n - 1))
    kept = greedy_diverse(
        pairs, count, generator(), keep=count, start="given", first=first, objective=objective
    ).tolist()
    assert kept[0] == first
    for step in range(1, count):
        worth = {}
        for j in (j for j in range(n) if j not in kept[:step]):
            apart = [1 - float(pairs[i, j]) for i in kept[:step]]
            worth[j] = min(apart) if objective == "max_min" else sum(apart)
        assert worth[kept[step]] >= max(worth.values()) - 1e-5


def test_starts() -> None:
    pairs = torch.tensor([[1, 0.9, 0.2, 0.1], [0.9, 1, 0.3, 0.2], [0.2, 0.3, 1, 0.8], [0.1, 0.2, 0.8, 1]])
    assert greedy_diverse(pairs, 1, generator(), keep=1).tolist() == [2]  # its nearest is 0.8 away, the first of two
    score = torch.tensor([0.0, 2, 1, 0])
    assert greedy_diverse(pairs, 2, generator(), score, keep=2, start="top_score").tolist() == [1, 3]
    drawn = {greedy_diverse(pairs, 1, generator(s), keep=1, start="random").item() for s in range(40)}
    assert drawn == {0, 1, 2, 3}
    with pytest.raises(ProbeError, match="needs `first`"):
        greedy_diverse(pairs, 2, generator(), keep=2, start="given")


# --- matching --------------------------------------------------------------------------------------------------------


def match(x: Tensor, r: int, protected: list[int] = (), rounds: str = "one") -> Choice:  # type: ignore[assignment]
    spared = torch.zeros(x.shape[0], dtype=torch.bool)
    spared[list(protected)] = True
    return bipartite(x, None, spared, torch.ones(x.shape[0]), r=r, rounds=rounds)  # type: ignore[return-value, arg-type]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(0, 8), seeds, st.data())
def test_matching_by_brute_force(n: int, r: int, seed: int, data: st.DataObject) -> None:
    x = noise(n, 3, seed=seed)
    spared = data.draw(st.lists(st.integers(0, n - 1), unique=True, max_size=2))
    choice = match(x, r, spared)
    assert choice.into is not None
    well_formed(choice.kept, n)
    into = choice.into.tolist()
    free_a = [i for i in range(0, n, 2) if i not in spared]
    free_b = [i for i in range(1, n, 2) if i not in spared]
    count = min(r, (n - len(spared)) // 2, len(free_a) if free_b else 0)
    merged = [i for i in range(n) if into[i] != i]
    assert len(merged) == count
    assert sorted(choice.kept.tolist()) == [i for i in range(n) if i not in merged]
    best = {a: max(float(torch.cosine_similarity(x[a], x[b], 0)) for b in free_b) for a in free_a} if free_b else {}
    for a in merged:
        assert a in free_a
        assert into[a] in free_b
        assert float(torch.cosine_similarity(x[a], x[into[a]], 0)) >= best[a] - 1e-5
    left = [best[a] for a in free_a if a not in merged and a in best]
    assert not merged or not left or min(best[a] for a in merged) >= max(left) - 1e-5
    assert [i for i in choice.kept.tolist() if i % 2] == list(range(1, n, 2))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(0, 25), seeds)
def test_rounds_go_on_until_as_many_are_gone(n: int, r: int, seed: int) -> None:
    choice = match(noise(n, 3, seed=seed), r, rounds="until")
    assert choice.into is not None
    assert choice.kept.shape[0] == max(n - r, min(n, 2))  # two remain at least: (n - 1) // 2 leaves them alone
    assert choice.kept.tolist() == sorted(choice.kept.tolist())
    assert set(choice.into.tolist()) == set(choice.kept.tolist())
    assert (choice.into[choice.kept] == choice.kept).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 20), st.integers(1, 10), seeds, st.sampled_from(["one", "until"]))
def test_spared_tokens_are_merged_last(n: int, r: int, seed: int, rounds: str) -> None:
    """FOLDER's turbo variant: in the first round weights are those of the matches, less what is spared."""
    x, value = noise(n, 3, seed=seed), noise(n, seed=seed + 1)
    r = min(r, (n - 1) // 2)  # one round
    protected, ones = torch.zeros(n, dtype=torch.bool), torch.ones(n)
    choice = bipartite(x, None, protected, ones, r=r, rounds=rounds, spare=lambda: value, strength=2.0)  # type: ignore[arg-type]
    assert choice.into is not None
    merged = [i for i in range(n) if choice.into[i] != i]
    assert len(merged) == r
    weight = {
        a: max(float(torch.cosine_similarity(x[a], x[b], 0)) for b in range(1, n, 2)) - 2 * float(value[a])
        for a in range(0, n, 2)
    }
    left = [w for a, w in weight.items() if a not in merged]
    assert not merged or not left or min(weight[a] for a in merged) >= max(left) - 1e-5
    plain = bipartite(x, None, protected, ones, r=r, rounds=rounds)  # type: ignore[arg-type]
    none = bipartite(x, None, protected, ones, r=r, rounds=rounds, spare=lambda: value, strength=0.0)  # type: ignore[arg-type]
    assert torch.equal(plain.kept, none.kept)


def test_later_rounds_spare_by_the_mean_of_what_was_merged() -> None:
    """Six tokens, alike but for a hair; 2 joins in the first round, and its partner's share then counts its own."""
    x = torch.tensor([[1.0, 0.3], [1.0, 0.0], [1.0, 0.0], [1.0, 0.02], [1.0, -0.4], [1.0, 0.5]])
    value, protected, ones = torch.zeros(6), torch.zeros(6, dtype=torch.bool), torch.ones(6)
    value[2] = -3.0
    choice = bipartite(x, None, protected, ones, r=3, rounds="until", spare=lambda: value, strength=1.0)
    assert choice.into is not None
    first = bipartite(x, None, protected, ones, r=2, rounds="until", spare=lambda: value, strength=1.0)
    assert first.into is not None
    held = [[i for i in range(6) if int(first.into[i]) == k] for k in first.kept.tolist()]
    means = torch.stack([x[group].mean(0) for group in held])
    spared = torch.stack([value[group].mean() for group in held])
    weight = {
        a: max(float(torch.cosine_similarity(means[a], means[b], 0)) for b in range(1, len(held), 2)) - float(spared[a])
        for a in range(0, len(held), 2)
    }
    gone = first.kept.tolist()[max(weight, key=lambda a: weight[a])]
    assert set(first.kept.tolist()) - set(choice.kept.tolist()) == {gone}


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 14), st.integers(0, 14), seeds)
def test_every_token_goes_to_the_nearest_centre(n: int, count: int, seed: int) -> None:
    x, count = noise(n, 3, seed=seed), min(count, n)
    choice = cluster(x, count, generator(seed), keep=count)
    well_formed(choice.kept, n)
    assert choice.kept.shape[0] == count
    centers = choice.kept.tolist()
    for i in range(n if count else 0):
        assert choice.into is not None
        apart = {c: float((x[i] - x[c]).norm()) for c in centers}
        assert int(choice.into[i]) == i if i in centers else apart[int(choice.into[i])] <= min(apart.values()) + 1e-5


def test_two_heaps_are_two_clusters() -> None:
    x = torch.cat([noise(6, 3, seed=1) * 0.3 + 5, noise(5, 3, seed=2) * 0.3])
    choice = cluster(x, 2, generator(1), keep=2)
    assert choice.into is not None
    assert choice.into[:6].unique().shape[0] == choice.into[6:].unique().shape[0] == 1
    assert choice.into[0] != choice.into[-1]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 24), st.integers(1, 24), st.integers(1, 8), seeds)
def test_doubles_go_first(n: int, count: int, step: int, seed: int) -> None:
    x, score = noise(n, 4, seed=seed), noise(n, seed=seed + 1)
    kept = deduplicate(x, score, min(count, n), keep=count, step=step)
    well_formed(kept, n)
    assert kept.shape[0] == min(count, n)


def test_a_double_is_taken_before_anything_else() -> None:
    x = torch.eye(6)
    x[4] = x[1]  # the only pair that is alike
    falling = torch.arange(6, 0, -1).float()
    assert sorted(deduplicate(x, falling, 5, keep=5).tolist()) == [0, 1, 2, 3, 5]


@pytest.mark.parametrize(
    ("r", "layers", "inflection", "expected"),
    [
        (4, 3, False, [4, 4, 4]),
        ([4, 2], 4, False, [4, 2, 0, 0]),
        ((4, 0.0), 3, True, [4, 4, 4]),
        ((4, -1.0), 5, True, [8, 6, 4, 2, 0]),
        ((4, 1.0), 5, True, [0, 2, 4, 6, 8]),
    ],
)
def test_merging_schedules(r: Any, layers: int, inflection: bool, expected: list[int]) -> None:
    assert merges_per_layer(r, layers, inflection=inflection) == expected


# --- pivots ----------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 6), seeds, st.sampled_from(["score", "raster", "hash"]), st.integers(0, 12))
def test_pivots_by_brute_force(n: int, t: int, seed: int, order: Any, count: int) -> None:
    x, text = noise(n, 3, seed=seed), noise(t, 3, seed=seed + 1)
    score, spoken = noise(n, seed=seed + 2), noise(t, seed=seed + 3)
    row, text_row = torch.arange(n) + 2, torch.arange(t) + 2 + n
    kept = pivots(score, spoken, x, text, row, text_row, count, keep=count, image=2, text=2, order=order)
    well_formed(kept, n)
    chosen = ranked(score)[:2].tolist()
    rows = [*(i + 2 for i in chosen), *(j + 2 + n for j in ranked(spoken)[:2].tolist())]
    states = torch.cat([torch.zeros(2, 3), x, text])
    free, expected = [i for i in range(n) if i not in chosen], set(chosen)
    for turn in pivot_turns(rows, order):
        pivot = states[rows[turn]]
        near = sorted(free, key=lambda i: (float(torch.cosine_similarity(x[i], pivot, 0)), i))[: count // 4]
        expected |= set(near)
        free = [i for i in free if i not in near]
    assert set(kept.tolist()) == expected


def test_turns() -> None:
    rows = [40, 3, 33, 7]
    assert [rows[i] for i in pivot_turns(rows, "raster")] == [3, 7, 33, 40]
    assert [rows[i] for i in pivot_turns(rows, "hash")] == list(set(rows))


# --- combinations ----------------------------------------------------------------------------------------------------


def picker(score: Tensor, count: int | None = None) -> Any:
    """The best of the candidates: so many, or as many as are left."""

    def pick(candidates: Tensor, *, budget: int | None, left: int | None) -> Tensor:
        k = count if count is not None else left
        return candidates[ranked(score[candidates])][:k]

    return pick


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 15), st.integers(0, 8), st.integers(0, 8), seeds)
def test_union_and_then(n: int, first: int, second: int, seed: int) -> None:
    a, b = noise(n, seed=seed), noise(n, seed=seed + 1)
    of = (picker(a, first), picker(b, second))
    best_a, best_b = ranked(a)[:first].tolist(), ranked(b)[:second].tolist()
    both = union(n, None, of=of)
    assert both.kept.tolist() == best_a + [i for i in best_b if i not in best_a]
    assert both.part is not None
    assert both.part.tolist() == [0] * len(best_a) + [1] * (len(both.kept) - len(best_a))
    after = then(n, None, of=of)
    rest = [i for i in ranked(b).tolist() if i not in best_a]
    assert after.kept.tolist() == best_a + rest[:second]
    assert (after.parts, both.parts) == (2, 2)
    total = min(first + second, n)
    filled = then(n, total, of=(picker(a, first), picker(b)), keep=total)
    assert filled.kept.shape[0] == total


@given(st.integers(1, 60), st.integers(1, 9), st.lists(st.integers(0, 59), unique=True, max_size=6))
def test_dilation(n: int, columns: int, core: list[int]) -> None:
    core = [i for i in core if i < n]
    kept = dilate(n, columns, of=lambda candidates, *, budget, left: torch.tensor(core, dtype=torch.int64))
    around = [min(max(i + s, 0), n - 1) for i in core for s in (-1, 1, -columns, columns)]
    assert set(kept.tolist()) == set(core) | set(around)
    assert kept.tolist()[: len(core)] == core
    well_formed(kept, n)


@given(st.integers(1, 50), st.integers(1, 12))
def test_crops_are_runs_of_nearly_equal_length(n: int, crops: int) -> None:
    group = group_of(Groups("crops", crops), n).tolist()
    assert group == sorted(group)
    sizes = [group.count(g) for g in range(crops)]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4))
def test_windows_are_squares(rows: int, columns: int, side: int) -> None:
    group = group_of(Groups("window", side), rows * columns, columns=columns)
    seen: dict[int, set[tuple[int, int]]] = {}
    for (r, c), g in zip(itertools.product(range(rows), range(columns)), group.tolist(), strict=True):
        seen.setdefault(g, set()).add((r // side, c // side))
    assert all(len(squares) == 1 for squares in seen.values())
    assert len(seen) == -(-rows // side) * -(-columns // side)
    assert group_of(Groups("view"), 3, torch.tensor([4, 0, 4])).tolist() == [1, 0, 1]


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4))
def test_pooling_windows(rows: int, columns: int, side: int) -> None:
    choice = window(rows * columns, columns, side=side)
    corner = {i: i // columns // side * side * columns + i % columns // side * side for i in range(rows * columns)}
    assert choice.into is not None
    assert choice.into.tolist() == list(corner.values())
    assert choice.kept.tolist() == sorted(set(corner.values()))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 6), st.data())
def test_proportional_budgets_add_up(n: int, crops: int, data: st.DataObject) -> None:
    score = torch.tensor(data.draw(st.lists(st.floats(0.125, 4, width=32), min_size=n, max_size=n)))
    count = data.draw(st.integers(0, n))
    group = group_of(Groups("crops", crops), n)
    kept = budget(n, count, group, score, keep=count, of=picker(score), groups=Groups("crops", crops))
    well_formed(kept, n)
    means = [float(score[group == g].mean()) if (group == g).any() else 0.0 for g in range(int(group.max()) + 1)]
    for g, mean in enumerate(means):
        size, got = int((group == g).sum()), int((group[kept] == g).sum())
        share = mean / sum(means) * count
        assert got in {min(int(share + e) + more, size) for e in (-1e-4, 1e-4) for more in (0, 1)}
    if all(int((group == g).sum()) >= count for g in range(len(means))):
        assert kept.shape[0] == count


def test_softmax_budgets() -> None:
    """Three views of ten tokens; the base view keeps its share, the others by the softmax of their sums."""
    view = torch.arange(3).repeat_interleave(10)
    score = torch.cat([torch.ones(10), torch.full((10,), 2.0), torch.full((10,), 1.0)])
    options: dict[str, Any] = {"shares": "softmax", "temperature": 10.0, "groups": Groups("view")}
    kept = budget(30, 15, view, score, keep=0.5, of=picker(score), **options)
    p = torch.tensor([2.0, 1.0]).softmax(0)
    wanted = [5, *(int(10 * 0.5 * (1 + x - 0.5)) for x in p.tolist())]
    assert [(view[kept] == v).sum().item() for v in range(3)] == wanted
