"""Wrong pruners: one message each, with the place, what is wrong there, and what would be right."""

from __future__ import annotations

import re

import pytest
from torch import Tensor

import probe
from probe.backbones import facts_of
from probe.compile import compile_recipe
from probe.composition import check_without_weights
from probe.errors import ProbeError
from probe.recipe import load_recipe, parse_recipe
from probe.registry import scores

HEAD = "schema: 1\nname: wrong\ndial: {keep: 25%}\nprobes:\n"
INPUT = "at: {site: layer.input, layer: 2}"
OUTPUT = "at: {site: layer.output, layer: 2}"
ENCODER = "at: {site: encoder.output}"
LOOK = "score: {attention: {layer: -1}}"
TOP = "select: {top_k: {keep: $keep}}"
PAIRS = "select: {greedy_diverse: {keep: 25%}}"


def pruner(*lines: str) -> str:
    """A recipe of one intervention."""
    return HEAD + "  - name: prune\n" + "".join(f"    {line}\n" for line in lines)


def random(select: str, do: str = "do: drop", at: str = OUTPUT) -> str:
    """The same with noise for a score."""
    return pruner(at, "score: random", select, do)


WRONG: dict[str, tuple[str, str, str, str]] = {
    # names: the recipe, what the place points at, what is wrong, what would be right
    "score": (
        pruner(INPUT, "score: {atention: {}}", TOP, "do: drop"),
        "{atention",
        "no score `atention`",
        "`attention`",
    ),
    "selection": (random("select: {topk: {keep: 1}}"), "{topk", "no selection `topk`", "`top_k`"),
    "operation": (random(TOP, "do: remove"), "remove", "no operation `remove`", "`drop`"),
    "site": (random(TOP, at="at: {site: layer.inputs, layer: 2}"), "layer.inputs", "no site", "`layer.input`"),
    "key of a probe": (random("sellect: all"), "sellect", "unknown key `sellect`", "`select`"),
    "key of at": (random(TOP, at="at: {site: final, step: first}"), "step:", "unknown key `step`", "`steps`"),
    "signal to wait for": (
        random(TOP, at="at: {site: before_lm, when: {signal: confidense, above: 0.5}}"),
        "confidense",
        "`confidense` is no signal",
        "`confidence`",
    ),
    "dial": (random("select: {top_k: {keep: $kep}}"), "$kep", "no dial `$kep`", "`keep`"),
    "parameter": (
        pruner(INPUT, "score: {attention: {layer: -1, query: last}}", TOP, "do: drop"),
        "query:",
        "unknown parameter `query`",
        "`queries`",
    ),
    "parameter of a part without any": (
        pruner(INPUT, "score: {random: {seed: 3}}", TOP, "do: drop"),
        "seed",
        "unknown parameter `seed`",
        "no parameters",
    ),
    "nested score": (
        pruner(OUTPUT, "score: features", "select: {bipartite: {r: 2, spare: atention}}", "do: merge"),
        "atention",
        "no score `atention`",
        "`attention`",
    ),
    # values
    "rows that look": (
        pruner(INPUT, "score: {attention: {layer: -1, queries: masks}}", TOP, "do: drop"),
        "masks",
        "masks",
        "`masked`",
    ),
    "class token in the language model": (
        pruner(OUTPUT, "score: {attention: {queries: cls}}", TOP, "do: drop"),
        "cls",
        "row of the image encoder",
        "masked",
    ),
    "choice": (random(TOP, "do: {drop: {lasts: forever}}"), "forever", "none of the choices", "`forward`"),
    "share above one": (random("select: {top_k: {keep: 1.5}}"), "1.5", "between 0 and 1", "written as an integer"),
    "percents above a hundred": (random("select: {top_k: {keep: 120%}}"), "120%", "between 0 and 1", "100%"),
    "fewer than none": (random("select: {top_k: {keep: -3}}"), "-3", "cannot keep -3", "at least 0"),
    "kind of count": (random("select: {top_k: {keep: {shar: 0.1}}}"), "{shar", "names one of", "`share`"),
    "number": (pruner(OUTPUT, "score: {norm: {p: high}}", TOP, "do: drop"), "high", "the text `high`", "a number"),
    "out of range": (random(TOP, "do: {recycle: {share: 1.5}}"), "1.5", "the number 1.5", "at most 1.0"),
    "heads": (
        pruner(OUTPUT, "score: {attention: {heads: median}}", TOP, "do: drop"),
        "median",
        "heads must be",
        "mean, max, sum",
    ),
    "fewer merges than none": (
        pruner(OUTPUT, "score: features", "select: {bipartite: {r: -1}}", "do: merge"),
        "-1",
        "the number -1",
        "at least 0",
    ),
    "layer": (random(TOP, at="at: {site: layer.input, layer: 9}"), "9", "no layer 9", "layers 0..5"),
    "layer of the encoder": (
        random(TOP, at="at: {site: encoder.layer.after_attention, layers: [0, 7]}"),
        "7",
        "no layer 7",
        "layers 0..2",
    ),
    "share of the steps": (
        random(TOP, at="at: {site: before_lm, steps: {at: [150%]}}"),
        "150%",
        "no share",
        "0% and 100%",
    ),
    "steps that never come": (
        random(TOP, at="at: {site: before_lm, steps: {from: 70%, to: 30%}}"),
        "30%",
        "never comes",
        "behind `from` (70%)",
    ),
    "steps that mean two things": (
        random(TOP, at="at: {site: before_lm, steps: 50%}"),
        "50%",
        "two things",
        "{from: 50%}",
    ),
    "list for layers": (
        random("select: {top_k: {keep: [0.5, 0.25]}}"),
        "[0.5",
        "2 values and the probe 1 layer",
        "one value per layer",
    ),
    "schedule": (random("select: {top_k: {keep: {10%: 0.5}}}"), "0.5", "the first share is 10%", "starts at 0%"),
    # what is missing
    "selection without score": (pruner(OUTPUT, TOP, "do: drop"), "{top_k", "needs a `score`", "`attention`"),
    "operation without selection": (
        pruner(OUTPUT, "score: random", "do: drop"),
        "name",
        "needs `select`",
        "shall stay",
    ),
    "no operation": (pruner(OUTPUT, "score: random", TOP), "name", "`do` is missing", "needs `select` and `do`"),
    "no place": (pruner("score: random", TOP, "do: drop"), "name", "at", "missing"),
    "no layer": (random(TOP, at="at: {site: layer.input}"), "{site", "once per layer", "`layer: 2` or `layers: all`"),
    "no count": (random("select: {top_k: {}}"), "{}", "needs the parameter", "`keep`"),
    "no selections inside": (random("select: {then: {of: []}}"), "[]", "is empty", "at least one"),
    "no test of a signal": (
        random(TOP, at="at: {site: before_lm, when: {signal: confidence}}"),
        "{signal",
        "exactly one",
        "above, below",
    ),
    # what does not go together
    "score of the wrong kind": (random(PAIRS), "random", "needs one number per pair", "`similarity`"),
    "pairs for a top": (
        pruner(OUTPUT, "score: similarity", TOP, "do: drop"),
        "similarity",
        "gives one number per pair",
        "`attention`",
    ),
    "nested score of the wrong kind": (
        pruner(OUTPUT, "score: {combine: {of: [random, similarity]}}", TOP, "do: drop"),
        "[random",
        "`similarity` gives one number per pair",
        "`attention`",
    ),
    "weights": (
        pruner(OUTPUT, "score: {combine: {of: [random, norm], weights: [1.0]}}", TOP, "do: drop"),
        "[1.0]",
        "2 scores, but 1 here",
        "one for each",
    ),
    "score that nobody reads": (
        random("select: {stride: {keep: 25%}}"),
        "random",
        "looks at no score",
        "remove `score`",
    ),
    "merge without a match": (random(TOP, "do: merge"), "{top_k", "`top_k` is none", "`assign: kept`"),
    "two counts": (
        pruner(OUTPUT, "score: features", "select: {bipartite: {r: 2, keep: 25%}}", "do: merge"),
        "25%",
        "not both",
        "one of",
    ),
    "rest of nothing": (random("select: {top_k: {keep: rest}}"), "rest", "there is none", "a combination around"),
    "rank of noise": (
        random("select: {top_k: {keep: {rank: {scale: 9, bias: 6}}}}"),
        "{rank",
        "attention rows",
        "must be `attention`",
    ),
    "recording and intervening": (
        pruner(OUTPUT, "score: random", TOP, "do: drop", "record: [hidden_norm]"),
        "random",
        "both records",
        "two probes",
    ),
    # the wrong place
    "attention outside of layers": (
        pruner("at: {site: before_lm}", "score: attention", TOP, "do: drop"),
        "attention",
        "inside the layers",
        "`layer.input`",
    ),
    "attention that is not there yet": (
        pruner(INPUT, "score: attention", TOP, "do: drop"),
        "attention",
        "not computed its attention",
        "`layer: -1`",
    ),
    "attention of a later layer": (
        pruner(OUTPUT, "score: {attention: {layer: 1}}", TOP, "do: drop"),
        "1}}",
        "layer 3 has not run",
        "negative",
    ),
    "before the first layer": (
        pruner("at: {site: layer.input, layer: 0}", LOOK, TOP, "do: drop"),
        "-1",
        "layer 0",
        "no previous layer",
    ),
    "attention of stored keys": (
        pruner("at: {site: prefix_cache, layer: 2}", "score: attention", TOP, "do: drop"),
        "attention",
        "attention is not to be had",
        "`similarity: {space: keys}`",
    ),
    "layer where there is none": (
        random(TOP, at="at: {site: before_lm, layer: 2}"),
        "2}",
        "has no layers",
        "remove `layer`",
    ),
    "where one only records": (random(TOP, at="at: {site: logits}"), "logits", "only be recorded", "`before_lm`"),
    "where one only resizes": (random(TOP, at="at: {site: images}"), "images", "`resize` alone", "`encoder.output`"),
    "operation elsewhere": (
        pruner(OUTPUT, "do: skip_layers"),
        "skip_layers",
        "not at `layer.output`",
        "acts at `layer.input`",
    ),
    "selection for what needs none": (
        pruner("at: {site: layer.attention, layer: 2}", "select: none", "do: {evict: {keep: 0.5}}"),
        "none",
        "looks at no selection",
        "remove `select`",
    ),
    "end of a step": (
        random(TOP, "do: {drop: {lasts: forward}}", at="at: {site: final}"),
        "forward",
        "the step is over",
        "`lasts: generation`",
    ),
    "views of the language model": (
        random(TOP, at="at: {site: final, views: tiles}"),
        "tiles",
        "only in the image encoder",
        "encoder.output",
    ),
    "steps of the encoder": (
        pruner("at: {site: encoder.output, steps: {from: 50%}}", "score: {attention: {queries: all}}", TOP, "do: drop"),
        "{from",
        "once, before the first step",
        "leave `steps` out",
    ),
    "class token that is not there": (
        pruner(ENCODER, "score: {attention: {queries: cls}}", TOP, "do: drop"),
        "{queries",
        "no class token",
        "`queries: all`",
    ),
    "answer in the encoder": (
        pruner(ENCODER, "score: {attention: {queries: masked}}", TOP, "do: drop"),
        "{queries",
        "language model's",
        "`all`",
    ),
    "question without a text tower": (
        pruner(ENCODER, "score: text_image", TOP, "do: drop"),
        "text_image",
        "no text tower",
        "folder `text_tower`",
    ),
    "hiding in the encoder": (
        pruner(ENCODER, "score: {attention: {queries: all}}", TOP, "do: mask"),
        "mask",
        "not in the encoder",
        "language model",
    ),
}


