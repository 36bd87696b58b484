"""What a sweep consists of: combinations, their names, whose settings count; faults are said with their place."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from probe.errors import ProbeError
from probe.recipe import load_recipe, parse_recipe
from probe.sweep import Cell, Group, cells_of, check_cells, units_of

GRID = """
schema: 1
name: grid
data: {limit: 3}
trace: {pictures: false}
generate: {steps: 4}
sweep:
  recipes:
    - prune/random
    - {recipe: prune/vtw, dial: {layer: [2, 3]}, label: withdrawn}
    - {recipe: prune/none, dial: {keep: 1.0}, set: {generate.temperature: 0.5}, backbones: miniature}
  backbones: [miniature, GSAI-ML/LLaDA-V]
  data: [world/short, world/long]
  dial: {keep: [50%, 0.25], start: [0%]}
  seeds: [0, 7]
probes:
  - {at: {site: logits}, record: [confidence]}
"""


def named(cells: list[Cell]) -> list[tuple[str, str, int, str]]:
    return [(c.group.backbone, c.group.data, c.group.seed, c.title) for c in cells]


def test_every_combination_once_and_the_unpruned_run_first() -> None:
    cells = cells_of(parse_recipe(GRID))
    wanted = []
    for backbone, data, seed in product(["miniature", "GSAI-ML/LLaDA-V"], ["world/short", "world/long"], [0, 7]):
        titles = ["unpruned", "random keep=50%", "random keep=0.25", "withdrawn layer=2", "withdrawn layer=3"]
        titles += ["none"] if backbone == "miniature" else []
        wanted += [(backbone, data, seed, title) for title in titles]
    assert named(cells) == wanted
    assert len({c.folder for c in cells}) == len(cells)
    assert len(units_of(cells, 3)) == 3 * len(cells)


def test_a_cell_is_a_recipe_of_its_own_with_the_settings_of_the_sweep_over_its_own() -> None:
    group = Group("miniature", "world/long", 7)
    cells = {c.title: c.recipe for c in cells_of(parse_recipe(GRID)) if c.group == group}
    assert cells["random keep=0.25"].dial["keep"] == 0.25 and cells["random keep=50%"].probes[0].select is not None
    for recipe in cells.values():
        assert recipe.sweep is None and recipe.generate.steps == 4 and recipe.generate.seed == 7
        assert (recipe.data.task, recipe.data.limit, recipe.trace.pictures) == ("world/long", 3, False)
        assert [p.name for p in recipe.probes if p.record] == ["logits"], "what the sweep records, every run records"
        again = parse_recipe(recipe.to_yaml())
        assert again == recipe and again.hash == recipe.hash
    assert cells["none"].generate.temperature == 0.5 and cells["random keep=50%"].generate.temperature is None
    shipped = load_recipe("prune/vtw", ["layer=3"])
    assert cells["withdrawn layer=3"].probes[:-1] == shipped.probes


def test_the_seed_of_a_table_is_that_of_its_runs() -> None:
    own = GRID.replace("generate: {steps: 4}", "generate: {steps: 4, seed: 5}")
    for text, seeds in ((own, {0, 7}), (own.replace("  seeds: [0, 7]\n", ""), {5}), (GRID, {0, 7})):
        cells = cells_of(parse_recipe(text))
        assert {cell.group.seed for cell in cells} == seeds
        assert all(cell.recipe.generate.seed == cell.group.seed for cell in cells)


def test_a_recipe_is_varied_by_itself() -> None:
    own = load_recipe("prune/fastv").to_yaml() + "sweep: {dial: {keep: [0.5, 0.25], layer: [1, 2]}}\n"
    cells = cells_of(parse_recipe(own))
    grid = [f"fastv keep={k} layer={n}" for k in (0.5, 0.25) for n in (1, 2)]
    assert [c.title for c in cells] == ["unpruned", *grid]
    assert cells[0].recipe.probes == () and cells[1].recipe.dial["layer"] == 1
    alone = parse_recipe(own.replace("sweep: {", "sweep: {baseline: false, "))
    assert [c.title for c in cells_of(alone)] == grid


def test_settings_are_varied_for_the_unpruned_run_too() -> None:
    text = GRID.replace("  seeds: [0, 7]\n", "  set: {generate.steps: [2, 8], generate.gen_length: 16}\n")
    cells = [
        c for c in cells_of(parse_recipe(text)) if c.group.backbone == "miniature" and c.group.data == "world/long"
    ]
    titles = ["unpruned", "random keep=50%", "random keep=0.25", "withdrawn layer=2", "withdrawn layer=3", "none"]
    assert [(c.recipe.generate.steps, c.title) for c in cells] == [(steps, t) for steps in (2, 8) for t in titles]
    assert {c.recipe.generate.gen_length for c in cells} == {16}
    assert [c.group.title for c in cells[::6]] == [
        f"miniature, world/long, steps {steps}, gen_length 16" for steps in (2, 8)
    ]
    assert len({c.folder for c in cells}) == len(cells) and "steps-8" in cells[-1].folder
    assert cells[-1].recipe.generate.temperature == 0.5, "beside an entry's own settings"


def test_backbones_can_be_told_on_the_command_line() -> None:
    recipe = load_recipe("study/restoration", ["sweep.backbones=[miniature-ar, my/seed1]", "sweep.data=world/describe"])
    assert {(c.group.backbone, c.group.data) for c in cells_of(recipe)} == {
        ("miniature-ar", "world/describe"),
        ("my/seed1", "world/describe"),
    }


def test_the_name_of_a_folder_changes_with_what_is_done_to_a_sample_and_not_with_how_many() -> None:
    def folders(text: str) -> list[str]:
        return [c.folder for c in cells_of(parse_recipe(text))]

    assert folders(GRID) == folders(GRID.replace("limit: 3", "limit: 300"))
    assert not set(folders(GRID)) & set(folders(GRID.replace("steps: 4", "steps: 8")))
    for folder in folders(GRID):
        assert "/" not in folder and len(folder) < 100


def test_a_file_of_data_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "my.jsonl").write_text('{"image": "x.png", "question": "q"}\n')
    cells = cells_of(parse_recipe(GRID.replace("world/long", str(tmp_path / "my.jsonl"))))
    assert {c.recipe.data.file for c in cells} == {None, str(tmp_path / "my.jsonl")}


WRONG = {
    "no sweep": ("sweep:\n", "sweeps:\n", "sweep"),
    "an unknown recipe": ("prune/random", "prune/randm", "prune/random"),
    "an unknown key": ("backbones: [", "backbone: [", "backbones"),
    "a dial of none": ("keep: [", "kepe: [", "did you mean `keep`"),
    "a dial that the entry has not": ("{layer: [2, 3]}", "{keep: [2, 3]}", "`prune/vtw` has no dial `keep`"),
    "no value": ("keep: [50%, 0.25]", "keep: []", "empty"),
    "a mapping of values": ("keep: [50%, 0.25]", "keep: {a: 1}", "list of values"),
    "a backbone that is not listed": ("backbones: miniature}", "backbones: mini}", "not among the sweep's backbones"),
    "data twice": ("[world/short, world/long]", "[world/short, world/short]", "twice"),
    "the same run twice": ("prune/none", "prune/random", "the same"),
    "a probe that intervenes": ("record: [confidence]", "do: drop", "can only record"),
    "a setting that does not exist": ("generate.temperature", "generate.temprature", "temperature"),
    "a setting of a sweep that does not exist": ("seeds: [0, 7]", "set: {generate.stepz: [2]}", "steps"),
    "a setting that is no setting": ("seeds: [0, 7]", "set: {data.limit: [2]}", "dials stand under `dial`"),
    "a seed as a setting": ("seeds: [0, 7]", "set: {generate.seed: [2]}", "seeds under `seeds`"),
    "a negative seed": ("seeds: [0, 7]", "seeds: [-1]", "seeds"),
    "more than anybody waits for": ("seeds: [0, 7]", f"seeds: {list(range(20_001))}", "10,000"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_with_its_place(case: str) -> None:
    before, after, said = WRONG[case]
    assert before in GRID
    text = GRID.replace(before, after)
    if case == "the same run twice":
        text = text.replace(", dial: {keep: 1.0}, set: {generate.temperature: 0.5}, backbones: miniature", "")
    with pytest.raises(ProbeError) as error:
        cells_of(parse_recipe(text, source="grid.yaml"))
    assert said in str(error.value) and "grid.yaml:" in str(error.value)


def test_a_recipe_without_a_sweep_says_how_to_run_it() -> None:
    with pytest.raises(ProbeError, match="probe run"):
        cells_of(load_recipe("prune/fastv"))


def test_a_sweep_cannot_hold_sweeps(tmp_path: Path) -> None:
    (tmp_path / "inner.yaml").write_text(GRID)
    (tmp_path / "outer.yaml").write_text(f"schema: 1\nname: outer\nsweep: {{recipes: {tmp_path / 'inner.yaml'}}}\n")
    with pytest.raises(ProbeError, match="is a sweep itself"):
        cells_of(load_recipe(tmp_path / "outer.yaml"))


def test_runs_that_do_not_fit_their_backbone_are_refused_before_any() -> None:
    short = GRID.replace(", GSAI-ML/LLaDA-V", "")
    check_cells(cells_of(parse_recipe(short)))
    with pytest.raises(ProbeError, match=r"`random keep=1.5` on miniature: .*1.5.*backbones"):
        check_cells(cells_of(parse_recipe(short.replace("[50%, 0.25]", "[50%, 1.5]"))))
