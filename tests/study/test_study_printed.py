"""The study's printed numbers: they are what the paper's tables say of themselves, and settings are found."""

from __future__ import annotations

import pytest

from probe.data.totals import relative_average
from probe.study import printed

ROWS = [
    (backbone, method, retention)
    for backbone in printed.TABLES
    for method, retention in dict.fromkeys((p.method, p.retention) for p in printed.by_retention(backbone))
    if method != "none"
]


def _scores(backbone: str, method: str, retention: float) -> dict[str, float]:
    rows = printed.by_retention(backbone)
    return {p.benchmark: p.score for p in rows if (p.method, p.retention) == (method, retention)}


def test_the_two_tables_have_the_study_s_rows() -> None:
    assert len(ROWS) == 32


@pytest.mark.parametrize(("backbone", "method", "retention"), ROWS)
def test_the_relative_average_is_the_printed_one(backbone: str, method: str, retention: float) -> None:
    scores, bare = _scores(backbone, method, retention), _scores(backbone, "none", 100)
    wanted = scores.pop(printed.AVERAGE)
    assert bare.pop(printed.AVERAGE) == 100
    assert abs(relative_average(scores, bare) - wanted) < 0.1


@pytest.mark.parametrize("backbone", printed.TABLES)
def test_unpruned_rows_of_the_tables_agree(backbone: str) -> None:
    bare = _scores(backbone, "none", 100)
    late = {p.benchmark: p.score for p in printed.by_start(backbone) if p.method == "none"}
    assert {k: late[k] for k in late.keys() & bare.keys()} == {k: bare[k] for k in late.keys() & bare.keys()}
    assert set(printed.times(backbone)) == set(late)


def test_every_benchmark_has_settings_on_a_backbone_that_was_run_on_it() -> None:
    for backbone in printed.TABLES:
        told = [*printed.by_retention(backbone), *printed.by_start(backbone)]
        for short in {p.benchmark for p in told} - {printed.AVERAGE}:
            for task in printed.BENCHMARKS[short]:
                assert printed.benchmark_of(task) == short
                assert printed.generation_of(backbone, task) is not None
    assert printed.generation_of("LLaDA-V", "docvqa_val") == printed.Generation(32, 32, 16, False)
    assert printed.generation_of("LLaDA-V", "video_dc499") == printed.Generation(128, 128, 64, True)
    assert printed.generation_of("LaViDa-Dream", "video_dc499") is None
    assert printed.generation_of("LLaDA-V", "world/short") is None


@pytest.mark.parametrize(
    ("recipe", "method"),
    [
        ("fastv", "FastV"),
        ("study/study_sparsevlm_lavida", "SparseVLM"),
        ("study_divprune_late_lavida", "DivPrune"),
        ("none", "none"),
        ("late_step", "late_step"),
        ("sparsevlm_plus", "sparsevlm_plus"),
    ],
)
def test_a_recipe_stands_in_the_row_of_its_method(recipe: str, method: str) -> None:
    assert printed.method_of(recipe) == method
