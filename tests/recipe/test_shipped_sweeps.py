"""Shipped sweeps: every run of them fits its backbone, and their rows are the study's."""

from __future__ import annotations

import pytest

from probe.recipe import load_recipe, shipped_recipes
from probe.study.printed import benchmark_of, by_retention, method_of
from probe.sweep import cells_of, check_cells

SWEEPS = [info.name for info in shipped_recipes(sweeps=True)]


@pytest.mark.parametrize("name", SWEEPS)
def test_every_run_fits_its_backbone_and_has_a_page_of_its_own(name: str) -> None:
    recipe = load_recipe(name)
    cells = cells_of(recipe)
    check_cells(cells)
    assert recipe.probes == () or all(probe.record for probe in recipe.probes)
    assert len({cell.folder for cell in cells}) == len(cells)


@pytest.mark.parametrize(("name", "backbone"), [("study/table1", "LLaDA-V"), ("study/table2", "LaViDa-Dream")])
def test_the_tables_have_the_rows_and_columns_of_the_study(name: str, backbone: str) -> None:
    cells = [cell for cell in cells_of(load_recipe(name)) if not cell.is_baseline]
    printed = [row for row in by_retention(backbone) if row.method not in ("none", "TRIM") and row.benchmark != "Avg"]
    assert {benchmark_of(cell.recipe.data.lmms_eval or "") for cell in cells} == {row.benchmark for row in printed}
    methods = [method_of(cell.recipe.name) for cell in cells]
    wanted = [row.method for row in printed]
    assert {m: methods.count(m) for m in methods} == {m: wanted.count(m) for m in wanted}
