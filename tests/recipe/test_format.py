"""The recipe format: what loads, what it means, what is refused and how, what the hash covers, what comes back."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from recipe_helpers import FASTV

from probe.errors import ProbeError
from probe.recipe import Recipe, load_recipe, parse_recipe
from probe.site import Site

HEAD = "schema: 1\nname: a\n"


def parse(text: str, *sets: str) -> Recipe:
    return parse_recipe(text, source="x.yaml", sets=sets)


def error(text: str, *sets: str) -> str:
    with pytest.raises(ProbeError) as caught:
        parse(text, *sets)
    return str(caught.value)


def test_the_smallest_recipe_runs_the_bare_model() -> None:
    recipe = parse(HEAD)
    assert recipe.probes == ()
    assert (recipe.backbone, recipe.data.source, recipe.generate.seed) == ("miniature", "world/mixed", 0)
    assert recipe.generate.steps is None
    assert recipe.trace.samples == "all"
    assert recipe.run.baseline


def test_a_whole_recipe() -> None:
    recipe = parse(
        HEAD
        + """\
about: words
paper: "2403.06764"
backbone: GSAI-ML/LLaDA-V
data: {file: my.jsonl, limit: 4}
generate: {gen_length: 48, steps: 24, block_length: 48, temperature: 0, remasking: low_confidence, cfg_scale: 0.5,
           stop: ["\\n"], suffix: null, think: false, seed: 7}
trace: {samples: 3, pictures: false}
run: {baseline: false, time: false}
"""
    )
    assert recipe.generate.temperature == 0.0
    assert recipe.generate.stop == ("\n",)
    assert recipe.generate.suffix is None
    assert recipe.data.source == "my.jsonl"
    assert (recipe.trace.samples, recipe.trace.pictures) == (3, False)
    assert (recipe.run.baseline, recipe.run.time) == (False, False)


def test_probes_mean_what_they_say() -> None:
    recipe = parse(FASTV)
    prune, look = recipe.probes
    assert prune.at.site is Site.LAYER_INPUT
    assert prune.score is not None
    assert (prune.score.name, prune.score.params) == ("attention", {"layer": -1})
    assert prune.select is not None
    assert prune.select.params == {"keep": 0.5}
    assert look.record is not None
    assert [p.variable for p in look.record] == ["mass", "mass_last"]


def test_a_bare_name_equals_a_name_without_parameters() -> None:
    probe = "probes: [{at: {site: final}, select: none, do: %s}]\n"
    assert parse(HEAD + probe % "drop").hash == parse(HEAD + probe % "{drop: {}}").hash
    assert parse(HEAD + probe % "drop").hash == parse(HEAD + probe % "{drop: }").hash


def test_default_names_say_where_and_are_unique() -> None:
    recipe = parse(
        HEAD
        + """\
probes:
  - {at: {site: layer.input, layer: 50%}, select: none, do: drop}
  - {at: {site: layer.attention, layers: [1, 2]}, record: [a]}
  - {at: {site: layer.attention, layers: all}, record: [b]}
  - {at: {site: layer.attention, layers: {from: 2, to: 4}}, record: [c]}
  - {at: {site: logits}, record: [d]}
  - {at: {site: logits}, record: [e]}
  - {name: "logits#2", at: {site: logits}, record: f}
"""
    )
    assert [p.name for p in recipe.probes] == [
        "layer.input@50%",
        "layer.attention@1,2",
        "layer.attention@all",
        "layer.attention@2..4",
        "logits",
        "logits#3",
        "logits#2",
    ]


def test_dials_stand_anywhere_a_value_may() -> None:
    recipe = parse(
        HEAD
        + """\
dial: {k: 3, where: layer.input, options: {lasts: forward}, stops: [a, b], text: $$k}
data: {limit: $k}
generate: {stop: $stops, suffix: $$k}
about: costs $5 and $
probes:
  - {at: {site: $where, layers: [$k, 4]}, select: none, do: {drop: $options}}
