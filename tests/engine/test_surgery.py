"""Surgery against brute force on Python lists."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probe.site import Fate, Plan, Role
from probe.surgery import Layout, hide, make_layout, narrow, put_values, replan, restore, take


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Batches of sequences with visual tokens anywhere."""
    roles, visuals = [], []
    for _ in range(draw(st.integers(1, 3))):
        kinds = draw(
            st.lists(st.sampled_from([Role.SYSTEM, Role.VISUAL, Role.NEWLINE, Role.QUESTION]), min_size=1, max_size=12)
        )
        seen, visual = 0, []
        for kind in kinds:
            is_visual = kind in (Role.VISUAL, Role.NEWLINE)
            visual.append(seen if is_visual else -1)
            seen += is_visual
        roles.append(torch.tensor([int(k) for k in kinds], dtype=torch.int8))
        visuals.append(torch.tensor(visual))
    return make_layout(roles, visuals, "cpu")


def choose(data: st.DataObject, layout: Layout) -> list[Plan | None]:
    plans: list[Plan | None] = []
    for n in layout.n_visual:
        if data.draw(st.booleans()):
            kept = data.draw(st.lists(st.integers(0, max(n - 1, 0)), unique=True, max_size=n)) if n else []
            plans.append(Plan(torch.tensor(kept, dtype=torch.int64)))
        else:
            plans.append(None)
    return plans


def real(layout: Layout, b: int, values: torch.Tensor) -> list[int]:
    return values[b, : layout.length[b]].tolist()


@settings(max_examples=150, deadline=None)
@given(layouts(), st.data())
def test_narrow_keeps_every_other_row_and_its_position(layout: Layout, data: st.DataObject) -> None:
    plans = raster(choose(data, layout))
    new, index = narrow(layout, plans)
    for b, plan in enumerate(plans):
        alive = layout.visual_rows[b].tolist()
        gone = set() if plan is None else set(alive) - {alive[i] for i in plan.kept.tolist()}
        expected = [r for r in range(layout.length[b]) if r not in gone]
        assert index[b, : new.length[b]].tolist() == expected
        assert real(new, b, new.row) == expected
        assert real(new, b, new.position) == expected  # a fresh canvas: position == row
        assert [r for r in range(new.width) if new.visual[b, r] >= 0] == new.visual_rows[b].tolist()
        assert (new.row[b, new.length[b] :] == -1).all()
        rest = [r for r in expected if r not in alive]
        if rest:
            padded = torch.tensor([rest] * layout.batch)
            assert new.row[b][new.locate(padded)[b]].tolist() == rest


def raster(plans: list[Plan | None]) -> list[Plan | None]:
    """The same tokens, standing as they stood."""
    return [None if p is None else Plan(p.kept.sort().values, p.fate) for p in plans]


@settings(max_examples=80, deadline=None)
@given(layouts(), st.data())
def test_score_order_permutes_only_the_visual_rows(layout: Layout, data: st.DataObject) -> None:
    plans = choose(data, layout)
    new, _ = narrow(layout, plans, positions="compact")
    standing, _ = narrow(layout, raster(plans))
    for b, plan in enumerate(plans):
        assert real(new, b, new.role != int(Role.PAD)) == real(standing, b, standing.role != int(Role.PAD))
        if plan is not None:
            ids = layout.visual[b, layout.visual_rows[b]][plan.kept]
            assert new.visual[b, new.visual_rows[b]].tolist() == ids.tolist()
        assert real(new, b, new.position) == list(range(new.length[b]))


@settings(max_examples=80, deadline=None)
@given(layouts(), st.data())
def test_take_then_restore_changes_only_what_was_removed(layout: Layout, data: st.DataObject) -> None:
    plans = raster(choose(data, layout))
    new, index = narrow(layout, plans)
    x = torch.randn(layout.batch, layout.width, 3)
    if len(set(new.length)) == 1:  # padding rows of the index repeat row 0
        assert torch.equal(restore(x, take(x, index), index), x)
        doubled = restore(x, take(x, index) * 2, index)
        for b in range(layout.batch):
            survivors = set(index[b].tolist())
            for r in range(layout.width):
                assert torch.equal(doubled[b, r], x[b, r] * (2 if r in survivors else 1))


