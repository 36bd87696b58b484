"""From a recipe to a table: layers, steps, values per layer and over the steps, and everything that is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recipe_helpers import FASTV, clock

from probe.compile import ProbeTable, Vocabulary, compile_recipe
from probe.errors import ProbeError
from probe.recipe import parse_recipe
from probe.recipe_at import Layers, Steps
from probe.recipe_words import Wrong
from probe.site import ModelFacts, Site


@pytest.fixture
def table(vocabulary: Vocabulary, facts: ModelFacts) -> Any:
    def make(text: str, *sets: str) -> ProbeTable:
        return compile_recipe(parse_recipe(text, source="x.yaml", sets=sets), facts, vocabulary=vocabulary)

    return make


def test_one_bound_probe_per_layer_in_the_recipes_order(table: Any) -> None:
    made = table(FASTV)
    assert [(p.name, p.layer) for p in made.probes] == [("prune", 2)] + [("layer.attention@all", i) for i in range(6)]
    prune, look = made.probes[:2]
    assert (prune.site, prune.line, prune.place) == (Site.LAYER_INPUT, 5, "x.yaml:5:5")
    assert prune.records == ()
    assert prune.edit.score.params(clock(0)) == {"layer": -1, "queries": "last", "flag": False}
    assert prune.edit.select.params(clock(0)) == {"keep": 0.5, "shares": None}
    assert prune.edit.do.params(clock(0)) == {"positions": "keep", "lasts": "forward"}
    assert look.edit is None
    assert [(r.name, r.signal.params(clock(0))["queries"]) for r in look.records] == [
        ("mass", "answer"),
        ("mass_last", "last"),
    ]
    assert made.variables == ("mass", "mass_last")
    assert made.edits == (prune,)


def test_the_table_says_who_fires_when(table: Any) -> None:
    made = table(FASTV, "start=50%")
    assert [p.name for p in made.at(clock(11))] == ["layer.attention@all"] * 6
    assert made.at(clock(12))[0].name == "prune"
    assert made.at(clock(12)) is made.at(clock(12))
    assert made.at(clock(2, nominal=4))[0].name == "prune"


# --- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "nominal", "fired"),
    [
        ("all", 4, [0, 1, 2, 3]),
        ("first", 4, [0]),
        ("last", 4, [3]),
        (2, 4, [2]),
        ([0, 3, 9], 4, [0, 3]),
        ({"from": 2}, 4, [2, 3]),
        ({"from": 0.5}, 4, [2, 3]),
        ({"from": "50%"}, 5, [3, 4]),  # two of five steps are not yet half of them
        ({"from": 0.0}, 3, [0, 1, 2]),
        ({"from": 1.0}, 3, []),
        ({"from": 1}, 3, [1, 2]),
        ({"from": 1, "to": 3}, 4, [1, 2]),
        ({"to": "50%"}, 4, [0, 1]),
        ({"every": 3}, 8, [0, 3, 6]),
        ({"from": 1, "every": 3}, 8, [1, 4, 7]),
        ({"from": "25%", "to": "75%", "every": 2}, 8, [2, 4]),
        ({"at": ["25%", "50%"]}, 8, [2, 4]),
        ({"at": "50%"}, 2, [1]),
        ({"at": ["first", 2, "last"]}, 6, [0, 2, 5]),
        ({"at": [0.1]}, 64, [7]),
    ],
)
def test_steps_mean_what_they_say(steps: Any, nominal: int, fired: list[int]) -> None:
    parsed = Steps.parse(steps)
    assert [s for s in range(nominal) if parsed.includes(s, nominal)] == fired
    assert Steps.parse(parsed.spelled()) == parsed


def test_an_adaptive_decoder_that_runs_longer_still_fires_open_spans() -> None:
    assert Steps.parse({"from": "50%"}).includes(30, 24)
    assert not Steps.parse("last").includes(30, 24)
    assert Steps.parse(30).includes(30, 24)


@given(st.integers(1, 200), st.floats(0, 1))
def test_a_share_of_the_steps_splits_them_without_gap_or_overlap(nominal: int, share: float) -> None:
    before, after = Steps.parse({"to": share}), Steps.parse({"from": share})
    for step in range(nominal):
        assert before.includes(step, nominal) != after.includes(step, nominal)
        if after.includes(step, nominal):
            assert step >= share * nominal - 1e-6


# --- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "count", "found"),
    [
        ("all", 3, [0, 1, 2]),
        ([0, 2], 3, [0, 2]),
        ([-1, 0], 3, [2, 0]),
        (["50%"], 6, [3]),
        (["50%"], 5, [2]),  # 2.5 is rounded to the even 2
        (["50%"], 7, [4]),  # 3.5 is rounded to the even 4
        (["100%"], 6, [5]),
        ([0.0], 6, [0]),
        ({"from": 2}, 5, [2, 3, 4]),
        ({"from": 1, "to": 4, "every": 2}, 5, [1, 3]),
        ({"from": "50%", "to": "100%"}, 6, [3, 4, 5]),
        ({"from": -2}, 6, [4, 5]),
        ({"to": -1}, 4, [0, 1, 2]),
    ],
)
def test_layers_mean_what_they_say(layers: Any, count: int, found: list[int]) -> None:
    parsed = Layers.parse(layers)
    assert list(parsed.resolve(count, "model")) == found
    assert Layers.parse(parsed.spelled()) == parsed


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([6], "there is no layer 6: model has layers 0..5"),
        ([-7], "there is no layer -7"),
        ([1, -5], "names layer 1 twice"),
        ({"from": 6}, "reaches beyond the model"),
        ({"to": 7}, "reaches beyond the model"),
        ({"from": 3, "to": 3}, "is empty"),
    ],
)
def test_layers_that_are_not_there_are_refused(layers: Any, words: str) -> None:
    with pytest.raises(Wrong, match=words):
        Layers.parse(layers).resolve(6, "model")


# --- values per layer and over the steps -----------------------------------------------------------------------------


def keeps(made: ProbeTable, step: int, nominal: int = 24) -> list[Any]:
    return [p.edit.select.params(clock(step, nominal))["keep"] for p in made.probes if p.edit]


def test_a_list_gives_one_value_per_layer(table: Any) -> None:
    made = table(FASTV, "probes.prune.at.layers=[2,4,5]", "keep=[300,200,25%]")
    assert keeps(made, 0) == [300, 200, 0.25]


def test_a_list_of_another_length_names_both_lengths(table: Any) -> None:
    with pytest.raises(ProbeError, match=r"3 values and the probe 2 layers \(`\$keep`, from --set"):
        table(FASTV, "probes.prune.at.layers=[2,4]", "keep=[1,2,3]")
    with pytest.raises(ProbeError, match="2 values and the probe 1 layer "):
        table(FASTV, "keep=[1,2]")


def test_a_schedule_changes_over_the_steps(table: Any) -> None:
    made = table(FASTV, "keep={0%: 1.0, 50%: 0.25, 0.75: 10}")
    assert [keeps(made, s)[0] for s in (0, 11, 12, 17, 18, 23, 40)] == [1.0, 1.0, 0.25, 0.25, 10, 10, 10]
    assert [keeps(made, s, 2)[0] for s in (0, 1)] == [1.0, 0.25]
    select = made.probes[0].edit.select
    assert not select.constant
    assert select.params(clock(3)) is select.params(clock(4))
    assert made.probes[0].edit.do.constant


def test_lists_and_schedules_combine(table: Any) -> None:
    made = table(FASTV, "probes.prune.at.layers=[2,4]", "keep=[0.5, {0%: 1.0, 50%: 0.25}]")
    assert (keeps(made, 0), keeps(made, 12)) == ([0.5, 1.0], [0.5, 0.25])
    made = table(FASTV, "probes.prune.at.layers=[2,4]", "keep={0%: [3, 4], 50%: 2}")
    assert (keeps(made, 0), keeps(made, 12)) == ([3, 4], [2, 2])


def test_two_schedules_in_one_part_have_the_breaks_of_both(table: Any) -> None:
    made = table(
        FASTV, "probes.prune.score.attention={layer: -1, queries: {0%: last, 50%: all}, flag: {0%: false, 25%: true}}"
    )
    seen = [made.probes[0].edit.score.params(clock(s)) for s in (0, 6, 12)]
    assert [(p["queries"], p["flag"]) for p in seen] == [("last", False), ("last", True), ("all", True)]


def test_a_list_for_a_parameter_that_is_a_list_is_just_that(table: Any) -> None:
    made = table(FASTV, "probes.prune.select.top={keep: 1, shares: [0.5, 0.25]}")
    assert made.probes[0].edit.select.params(clock(0))["shares"] == [0.5, 0.25]


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        ("{50%: 1}", "a schedule starts at 0%, but the first share is 50%"),
        ("{0%: 1, 50%: 2, 25%: 3}", "shares must rise, but 25% comes after 50%"),
        ("{0%: 1, 0.0: 2}", "shares must rise, but 0.0 comes after 0%"),
        ("{0%: 1, half: 2}", "a schedule's keys are shares of the steps such as 0% or 50%, not `half`"),
        ("{0%: 1, 100%: 2}", "after the last step"),
        ("{0%: 1, 120%: 2}", "is no share"),
        ("{0%: 1, 12: 2}", "is no share"),
        ("{0%: {0%: 1, 50%: 2}}", "a schedule cannot stand inside a schedule"),
        ("{0%: x}", "keep must be a share or a number"),
        ("{}", "keep must be a share or a number"),
        ("[]", "0 values and the probe 1 layer"),
    ],
)
def test_faulty_schedules_are_refused(keep: str, words: str, table: Any) -> None:
    with pytest.raises(ProbeError) as error:
        table(FASTV, f"keep={keep}")
    assert words in str(error.value)
    assert str(error.value).startswith("x.yaml:8:26: probe `prune`: select.top.keep")


def test_a_fault_inside_a_written_schedule_is_located(table: Any) -> None:
    with pytest.raises(ProbeError, match=r"^x\.yaml:8:39: probe `prune`: select\.top\.keep\.50%: keep must be"):
        table(FASTV.replace("$keep", "{0%: 1, 50%: x}"))


def test_recorded_signals_take_no_list_or_schedule(table: Any) -> None:
    with pytest.raises(ProbeError, match=r"record\[1\]\.mass\.queries: should be text, but is a list"):
        table(FASTV.replace("queries: last", "queries: [last]"))


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "layer: 2",
            "layer: 6",
            "x.yaml:6:36: probe `prune`: at.layer: there is no layer 6: miniature has layers 0..5",
        ),
        (
            "layers: all",
            "layers: [1, 7]",
            "x.yaml:10:45: probe `layer.attention@1,7`: at.layers[1]: there is no layer 7",
        ),
        (
            "attention: {layer",
            "atention: {layer",
            "x.yaml:7:12: probe `prune`: score: there is no score `atention`; did you mean `attention`?",
        ),
        (
            "select: {top",
            "select: {topp",
            "x.yaml:8:13: probe `prune`: select: there is no selection `topp`; did you mean `top`?",
        ),
        ("do: {drop", "do: {dorp", "x.yaml:9:9: probe `prune`: do: there is no operation `dorp`; did you mean `drop`?"),
        (
            "[mass,",
            "[masss,",
            "x.yaml:11:14: probe `layer.attention@all`: record[0]: there is no signal `masss`; did you mean `mass`?",
        ),
        (
            "layer: -1",
            "leyer: -1",
            "x.yaml:7:25: probe `prune`: score.attention.leyer: unknown parameter `leyer` of the score "
            "`attention`; did you mean `layer`?",
        ),
        (
            "layer: -1",
            "layer: -1.5",
            "x.yaml:7:32: probe `prune`: score.attention.layer: should be a whole number, but is the number -1.5",
        ),
        (
            "layer: -1",
            "layer: -1, queries: lst",
            "score.attention.queries: the text `lst` is none of the choices; did you mean `last`?",
        ),
        (
            "layer: -1",
            "layer: -1, flag: yes",
            "score.attention.flag: should be true or false, but is the text `yes` (yes, no, on and off are words here)",
        ),
        ("layer: -1", "layer: -1, flag: 1", "score.attention.flag: should be true or false, but is the number 1"),
        ("keep: $keep", "keep: true", "select.top.keep: should be a"),
        ("{keep: $keep}", "{}", "x.yaml:8:19: probe `prune`: select.top.keep: needs the parameter `keep`"),
        (
            "select: {top: {keep: $keep}}",
            "select: top",
            "x.yaml:8:13: probe `prune`: select.top.keep: needs the parameter `keep`",
        ),
        (
            "lasts: forward",
            "lasts: forwrd",
            "do.drop.lasts: the text `forwrd` is none of the choices; did you mean `forward`?",
        ),
        (
            "queries: last, as",
            "quries: last, as",
            "record[1].mass.quries: unknown parameter `quries` of the signal `mass`",
        ),
        (
            "layer.attention, layers: all",
            "logits",
            "record[0]: `mass` is recorded at `layer.attention`, not at `logits`",
        ),
        ("[mass,", "[entropy,", "record[0]: `entropy` is recorded at `logits` or `final`, not at `layer.attention`"),
        (
            "layer.input, layer: 2",
            "layer.attention, layer: 2",
            "x.yaml:6:16: probe `prune`: at.site: `layer.attention` can only be recorded; "
            "an intervention attaches at `before_lm`",
        ),
        ("layer.input, layer: 2", "logits", "`logits` can only be recorded"),
        ("layer: 2", "layer: 0", "x.yaml:7:32: probe `prune`: score.attention.layer: layer 0 has no previous layer"),
        ("layer: -1", "layer: -3", "layer 2 has no layer 3 before it"),
        ("layer: -1", "layer: 0", "layer 2 has not computed its attention yet at its input; use `layer: -1`"),
        ("{layer: -1}", "{}", "score.attention: layer 2 has not computed its attention yet at its input"),
        ("layer: -1", "layer: 1", "layer 3 has not run yet when layer 2 does"),
        ("layer.input, layer: 2", "before_lm", "attention is known only inside the layers, not at `before_lm`"),
        (
            "    score: {attention: {layer: -1}}\n",
            "",
            "x.yaml:7:13: probe `prune`: select: the selection `top` needs a `score` with one number per token",
        ),
        (
            "{attention: {layer: -1}}",
            "similarity",
            "score: the selection `top` needs one number per token (such as `attention`), "
            "but `similarity` gives one number per pair of tokens here",
        ),
        (
            "top: {",
            "diverse: {",
            "score: the selection `diverse` needs one number per pair of tokens (such as `similarity`), "
            "but `attention` gives one number per token here",
        ),
        ("{top: {keep: $keep}}", "none", "score: the selection `none` looks at no score; remove `score`"),
        ("    select: {top: {keep: $keep}}\n", "", "x.yaml:5:5: probe `prune`: `drop` needs `select`"),
    ],
)
def test_what_cannot_work_is_refused_with_its_place(old: str, new: str, message: str, table: Any) -> None:
    assert old in FASTV
    with pytest.raises(ProbeError) as error:
        table(FASTV.replace(old, new, 1))
    assert message in str(error.value)


@pytest.mark.parametrize("site", ["layer.after_attention", "layer.output"])
def test_a_layers_own_attention_is_known_after_it(site: str, table: Any) -> None:
    made = table(FASTV.replace("layer.input, layer: 2", f"{site}, layer: 0").replace("layer: -1", "layer: 0"))
    assert made.probes[0].edit.score.params(clock(0))["layer"] == 0


def test_a_per_token_reading_of_a_pairwise_score_fits_where_it_is_one(table: Any) -> None:
    made = table(FASTV.replace("{attention: {layer: -1}}", "{similarity: {stat: nearest}}"))
    assert made.probes[0].edit.score.entry.name == "similarity"
    with pytest.raises(ProbeError, match="per pair of tokens here"):
        table(FASTV.replace("{attention: {layer: -1}}", "{similarity: {stat: {0%: nearest, 50%: pairwise}}}"))


def test_an_operation_that_names_its_selection_needs_none(table: Any) -> None:
    made = table("schema: 1\nname: a\nprobes: [{at: {site: layer.input, layer: 50%}, do: withdraw}]\n")
    assert (made.probes[0].layer, made.probes[0].edit.select.entry.name) == (3, "none")


def test_at_final_only_later_steps_can_change(table: Any) -> None:
    text = "schema: 1\nname: a\nprobes: [{at: {site: final}, score: norm, select: {top: {keep: 1}}, do: %s}]\n"
    with pytest.raises(ProbeError, match=r"do\.drop\.lasts: at `final` the step is over"):
        table(text % "drop")
    assert table(text % "{drop: {lasts: generation}}").probes[0].layer is None


def test_a_missing_parameter_of_a_signal_is_named(table: Any) -> None:
    text = "schema: 1\nname: a\nprobes: [{at: {site: final}, record: [%s]}]\n"
    assert table(text % "{anywhere: {needed: 1}}").probes[0].records[0].name == "anywhere"
    with pytest.raises(ProbeError, match=r"record\[0\]\.anywhere\.needed: needs the parameter `needed`"):
        table(text % "anywhere")