"""
    )
    assert recipe.data.limit == 3
    assert recipe.generate.stop == ("a", "b")
    assert recipe.generate.suffix == "$k"
    assert recipe.about == "costs $5 and $"
    assert recipe.probes[0].name == "layer.input@3,4"
    assert recipe.probes[0].do is not None
    assert recipe.probes[0].do.params == {"lasts": "forward"}
    assert parse(recipe.to_yaml()) == recipe


PROBE = HEAD + "probes:\n  - name: p\n    at: {site: layer.input, layer: 2}\n    select: none\n    do: drop\n"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("schema: 1\n", "", "x.yaml:1:1: `schema` should be 1 (this program reads no other) and is missing"),
        (
            "schema: 1",
            "schema: 2",
            "x.yaml:1:9: `schema` should be 1 (this program reads no other), but is the number 2",
        ),
        ("schema: 1", "schema: true", "x.yaml:1:9: `schema` should be 1"),
        ("name: a\n", "", "x.yaml:1:1: name: is missing"),
        ("name: a\n", "name: ../a\n", "x.yaml:2:7: name: cannot be a name: use letters"),
        ("name: a\n", "name: a\nprobe: []\n", "x.yaml:3:1: unknown key `probe`; did you mean `probes`?"),
        ("name: a\n", "name: a\ndial: [1]\n", "x.yaml:3:7: `dial` should be a mapping of names to values"),
        ("name: a\n", "name: a\ndial: {a-b: 1}\n", "x.yaml:3:8: `a-b` is no name for a dial"),
        ("name: a\n", "name: a\ndial: {a: 1, b: $a}\n", "x.yaml:3:17: the dial `b` stands for `$a`"),
        (
            "name: a\n",
            "name: a\ngenerate: {stepps: 3}\n",
            "x.yaml:3:12: generate.stepps: unknown key `stepps`; did you mean `steps`?",
        ),
        (
            "name: a\n",
            "name: a\ngenerate: {steps: '3'}\n",
            "x.yaml:3:19: generate.steps: should be a whole number, but is the text `3`",
        ),
        (
            "name: a\n",
            "name: a\ngenerate: {steps: true}\n",
            "x.yaml:3:19: generate.steps: should be a whole number, but is `true`",
        ),
        ("name: a\n", "name: a\ngenerate: {steps: 0}\n", "generate.steps: should be at least 1, but is the number 0"),
        (
            "name: a\n",
            "name: a\ngenerate: {think: yes}\n",
            "generate.think: should be true or false, but is the text `yes` (yes, no, on and off are words here)",
        ),
        (
            "name: a\n",
            "name: a\ndata: {task: a, file: b}\n",
            "x.yaml:3:23: data.file: names both a `task` and a `file`",
        ),
        (
            "name: a\n",
            "name: a\npaper: 2403.06764\n",
            "x.yaml:3:8: paper: should be text, but is the number 2403.06764; put it in quotes",
        ),
        ("name: a\n", "name: a\ntrace: {samples: some}\n", "trace.samples: should be all or a whole number"),
        ("probes:\n", "probes: 3\nx:\n", "unknown key `x`"),
        (
            "layer.input",
            "layer.imput",
            "x.yaml:5:16: probe `p`: at.site: there is no site `layer.imput`; did you mean `layer.input`?",
        ),
        ("layer: 2", "leyer: 2", "x.yaml:5:29: probe `p`: at.leyer: unknown key `leyer`; did you mean `layer`?"),
        (
            ", layer: 2",
            "",
            "x.yaml:5:9: probe `p`: at: the site layer.input exists once per layer; add `layer: 2` or `layers: all`",
        ),
        ("layer.input", "final", "probe `p`: at.layer: the site final has no layers; remove `layer`"),
        ("layer: 2", "layer: 2, layers: all", "at.layers: has both `layer` and `layers`"),
        ("layer: 2", "layer: [2]", "at.layer: is one layer, but a list stands here; several go to `layers`"),
        ("layer: 2", "layer: all", "at.layer: is one layer"),
        ("layer: 2", "layer: 120%", "at.layer: the text `120%` is no share"),
        ("layer: 2", "layer: true", "at.layer: should be a layer or a share such as 50%, but is `true`"),
        ("layer: 2", "layers: some", "at.layers: should be all, a list of layers or {from, to, every}"),
        ("layer: 2", "layers: []", "at.layers: is an empty list"),
        ("layer: 2", "layers: [1, x]", "x.yaml:5:41: probe `p`: at.layers[1]: should be a layer"),
        ("layer: 2", "layers: {form: 1}", "at.layers.form: unknown key `form`; did you mean `from`?"),
        ("layer: 2", "layers: {every: 0}", "at.layers.every: should be a whole number of at least 1"),
        ("layer: 2", "layer: 2, steps: 50%", "at.steps: the text `50%` could mean two things"),
        ("layer: 2", "layer: 2, steps: -1", "at.steps: -1 is no step: steps count from 0 (the last one is `last`)"),
        ("layer: 2", "layer: 2, steps: never", "at.steps: should be all, first, last"),
        ("layer: 2", "layer: 2, steps: {from: x}", "at.steps.from: should be a step or a share"),
        (
            "layer: 2",
            "layer: 2, steps: {at: [1, 2.5]}",
            "x.yaml:5:55: probe `p`: at.steps.at[1]: the number 2.5 is no share",
        ),
        ("layer: 2", "layer: 2, steps: {at: [1], to: 3}", "at.steps: `at` names the exact steps"),
        ("layer: 2", "layer: 2, steps: []", "at.steps: is an empty list"),
        ("    do: drop\n", "", "x.yaml:4:5: probe `p`: an intervention needs `select` and `do`; `do` is missing"),
        ("    select: none\n    do: drop\n", "", "probe `p`: does nothing: give it `record`, or `select` and `do`"),
        ("    do: drop\n", "    do: drop\n    record: [a]\n", "probe `p`: select: both records and intervenes"),
        ("    select: none\n    do: drop\n", "    record: []\n", "probe `p`: record: is an empty list"),
        (
            "    select: none\n    do: drop\n",
            "    record: [a, {a: {}}]\n",
            "x.yaml:6:17: probe `p`: record[1]: the variable `a` is already recorded by probe `p`",
        ),
        (
            "    select: none\n    do: drop\n",
            "    record: [{a: {as: step}}]\n",
            "`step` cannot name a variable of the trace",
        ),
        (
            "    select: none\n    do: drop\n",
            "    record: [{a: {as: 'x y'}}]\n",
            "`x y` cannot name a variable of the trace",
        ),
        ("do: drop", "do: [drop]", "x.yaml:7:9: probe `p`: do: should be a name, or a name with parameters"),
        ("do: drop", "do: {drop: 1}", "x.yaml:7:16: probe `p`: do.drop: the parameters should be a mapping"),
        ("do: drop", "do: {drop: {}, mask: {}}", "do: names 2 things (drop, mask); one belongs here"),
        ("do: drop", "do: drop\n    when: x", "x.yaml:8:5: probe `p`: when: unknown key `when`"),
        (
            "do: drop",
            "do: drop\n  - {name: p, at: {site: final}, record: [x]}",
            "x.yaml:8:12: probe `p`: name: two probes are called `p`",
        ),
        (
            "layer: 2",
            "layer: $layer",
            "x.yaml:5:36: probe `p`: at.layer: there is no dial `$layer`; the recipe has no dials",
        ),
        (
            "name: a\n",
            "name: a\ngenerate: {steps: $stp}\ndial: {step: 3}\n",
            "x.yaml:3:19: generate.steps: there is no dial `$stp`; did you mean `step`?",
        ),
    ],
)
def test_faults_say_where_what_and_what_would_be_right(old: str, new: str, message: str) -> None:
    assert old in PROBE
    assert message in error(PROBE.replace(old, new, 1))


@pytest.mark.parametrize("text", ["[]", "3", "a", "- schema: 1"])
def test_what_is_no_mapping_is_no_recipe(text: str) -> None:
    assert "a recipe is a mapping that starts with `schema: 1`" in error(text)


def test_a_fault_of_a_dial_names_the_dial_and_who_set_it() -> None:
    assert error(FASTV, "start=hello").endswith("but is the text `hello` (`$start`, from --set start=hello)")
    assert "x.yaml:6:53: probe `prune`: at.steps.from:" in error(FASTV, "start=hello")


def test_dials_do_not_unfold_without_bound() -> None:
    bomb = HEAD + "dial: {a: [" + "1," * 20_000 + "]}\ngenerate: {stop: [" + "$a," * 5_000 + "]}\n"
    assert "unfold to more than" in error(bomb)


# --- hash ------------------------------------------------------------------------------------------------------------


def test_the_hash_sees_what_a_recipe_does_and_not_how_it_is_written() -> None:
    recipe = parse(FASTV)
    assert len(recipe.hash) == 16
    assert int(recipe.hash, 16) >= 0
    rewritten = """\
