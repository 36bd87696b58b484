"""Recipes that want to break something: a message that says where, or a run that works; never a traceback."""

from __future__ import annotations

import collections
import copy
import random
import re
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hardship import samples_of, trials
from hypothesis import given, settings
from hypothesis import strategies as st

from probe.backbones.base import Prompt
from probe.compile import compile_recipe
from probe.errors import ProbeError
from probe.explain import explain
from probe.generate import generate
from probe.recipe import parse_recipe, shipped_recipes
from probe.recipe_yaml import dump_yaml, read_yaml
from probe.registry import Registry, operations, scores, selections, signals
from probe.runner import rule_for
from probe.site import Site

PLACED = re.compile(r"^(<string>|--set [^:]*|.*\.yaml)(:\d+:\d+)?: ")
ODD: list[Any] = [
    None, True, False, 0, 1, 2, 3, -1, -2, 7, 47, 143, 144, 192, 10**6, 2**31, 2**62, 2**63 - 1, -(2**63),
    0.0, -0.0, 0.25, 0.5, 1.0, 1.5, -0.5, 1e-300, 1e300, "", "a", "50%", "0%", "100%", "1e9%", "all", "first", "last",
    "mean", "max", "each", "answer", "masked", "filled", "visual", "question", "system", "last_prompt", "keep",
    "compact", "score", "raster", "generation", "forward", "$keep", "$nope", "$$x", [], [0], [0, 1], [[1]], {},
    {"0%": 1, "50%": 2}, {"0": 0.5, "4": 0.1}, {"from": 1, "to": 2, "every": 1}, {"at": [0]}, {"a": 1}, "x" * 300, "é",
]  # fmt: skip
GENERATE: dict[str, list[Any]] = {
    "gen_length": [1, 2, 3, 4, 8], "steps": [1, 2, 3, 4, 8, 100], "block_length": [1, 2, 4],
    "temperature": [0, 0.5, 1.0, 1e300, 1e-300], "remasking": ["random", "low_confidence", "x"],
    "cfg_scale": [0, 0.5, 3, 1e300], "stop": [[], ["a"], "x", [""]], "suffix": ["", "hello"], "seed": [0, 2**63 - 1],
}  # fmt: skip


def paths(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where every value of plain data stands."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from paths(value, (*path, key))
    if path:
        yield path


def a_part(rng: random.Random, registry: Registry) -> Any:
    """A word of the vocabulary with parameters, most of which are sensible."""
    name = rng.choice(registry.names())
    parameters: dict[str, Any] = {}
    for key, field in registry[name].params.model_fields.items():
        if rng.random() < 0.5 or field.is_required():
            words = [a for a in getattr(field.annotation, "__args__", ()) if isinstance(a, str | int)]
            keep = [0, 1, 2, 0.0, 0.01, 0.25, 0.5, 1.0, 47, 144, 10**9, "25%"]
            usual = keep if key == "keep" else words
            parameters[key] = copy.deepcopy(rng.choice(usual if usual and rng.random() < 0.9 else ODD))
    return {name: parameters} if parameters else name


def a_probe(rng: random.Random) -> dict[str, Any]:
    site = rng.choice(list(Site))
    at: dict[str, Any] = {"site": site.value}
    if site.has_layers:
        at |= rng.choice([{"layer": rng.choice([0, 2, 5, -1, "50%"])}, {"layers": rng.choice(["all", [0, 1], [5]])}])
    if rng.random() < 0.6:
        at["steps"] = rng.choice(["all", "first", "last", 0, [0, 1], {"from": "50%"}, {"to": 1}, {"at": ["0%"]}])
    if rng.random() < 0.45:
        return {"at": at, "record": [a_part(rng, signals) for _ in range(rng.randint(1, 2))]}
    probe: dict[str, Any] = {"at": at, "score": a_part(rng, scores), "select": a_part(rng, selections)}
    return probe | {"do": a_part(rng, operations)}


def a_recipe(rng: random.Random) -> str:
    """A recipe out of the vocabulary, or a shipped one, with up to two values replaced by odd ones."""
    if rng.random() < 0.4:
        data = copy.deepcopy(rng.choice([read_yaml(i.path.read_text(), "x").data for i in shipped_recipes()]))
    else:
        settings_ = {k: rng.choice(v) for k, v in GENERATE.items() if rng.random() < 0.3}
        data = {"schema": 1, "name": "odd", "generate": settings_}
        data["probes"] = [a_probe(rng) for _ in range(rng.randint(1, 3))]
    for _ in range(rng.choice([0, 0, 1, 2])):
        *head, last = rng.choice(list(paths(data)))
        place = data
        for key in head:
            place = place[key]
        place[last] = copy.deepcopy(rng.choice(ODD))
    return dump_yaml(data)


@pytest.fixture(scope="module")
def attempt(tiny: Any) -> Callable[[str], str]:
    """Parse, compile, explain and run a recipe on one sample: how far it came. Anything but a `ProbeError` fails."""
    sample = samples_of(1)[0]
    prompt: Prompt = tiny.encode(sample.images, sample.question)

    def act(text: str) -> str:
        stage, said = "parsed", ""
        try:
            recipe = parse_recipe(text)
            stage = "compiled"
            table = compile_recipe(recipe, tiny.facts)
            explain(recipe, tiny.facts, 144, steps=24)
            stage = "run"
            rule = rule_for(tiny, recipe, sample.generate, pictures=True)
            generate(tiny, [prompt], rule, table, seed=recipe.generate.seed, samples=[0])
        except ProbeError as error:
            said = str(error)
        assert not said or stage == "run" or PLACED.match(said), said
        return f"refused before it was {stage}" if said else "ran"

    return act


def campaign(attempt: Callable[[str], str], seeds: range) -> collections.Counter[str]:
    said: collections.Counter[str] = collections.Counter()
    for seed in seeds:
        text = a_recipe(random.Random(seed))
        start = time.monotonic()
        try:
            said[attempt(text)] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}\n{text}") from error
        assert time.monotonic() - start < 60, f"seed {seed} takes very long:\n{text}"
    return said