@settings(max_examples=80, deadline=None)
@given(layouts(), st.data())
def test_hiding_marks_the_same_rows_that_dropping_removes(layout: Layout, data: st.DataObject) -> None:
    plans = raster(choose(data, layout))
    dropped, _ = narrow(layout, plans)
    hidden = hide(layout, plans)
    assert hidden.n_visual == dropped.n_visual
    assert hidden.width == layout.width
    mask = hidden.key_mask()
    for b in range(layout.batch):
        seen = range(layout.length[b]) if mask is None else [r for r in range(layout.width) if mask[b, r]]
        assert list(seen) == real(dropped, b, dropped.row)
        assert hidden.visual[b, hidden.visual_rows[b]].tolist() == dropped.visual[b, dropped.visual_rows[b]].tolist()


@settings(max_examples=80, deadline=None)
@given(layouts(), st.data())
def test_a_plan_said_over_another_layout_names_the_same_tokens(layout: Layout, data: st.DataObject) -> None:
    first, _ = narrow(layout, choose(data, layout))
    for b, n in enumerate(first.n_visual):
        kept = torch.tensor(
            data.draw(st.lists(st.integers(0, max(n - 1, 0)), unique=True, max_size=n)) if n else [], dtype=torch.int64
        )
        plan = Plan(kept, Fate.DROPPED)
        said = replan(plan, first, layout, b)
        wanted = first.visual[b, first.visual_rows[b]][kept].tolist()
        assert layout.visual[b, layout.visual_rows[b]][said.kept].tolist() == wanted


@settings(max_examples=60, deadline=None)
@given(layouts(), st.data())
def test_compacting_leaves_samples_alone_that_lose_nothing(layout: Layout, data: st.DataObject) -> None:
    gapped, _ = narrow(layout, choose(data, layout))
    plans = choose(data, gapped)
    new, _ = narrow(gapped, plans, positions="compact")
    for b, plan in enumerate(plans):
        kept = real(gapped, b, gapped.position)
        assert real(new, b, new.position) == (kept if plan is None else list(range(new.length[b])))


@settings(max_examples=80, deadline=None)
@given(layouts(), st.data())
def test_appended_tokens_stand_behind_the_kept_ones(layout: Layout, data: st.DataObject) -> None:
    plans = []
    for plan in raster(choose(data, layout)):
        m = data.draw(st.integers(0, 3))
        if plan is not None and layout.visual_rows[len(plans)].shape[0]:
            k = plan.kept.shape[0]
            size = torch.full((k + m,), 2.0)
            plan = Plan(plan.kept, Fate.MERGED, values=torch.randn(k + m, 2), size=size, appended=m)
        plans.append(plan)
    new, index = narrow(layout, plans)
    hidden = put_values(take(torch.zeros(layout.batch, layout.width, 2), index), new, plans)
    plain, _ = narrow(layout, [None if p is None else Plan(p.kept) for p in plans])
    for b, plan in enumerate(plans):
        m = 0 if plan is None else plan.appended
        assert new.length[b] == plain.length[b] + m
        assert new.n_visual[b] == plain.n_visual[b] + m
        rows = new.visual_rows[b]
        assert new.visual[b, rows[rows.shape[0] - m :]].tolist() == [-1] * m
        assert [r for r in real(new, b, new.row) if r < layout.length_at_start] == real(plain, b, plain.row)
        if plan is None or not m:
            continue
        assert torch.equal(hidden[b, rows], plan.values)
        assert new.size is not None and new.size[b, rows].tolist() == [2.0] * len(rows)
        assert new.role[b, rows].tolist() == [int(Role.VISUAL)] * m if plan.kept.shape[0] == 0 else True
        last = rows[-m - 1] + 1 if len(rows) > m else layout.visual_rows[b].min()
        assert rows[-m:].tolist() == list(range(int(last), int(last) + m))
        new_rows = new.row[b, rows[-m:]]
        assert new_rows.unique().shape[0] == m and int(new_rows.min()) >= layout.length_at_start
        assert torch.equal(new.locate_in(b, new_rows), rows[-m:])