# the same in other words
probes:
- score: {attention: {"layer": -1}}
  select:
    top:
      keep: 0.5
  do: {drop: {lasts: forward}}
  at: {steps: {from: 0}, layer: 2, site: layer.input}
  name: prune
- {record: [mass, {mass: {as: mass_last, queries: last}}], at: {layers: all, site: layer.attention, steps: all}}
about: other words
name: fastv
schema: 1
"""
    assert parse(rewritten).hash == recipe.hash
    assert parse(FASTV, "keep=0.25").hash != recipe.hash
    assert parse(FASTV, "generate.seed=1").hash != recipe.hash
    assert parse(FASTV, "keep=0.25").hash == parse(FASTV.replace("keep: 0.5,", "keep: 0.25,")).hash


def test_a_count_of_one_and_all_of_them_are_not_the_same() -> None:
    one, everything = parse(FASTV, "keep=1"), parse(FASTV, "keep=1.0")
    assert one != everything
    assert one.hash != everything.hash
    assert parse(one.to_yaml()) == one
    assert parse(everything.to_yaml()) == everything


def test_the_hash_is_the_same_in_every_process() -> None:
    code = f"from probe.recipe import parse_recipe; print(parse_recipe({FASTV!r}).hash)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == parse(FASTV).hash


# --- round trip ------------------------------------------------------------------------------------------------------


def test_writing_and_reading_is_the_identity_dials_and_references_included() -> None:
    recipe = parse(FASTV)
    again = parse(recipe.to_yaml())
    assert again == recipe
    assert again.hash == recipe.hash
    assert again.to_yaml() == recipe.to_yaml()
    assert "$keep" in recipe.to_yaml()
    assert parse(recipe.to_yaml(), "keep=0.25") == parse(FASTV, "keep=0.25")
    assert parse(FASTV.replace("$keep", "0.5")) != recipe  # the same values, but nothing left to turn


def test_recipes_survive_pickling() -> None:
    recipe = parse(FASTV)
    again = pickle.loads(pickle.dumps(recipe))
    assert again == recipe
    assert again.place(("probes", 1)) == "x.yaml:10:5"


_SHARES = st.floats(0, 1) | st.sampled_from(["0%", "33.3%", "50%", "100%"])
_STEPS = (
    st.sampled_from(["all", "first", "last"])
    | st.integers(0, 30)
    | st.lists(st.integers(0, 30), min_size=1, max_size=3)
    | st.fixed_dictionaries({"from": _SHARES}, optional={"to": st.integers(0, 30), "every": st.integers(1, 4)})
    | st.fixed_dictionaries({"at": st.lists(_SHARES, min_size=1, max_size=3)})
)
_AT = st.one_of(
    st.fixed_dictionaries({"site": st.sampled_from(["before_lm", "final", "logits"])}, optional={"steps": _STEPS}),
    st.fixed_dictionaries(
        {"site": st.just("layer.input"), "layer": st.integers(-5, 5) | _SHARES}, optional={"steps": _STEPS}
    ),
    st.fixed_dictionaries(
        {"site": st.just("layer.output"), "layers": st.just("all") | st.lists(st.integers(0, 9), min_size=1)}
    ),
)
_TEXT = st.text("ab%$\n'", max_size=4).filter(lambda text: not re.fullmatch(r"\$[ab]+", text))  # no dial is defined
_PART = st.sampled_from(["a", "b"]) | st.dictionaries(
    st.sampled_from(["x", "y"]),
    st.dictionaries(
        st.sampled_from(["p", "q"]),
        st.integers(-(2**63) + 1, 2**63 - 1) | st.floats(0, 1) | _TEXT,
        max_size=2,
    ),
    min_size=1,
    max_size=1,
)
_PROBE = st.fixed_dictionaries({"at": _AT, "select": _PART, "do": _PART}, optional={"score": _PART})
_RECIPE = st.fixed_dictionaries(
    {"schema": st.just(1), "name": st.sampled_from(["a", "a/b", "x y.z"]), "probes": st.lists(_PROBE, max_size=3)},
    optional={"generate": st.fixed_dictionaries({"steps": st.integers(1, 99), "temperature": st.floats(0, 2)})},
)


@settings(max_examples=60, deadline=None)
@given(_RECIPE)
def test_recipes_made_in_python_write_and_read_back_the_same(data: dict[str, object]) -> None:
    recipe = Recipe.model_validate(data)
    again = parse(recipe.to_yaml())
    assert again == recipe
    assert again.hash == recipe.hash


def test_recipes_made_of_models_are_the_same_as_read_ones() -> None:
    read = parse(FASTV)
    made = Recipe(schema=1, name="fastv", dial=read.dial, probes=read.probes)
    assert made.hash == read.hash
    assert parse(made.to_yaml()).hash == read.hash


def test_python_data_is_checked_like_a_file() -> None:
    with pytest.raises(ValidationError, match="there is no dial"):
        Recipe(schema=1, name="a", probes=[{"at": {"site": "logits"}, "record": ["$x"]}])


# --- parts of a recipe -----------------------------------------------------------------------------------------------


def test_the_baseline_keeps_the_recording_probes_their_names_and_their_places() -> None:
    recipe = parse(FASTV)
    baseline = recipe.without_interventions()
    assert baseline.name == "fastv/baseline"
    assert [p.name for p in baseline.probes] == ["layer.attention@all"]
    assert baseline.place(("probes", 0)) == recipe.place(("probes", 1))
    assert baseline.without_interventions() == baseline
    assert parse(baseline.to_yaml()) == baseline
    assert parse(FASTV, "keep=0.1").without_interventions().hash == baseline.hash


def test_without_recording_only_interventions_are_left() -> None:
    bare = parse(FASTV).without_recording()
    assert bare.name == "fastv"
    assert [p.name for p in bare.probes] == ["prune"]
    assert parse(bare.to_yaml()) == bare
    assert bare.with_sets(["keep=0.1"]).probes[0].select == parse(FASTV, "keep=0.1").probes[0].select


def test_a_filtered_recipe_keeps_names_that_depended_on_neighbours() -> None:
    text = HEAD + ("probes:\n  - {at: {site: final}, select: none, do: drop}\n  - {at: {site: final}, record: [x]}\n")
    assert [p.name for p in parse(text).without_interventions().probes] == ["final#2"]


def test_replaced_parts_are_checked_and_written() -> None:
    recipe = parse(FASTV).replace(backbone="my/model", generate={"steps": 8})
    assert recipe.generate.steps == 8
    assert parse(recipe.to_yaml()) == recipe
    assert recipe == parse(FASTV, "backbone=my/model", "generate.steps=8")
    copied = recipe.model_copy(update={"generate": recipe.generate.model_copy(update={"seed": 3})})
    assert parse(copied.to_yaml()).generate.seed == 3
    assert parse(copied.to_yaml()).generate.steps == 8
    with pytest.raises(ProbeError, match=r"generate\.steps: should be a whole number"):
        recipe.replace(generate={"steps": "many"})


def test_recipes_are_frozen() -> None:
    with pytest.raises(ValidationError):
        parse(FASTV).name = "b"  # type: ignore[misc]


def test_loading_a_recipe_does_not_import_torch() -> None:
    code = "import sys, probe.recipe as r; r.load_recipe('fastv'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_recipe_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(FASTV)
    assert load_recipe(path) == parse(FASTV)
    assert load_recipe(str(path), ["keep=0.1"]) == parse(FASTV, "keep=0.1")