def said_of(text: str) -> str:
    with pytest.raises(ProbeError) as error:
        compile_recipe(parse_recipe(text, source="x.yaml"), facts_of("miniature"))
    return str(error.value)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_pruner_is_one_clear_message(name: str) -> None:
    text, place, wrong, right = WRONG[name]
    said = said_of(text)
    found = re.match(r"x\.yaml:(\d+):(\d+): (.*)", said)
    assert found, said
    assert "\n" not in said
    line, column, words = int(found[1]), int(found[2]), found[3]
    assert text.splitlines()[line - 1][column - 1 :].startswith(place), said
    assert wrong in words, said
    assert right in words, said


NO_CACHE: dict[str, tuple[str, str]] = {
    "prefill": (
        random(TOP, at="at: {site: layer.input, layer: 2, steps: prefill}"),
        "there is none: set `generate.cache`",
    ),
    "stored keys": (
        pruner("at: {site: prefix_cache, layer: -1}", "score: {similarity: {space: keys}}", PAIRS, "do: drop"),
        "there is no cache: set `generate.cache`",
    ),
}


@pytest.mark.parametrize("name", NO_CACHE)
def test_what_waits_for_a_cache_is_refused_before_anything_runs(name: str) -> None:
    text, wrong = NO_CACHE[name]
    with pytest.raises(ProbeError) as error:
        check_without_weights(parse_recipe(text, source="x.yaml"), facts_of("miniature"))
    assert re.match(r"x\.yaml:6:\d+: probe `prune`: ", str(error.value))
    assert wrong in str(error.value)
    check_without_weights(parse_recipe(text, sets=["generate.cache=prefix"]), facts_of("miniature"))