def test_odd_recipes_run_or_say_where(attempt: Callable[[str], str]) -> None:
    said = campaign(attempt, range(60))
    assert said["ran"] > 5 and said["refused before it was parsed"] > 5


@pytest.mark.slow
def test_campaign_odd_recipes(attempt: Callable[[str], str]) -> None:
    said = campaign(attempt, range(1000, 1000 + trials(20_000)))
    print(f"\nrecipes out of the vocabulary: {dict(said)}; no traceback")


@pytest.mark.slow
@settings(max_examples=trials(5000), deadline=None)
@given(st.sampled_from([i.path.read_text() for i in shipped_recipes()]), st.data())
def test_campaign_mutated_recipes(attempt: Callable[[str], str], text: str, data: st.DataObject) -> None:
    """Hypothesis cuts, doubles and replaces parts of the shipped recipes' text."""
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(start, min(len(text), start + 30)))
        middle = data.draw(st.sampled_from(["", text[start:end] * 2]) | st.text(max_size=12))
        text = text[:start] + middle + text[end:]
    attempt(text)


HEAD = "schema: 1\nname: bomb\n"
LAUGHS = "".join(f"{c}: &{c} [{','.join(['*' + p] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True))
BOMBS = {
    "aliases": f"{HEAD}a: &a [lol,lol,lol]\n{LAUGHS}",
    "an anchor of itself": f"{HEAD}dial: &x {{a: *x}}\n",
    "merge keys": f"{HEAD}dial: {{<<: {{a: 1}}}}\n",
    "deep lists": HEAD + "about: " + "[" * 100_000,
    "deep mappings": HEAD + "dial: " + "{a: " * 20_000,
    "deep indentation": HEAD + "".join(" " * i + f"a{i}:\n" for i in range(600)),
    "a huge whole number": f"{HEAD}dial: {{a: {'9' * 200_000}}}\n",
    "a huge exponent": f"{HEAD}dial: {{a: 1e999999999}}\n",
    "a number in base 60": f"{HEAD}dial: {{a: {':'.join(['59'] * 5000)}}}\n",
    "a long key": f"{HEAD}? {'k' * 200_000}\n: 1\n",
    "many keys": HEAD + "dial: {" + ",".join(f"a{i}: 1" for i in range(15_000)) + "}\n",
    "many documents": "---\n" * 60_000,
    "dials of dials": f"{HEAD}dial: {{a: [$b, $b], b: [$a, $a]}}\n",
    "a large dial, often": HEAD
    + "dial: {a: ["
    + "1," * 2000
    + "]}\nprobes:\n"
    + "- {at: {site: final}, record: $a}\n" * 2000,
    "a python object": f"{HEAD}about: !!python/object/apply:os.system ['touch pwned']\n",
    "a python name": f"{HEAD}about: !!python/name:os.system\n",
    "a binary": f"{HEAD}about: !!binary aGVsbG8=\n",
    "a tag of its own": f"%TAG ! tag:example.com,2000:\n---\n{HEAD}about: !x y\n",
    "a file of the system": f"{HEAD}include: [/etc/passwd]\n",
    "a file above": f"{HEAD}include: [../../../../../../etc/passwd]\n",
    "too many steps": f"{HEAD}generate: {{steps: 9223372036854775807}}\n",
    "too long an answer": f"{HEAD}generate: {{gen_length: 1000000000}}\n",
    "a long file": HEAD + "#" * (2 << 20),
    "control characters": f'{HEAD}about: "\\0\\x1b[2J"\n',
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_refused_quickly_and_cheaply(bomb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    try:
        recipe = parse_recipe(BOMBS[bomb])
    except ProbeError as error:
        said = str(error)
    else:  # these are valid, if strange
        assert bomb in ("many keys", "a number in base 60")
        assert all(v == 1 or isinstance(v, str) for v in recipe.dial.values())
        said = "<string>"
    assert said.startswith("<string>") and len(said) < 5000
    assert time.process_time() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024  # KiB
    assert not list(tmp_path.iterdir()), "nothing ran"


def test_a_link_does_not_lead_an_include_out_of_its_folder(tmp_path: Path) -> None:
    from probe.recipe import load_recipe

    secret = tmp_path / "secret.yaml"
    secret.write_text("schema: 1\nname: secret\n")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "link.yaml").symlink_to(secret)
    (tmp_path / "inner" / "r.yaml").write_text("schema: 1\nname: r\ninclude: [link.yaml]\n")
    with pytest.raises(ProbeError, match="lies outside the recipe's folder"):
        load_recipe(tmp_path / "inner" / "r.yaml")
