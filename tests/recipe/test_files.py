"""Finding recipes, including recipes, and overriding values on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from probe.errors import ProbeError
from probe.recipe import Recipe, load_recipe, parse_recipe, recipe_folder, shipped_recipes

HEAD = "schema: 1\nname: top\n"
LOGITS = "probes:\n  - {name: %s, at: {site: logits}, record: [%s]}\n"


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def names(recipe: Recipe) -> list[str]:
    return [p.name for p in recipe.probes]


def error(path: Path | str, *sets: str) -> str:
    with pytest.raises(ProbeError) as caught:
        load_recipe(path, sets)
    return str(caught.value)


# --- finding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fastv", "prune/fastv", "prune/fastv.yaml", "recipes/prune/fastv.yaml"])
def test_shipped_recipes_go_by_their_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe(name).name == "fastv"


def test_shipped_recipes_are_listed_with_their_line() -> None:
    shipped = {info.name: info for info in shipped_recipes()}
    assert {"quickstart", "prune/fastv", "record/confidence"} <= set(shipped)
    assert all(info.about and info.path.is_relative_to(recipe_folder()) for info in shipped.values())


def test_a_file_goes_before_a_shipped_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fastv").write_text("schema: 1\nname: mine\n")
    assert load_recipe("fastv").name == "mine"


def test_a_name_that_is_nearly_right_gets_a_suggestion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "did you mean `prune/fastv`?" in error("prune/fastw")
    assert "did you mean `prune/fastv`?" in error("fastvv")
    write(tmp_path, mine="")
    assert "did you mean `mine.yaml`?" in error("mne.yaml")
    assert "prune/fastv" in error("zzzzzzzz")


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "", "."])
def test_odd_names_are_errors_too(name: str) -> None:
    assert "no file and no shipped recipe" in error(name)


def test_a_file_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    write(tmp_path, long=HEAD + "#" * 300_000)
    assert "longer than 256 KiB" in error(tmp_path / "long.yaml")


# --- include ---------------------------------------------------------------------------------------------------------


def test_included_probes_come_first_and_the_including_recipe_wins_dials(tmp_path: Path) -> None:
    write(
        tmp_path,
        top=HEAD + "include: [parts/a.yaml, b.yaml]\ndial: {keep: 1, own: 2}\n" + LOGITS % ("top", "x"),
        parts__a="schema: 1\nname: a\nbackbone: other\ndial: {keep: 5, queries: all}\n"
        + LOGITS % ("a", "{y: {q: $queries}}"),
        b="schema: 1\nname: b\n" + LOGITS % ("b", "z"),
    )
    recipe = load_recipe(tmp_path / "top.yaml")
    assert names(recipe) == ["a", "b", "top"]
    assert recipe.dial == {"keep": 1, "queries": "all", "own": 2}
    assert recipe.backbone == "miniature"
    assert recipe.probes[0].record is not None
    assert recipe.probes[0].record[0].params == {"q": "all"}
    assert recipe.place(("probes", 0)) == f"{tmp_path / 'parts/a.yaml'}:6:5"
    assert recipe.place(("probes", 2)) == f"{tmp_path / 'top.yaml'}:6:5"
    assert load_recipe(tmp_path / "top.yaml", ["queries=last"]).probes[0].record[0].params == {"q": "last"}  # type: ignore[index]


def test_an_expanded_recipe_stands_alone(tmp_path: Path) -> None:
    write(tmp_path, top=HEAD + "include: a.yaml\n", a="schema: 1\nname: a\ndial: {k: 1}\n" + LOGITS % ("a", "y"))
    recipe = load_recipe(tmp_path / "top.yaml")
    assert "include" not in recipe.to_yaml()
    assert parse_recipe(recipe.to_yaml()) == recipe
    literal = parse_recipe("schema: 1\nname: top\n" + LOGITS % ("a", "y"))
    assert recipe.hash == literal.hash


def test_shipped_recipes_can_be_included_from_anywhere(tmp_path: Path) -> None:
    write(tmp_path, top=HEAD + "include: [record/confidence.yaml, attention_mass]\n")
    assert names(load_recipe(tmp_path / "top.yaml")) == ["confidence", "attention_mass"]
    assert names(parse_recipe(HEAD + "include: [record/confidence]\n")) == ["confidence"]


def test_includes_nest_and_a_file_reached_twice_counts_once(tmp_path: Path) -> None:
    write(
        tmp_path,
        top=HEAD + "include: [sub/a.yaml, sub/b.yaml]\n",
        sub__a="schema: 1\nname: a\ninclude: [../c.yaml]\n",
        sub__b="schema: 1\nname: b\ninclude: [../c.yaml]\n",
        c="schema: 1\nname: c\n" + LOGITS % ("c", "y"),
    )
    assert names(load_recipe(tmp_path / "top.yaml")) == ["c"]


def test_circles_are_errors(tmp_path: Path) -> None:
    write(
        tmp_path,
        top=HEAD + "include: [a.yaml]\n",
        a="schema: 1\nname: a\ninclude: [b.yaml]\n",
        b="schema: 1\nname: b\ninclude: [a.yaml]\n",
        me=HEAD + "include: [me.yaml]\n",
    )
    assert f"{tmp_path / 'b.yaml'}:3:11: includes `a.yaml`, which includes this recipe again" in error(
        tmp_path / "top.yaml"
    )
    assert "which includes this recipe again" in error(tmp_path / "me.yaml")


def test_includes_stay_within_the_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write(
        tmp_path,
        secret="schema: 1\nname: s\n",
        in__up=HEAD + "include: [../secret.yaml]\n",
        in__absolute=HEAD + f"include: [{tmp_path}/secret.yaml]\n",
        in__sneaky=HEAD + "include: [link.yaml]\n",
    )
    (tmp_path / "in/link.yaml").symlink_to(tmp_path / "secret.yaml")
    assert "lies outside the recipe's folder" in error(tmp_path / "in/up.yaml")
    assert "includes the absolute path" in error(tmp_path / "in/absolute.yaml")
    assert "lies outside the recipe's folder" in error(tmp_path / "in/sneaky.yaml")


@pytest.mark.parametrize(
    ("include", "message"),
    [
        (
            "[nothing.yaml]",
            "top.yaml:3:11: includes `nothing.yaml`, but there is no such file and no such shipped recipe",
        ),
        ("[record/confidenc.yaml]", "did you mean `record/confidence`?"),
        ("[1]", "`include` should be a list of recipe files or names"),
        ("{a: 1}", "`include` should be a list of recipe files or names"),
        ("[a.yaml, a.yaml]", "includes `a.yaml` twice"),
        ('["a\\u0085b"]', "no such file"),
        ("[odd.yaml]", "odd.yaml:1:1: a recipe is a mapping"),
        ("[typo.yaml]", "typo.yaml:3:1: unknown key `prbes`; did you mean `probes`?"),
        ("[..]", "no such file"),
        ("['C:\\x.yaml']", "absolute path"),
    ],
)
def test_faulty_includes_are_named(include: str, message: str, tmp_path: Path) -> None:
    write(tmp_path, top=HEAD + f"include: {include}\n", a=HEAD, odd="[1]", typo="schema: 1\nname: a\nprbes: []\n")
    assert message in error(tmp_path / "top.yaml")


def test_a_dial_with_two_values_must_be_settled(tmp_path: Path) -> None:
    write(
        tmp_path,
        top=HEAD + "include: [a.yaml, b.yaml]\n",
        settled=HEAD + "include: [a.yaml, b.yaml]\ndial: {k: 3}\n",
        a="schema: 1\nname: a\ndial: {k: 1}\n",
        b="schema: 1\nname: b\ndial: {k: 2}\n",
    )
    assert "the dial `k` has another value in" in error(tmp_path / "top.yaml")
    assert load_recipe(tmp_path / "settled.yaml").dial == {"k": 3}


def test_a_fault_in_an_included_probe_is_located_in_its_own_file(tmp_path: Path) -> None:
    write(
        tmp_path,
        top=HEAD + "include: [a.yaml]\n" + LOGITS % ("top", "x"),
        a="schema: 1\nname: a\nprobes:\n  - {name: a, at: {site: logit}, record: [y]}\n",
    )
    assert error(tmp_path / "top.yaml").startswith(f"{tmp_path / 'a.yaml'}:4:26: probe `a`: at.site: ")


# --- --set -----------------------------------------------------------------------------------------------------------

BASE = """\
schema: 1
name: top
dial: {keep: 0.5, layers: all}
data: {task: a}
probes:
  - {name: look, at: {site: layer.attention, layers: $layers}, record: [x]}
  - {name: logits, at: {site: logits}, record: [{y: {keep: $keep}}]}