def test_looking_ahead_from_an_answer_that_a_prefill_has_not_is_refused() -> None:
    """On LaViDa by its own cache, elsewhere where one asks for it."""
    recipe = load_recipe("layer_skip_when_unseen")
    check_without_weights(recipe, facts_of("miniature"))
    for backbone, sets in (("miniature", ["generate.cache=prefix"]), ("jacklishufan/lavida-dream-v1.0-instruct", [])):
        chosen = recipe.with_sets([f"backbone={backbone}", *sets])
        with pytest.raises(ProbeError, match=r":\d+:\d+: probe `skip`: looks ahead from `answer` rows.*`prefix`"):
            check_without_weights(chosen, facts_of(backbone))


def test_rows_of_a_part_of_ones_own_are_checked_whatever_its_annotation() -> None:
    @probe.score
    def seen_by(received: Tensor, *, queries: str = "masked", layer: int = -1, form: str = "softmax") -> Tensor:
        return received.mean(0)

    try:
        said = said_of(pruner(INPUT, "score: {seen_by: {queries: maskd}}", TOP, "do: drop"))
    finally:
        del scores._entries["seen_by"]
    assert "score.seen_by.queries: `queries: maskd` is no set of rows; did you mean `masked`?" in said


def test_an_annotation_that_cannot_be_read_is_said_to_be_one() -> None:
    @probe.score
    def strange(hidden: Tensor, *, power: Unknown = 1.0) -> Tensor:  # type: ignore[name-defined]  # noqa: F821
        return hidden.sum(1)

    try:
        said = said_of(pruner(INPUT, "score: strange", TOP, "do: drop"))
    finally:
        del scores._entries["strange"]
    assert "the score `strange`" in said
    assert "`Unknown` is not defined" in said
