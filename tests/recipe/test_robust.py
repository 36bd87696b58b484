"""Whatever the bytes: a recipe or a `ProbeError`, never anything else."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from probe.compile import compile_recipe
from probe.errors import ProbeError
from probe.explain import explain
from probe.recipe import Recipe, parse_recipe, shipped_recipes
from probe.site import ModelFacts

FACTS = ModelFacts(name="miniature", layers=6, heads=4, width=64, vocabulary=100, encoder_layers=4)
SHIPPED = [info.path.read_text() for info in shipped_recipes()]
SNIPPETS = [
    *(
        "$keep",
        "$",
        "$$a",
        "50%",
        "150%",
        "-1",
        "1e-3",
        "1e999",
        "~",
        "true",
        "yes",
        "[]",
        "{}",
        "[[1]]",
        "{a: {b: c}}",
        "{0%: 1, 50%: 2}",
    ),
    *(
        "all",
        "first",
        "&a",
        "*a",
        "!!python/object:os.x",
        "---",
        "'",
        '"',
        "\t",
        "\n",
        ":",
        ": ",
        "- ",
        "#",
        ",",
        "}",
        "]",
        "\\",
        "\x00",
        "\ud800",
    ),
    *(
        "99999999999999999999",
        "0.5",
        "2",
        "layer.input",
        "final",
        "record: [entropy]",
        "score: norm",
        "include: [fastv]",
        "schema: 1",
        "é",
        "𝄞",
    ),
]


def attempt(act: Callable[[], Any]) -> Any:
    """What `act` returns, or None when it refuses with a message that says where."""
    try:
        return act()
    except ProbeError as error:
        message = str(error)
    assert message.startswith(("<string>", "--set")) or ".yaml:" in message
    return None


def survives(text: str | bytes) -> None:
    recipe = attempt(lambda: parse_recipe(text))
    if recipe is None:
        return
    assert isinstance(recipe, Recipe)
    assert parse_recipe(recipe.to_yaml()) == recipe
    assert parse_recipe(recipe.without_interventions().to_yaml()) == recipe.without_interventions()
    if attempt(lambda: compile_recipe(recipe, FACTS)) is not None:
        assert explain(recipe, FACTS, 144, steps=24)


def mutate(text: str, rng: random.Random) -> str:
    for _ in range(rng.randint(1, 3)):
        kind = rng.randrange(5)
        at = rng.randrange(len(text) + 1)
        if kind == 0:  # something put in
            text = text[:at] + rng.choice(SNIPPETS) + text[at:]
        elif kind == 1:  # some characters lost
            text = text[:at] + text[at + rng.randint(1, 6) :]
        elif kind == 2:  # a value replaced
            values = [i for i, c in enumerate(text) if c == ":"]
            if values:
                start = rng.choice(values) + 1
                end = min((text.find(c, start) for c in ",}\n" if text.find(c, start) > 0), default=len(text))
                text = f"{text[:start]} {rng.choice(SNIPPETS)}{text[end:]}"
        elif kind == 3:  # a line lost, or doubled
            lines = text.split("\n")
            line = rng.randrange(len(lines))
            lines[line : line + 1] = [] if rng.random() < 0.5 else [lines[line]] * 2
            text = "\n".join(lines)
        else:  # a line indented otherwise
            lines = text.split("\n")
            line = rng.randrange(len(lines))
            lines[line] = " " * rng.randint(0, 4) + lines[line].lstrip()
            text = "\n".join(lines)
    return text


@settings(max_examples=250, deadline=None)
@given(st.sampled_from(SHIPPED), st.integers(0, 2**32))
def test_mutated_recipes_are_recipes_or_errors(text: str, seed: int) -> None:
    survives(mutate(text, random.Random(seed)))


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60) | st.binary(max_size=60))
def test_random_text_is_an_error(text: str | bytes) -> None:
    survives(text)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from([*SNIPPETS, "a", "schema: 1\nname: a\n", "probes:\n", " "]), max_size=12).map("".join))
def test_random_yaml_is_a_recipe_or_an_error(text: str) -> None:
    survives(text)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(SHIPPED), st.text("abkeplayrs.=$[]{}%012 :", max_size=20))
def test_random_sets_are_a_recipe_or_an_error(text: str, change: str) -> None:
    recipe = attempt(lambda: parse_recipe(text, sets=[change]))
    if recipe is not None:
        assert parse_recipe(recipe.to_yaml()) == recipe