"""


def base(*sets: str) -> Recipe:
    return parse_recipe(BASE, sets=sets)


def test_set_turns_dials_and_values() -> None:
    recipe = base("keep=25%", "layers=[1,2]", "generate.steps=8", "data.limit=4", "probes.look.at.steps={from: 50%}")
    assert recipe.dial == {"keep": "25%", "layers": [1, 2]}
    assert recipe.generate.steps == 8
    assert recipe.data.limit == 4
    assert recipe.probes[0].at.steps.span.start == 0.5
    assert recipe.probes[1].record is not None
    assert recipe.probes[1].record[0].params == {"keep": "25%"}
    assert parse_recipe(recipe.to_yaml()) == recipe
    assert base("keep=1", "keep=2").dial["keep"] == 2
    assert base("dial.keep=2") == base("keep=2")
    assert base("probes.1.name=other").probes[1].name == "other"
    assert base("backbone=a/b").backbone == "a/b"


def test_setting_one_of_two_alternatives_replaces_the_other() -> None:
    assert base("data.file=b.jsonl").data.source == "b.jsonl"
    assert base("probes.look.at.layer=2").probes[0].at.layers is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keep", "--set keep: write name=value"),
        ("=3", "write name=value"),
        ("a..b=3", "write name=value"),
        ("kep=3", "--set kep=3: the recipe has no dial `kep`; did you mean `keep`?"),
        ("generate=3", "the recipe has no dial `generate`; `generate` is a part of the recipe"),
        ("generat.steps=3", "the recipe has no `generat` to set; did you mean `generate`?"),
        ("generate.stpes=3", "--set generate.stpes=3: generate.stpes: unknown key `stpes`; did you mean `steps`?"),
        ("generate.steps=x", "--set generate.steps=x: generate.steps: should be a whole number"),
        ("schema.x=3", "the recipe has no `schema` to set"),
        ("include.0=x", "the recipe has no `include` to set"),
        ("probes.9.name=x", "there is no item `9`; known: look, logits"),
        ("probes.lok.name=x", "there is no item `lok`; did you mean `look`?"),
        ("name.x=3", "`name` is the text `top` and holds no `x`"),
        ("keep=[1", "--set keep=[1:1:3: not valid YAML"),
        ("keep=$layers", "a dial holds a value, not another dial"),
        ("keep=*x", "anchors and aliases"),
        ("dial.new=3", "the recipe has no dial `new`"),
    ],
)
def test_faulty_sets_are_named(text: str, message: str) -> None:
    with pytest.raises(ProbeError) as caught:
        base(text)
    assert message in str(caught.value)
