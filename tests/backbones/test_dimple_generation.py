"""Dimple's decoder: each sample by itself, the whole batch as published, and every draw in the published order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dimple_checkpoint import write_dimple
from PIL import Image
from torch import Tensor, distributions

from probe.backbones import load
from probe.compile import ProbeTable
from probe.decoding.caching import Crop, NoCache
from probe.decoding.dimple import Dimple, Picked
from probe.decoding.draw import Draw
from probe.errors import ProbeError
from probe.generate import generate
from probe.generation import rule_for
from probe.loop import Rule
from probe.recipe import parse_recipe

SLOTS, STEPS = 8, 6


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(write_dimple(tmp_path_factory.mktemp("dimple")))


@pytest.fixture(scope="module")
def prompts(model):
    pictures = [Image.new("RGB", (90, 60), "red"), Image.new("RGB", (60, 120), "blue")]
    return [model.encode(pictures[:1], "What?"), model.encode([], "Who is there?"), model.encode(pictures, "Same?")]


def rule(unmasking: Dimple, *, caching: Any = None, **settings: Any) -> Rule:
    given = {"gen_length": SLOTS, "block_length": SLOTS, "steps": STEPS, "mask_id": 268} | settings
    return Rule(**given, unmasking=unmasking, caching=caching or NoCache())


@pytest.mark.parametrize("caching", [NoCache(), Crop()], ids=["none", "crop"])
@pytest.mark.parametrize(
    "settings",
    [
        {"threshold": 0.02},
        {"pipeline": "dream", "algorithm": "topk_margin"},
        {"pipeline": "dream", "algorithm": "origin"},
        {"algorithm": "origin", "threshold": 0.03},
        {"algorithm": "origin-ratio"},
        {"algorithm": "autoregressive"},
        {"algorithm": "entropy", "alg_temp": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("more", [{}, {"temperature": 0.7}, {"cfg_scale": 0.5}], ids=str)
def test_a_batch_equals_its_samples(settings, more, caching, model, prompts):
    asked = rule(Dimple(**settings), caching=caching, **more)
    together = generate(model, prompts, asked, ProbeTable(()), seed=3, samples=[5, 0, 9])
    for got, prompt, number in zip(together, prompts, [5, 0, 9], strict=True):
        alone = generate(model, [prompt], asked, ProbeTable(()), seed=3, samples=[number])[0]
        assert got.ids == alone.ids
        assert model.special.mask not in got.ids or settings["algorithm"] in ("autoregressive", "origin-ratio")


def test_a_pooled_batch_shares_its_count(model, prompts):
    """The first of 5 steps asks for a fifth, less a little: of 24 masks that is 4, of 8 masks three times 1."""
    first: list[Any] = []
    for pooled in (False, True):
        found: list[Any] = []
        asked = rule(Dimple(pooled=pooled), steps=5)
        generate(model, prompts, asked, ProbeTable(()), on_step=found.append)
        first.append(found[0])
    separate, pooled = first
    assert separate.counts == [1, 1, 1]
    assert separate.committed.sum(1).tolist() == [1, 1, 1]
    assert int(pooled.committed.sum()) == 4
    best = pooled.score.flatten().sort(descending=True).indices[:4]
    assert pooled.committed.flatten().nonzero().flatten().tolist() == best.sort().values.tolist()


def pick(policy: Dimple, logits: Tensor, step: int, *, seed: int = 0, at_start: int = 0, **settings: Any) -> Picked:
    generator = torch.Generator()
    generator.manual_seed(seed)
    leftmost = torch.arange(len(logits)) == 0
    return policy.pick(logits, leftmost, Draw(generator), step, at_start or len(logits), rule(policy, **settings))


def test_draws_are_those_of_torch():
    """Tokens from a categorical distribution, then slots, from one stream of numbers."""
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(1)) * 3
    for seed in range(20):
        torch.manual_seed(seed)
        tokens = distributions.Categorical(probs=(logits / 0.5).softmax(-1)).sample()
        order = torch.randperm(6)
        got = pick(Dimple(algorithm="origin", top_k=None), logits, 0, seed=seed, temperature=0.5)
        assert got.candidate.equal(tokens)
        assert got.commit.nonzero().flatten().tolist() == sorted(order[: int(got.commit.sum())].tolist())
        torch.testing.assert_close(got.score, logits.softmax(-1)[range(6), tokens])

        torch.manual_seed(seed)
        shown = torch.rand(6) < 1 - torch.linspace(1, 1e-3, STEPS + 1)[3] / torch.linspace(1, 1e-3, STEPS + 1)[2]
        dream = Dimple(pipeline="dream", algorithm="origin", top_k=None)
        got = pick(dream, logits, 2, seed=seed, temperature=0.5)
        assert got.commit.equal(shown)
        if shown.any():
            tokens = distributions.Categorical(probs=(logits[shown] / 0.5).softmax(-1)).sample()
            assert got.candidate[shown].equal(tokens)


def test_origin_ratio_goes_by_the_chance_of_the_grid():
    time = torch.linspace(1, 1e-3, STEPS + 1)
    for at_start, step, later in ((10, 0, 1), (20, 0, 4), (100, 0, 6)):
        logits, torch_seed = torch.randn(10, 5), 4
        chance = 1 - time[later] / (10 / at_start) if later < STEPS else torch.ones(())
        torch.manual_seed(torch_seed)
        want = torch.rand(10) < chance
        got = pick(Dimple(algorithm="origin-ratio"), logits, step, seed=torch_seed, at_start=at_start)
        assert got.commit.equal(want)


def test_order_by_chance():
    """`alg_temp` near 0 is the order of the scores; a large one lets every slot come first about as often."""
    logits = torch.randn(5, 30, generator=torch.Generator().manual_seed(2)) * 4
    want = pick(Dimple(), logits, 0, steps=5).commit
    assert int(want.sum()) == 1
    assert pick(Dimple(alg_temp=1e-4), logits, 0, steps=5).commit.equal(want)
    counts = torch.stack([pick(Dimple(alg_temp=1e4), logits, 0, seed=s, steps=5).commit for s in range(600)]).sum(0)
    assert counts.sum() == 600
    assert counts.min() > 80


def test_the_threshold_is_strict_and_the_last_step_takes_all():
    logits = torch.zeros(4, 2)
    logits[1, 0] = 5.0
    assert pick(Dimple(threshold=0.5, top_k=None), logits, 0).commit.tolist() == [False, True, False, False]
    assert pick(Dimple(threshold=0.499), logits, 0).commit.all()
    assert pick(Dimple(threshold=0.999), logits, STEPS - 1).commit.all()
    assert int(pick(Dimple(threshold=0.999), logits, 0).commit.sum()) == 1
    assert int(pick(Dimple(algorithm="entropy", threshold=0.01), logits, 0).commit.sum()) == 1


def test_a_grid_that_has_ended():
    """Fewer masks than the grid's end stands for: published as an error, unless a candidate is sure."""
    unsure, sure = torch.zeros(1, 5), torch.tensor([[9.0, 0, 0, 0, 0]])
    with pytest.raises(ProbeError, match="1 of 2000 answer slots are masked"):
        pick(Dimple(threshold=0.9), unsure, 0, at_start=2000)
    assert pick(Dimple(threshold=0.9), sure, 0, at_start=2000).commit.all()


def test_scores_of_a_small_nucleus():
    """One token is left of every row: its tempered probability is 1, its raw one is not."""
    logits = torch.randn(4, 9)
    assert (pick(Dimple(top_p=0.01, original_confidence=False), logits, 0).score == 1).all()
    raw = pick(Dimple(top_p=0.01), logits, 0).score
    torch.testing.assert_close(raw, logits.softmax(-1).amax(-1))
    assert (pick(Dimple(pipeline="dream", top_p=0.01), logits, 0).score == 1).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pipeline": "dream", "threshold": 0.5}, "pipeline `dream` has none"),
        ({"pipeline": "dream", "algorithm": "origin-ratio"}, "belongs to pipeline `dim`"),
    ],
)
def test_settings_that_mean_nothing(settings, message):
    with pytest.raises(ProbeError, match=message):
        rule(Dimple(**settings))


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("unmask: {dimple: {pipeline: dream, top_p: 0.01}}", Dimple(pipeline="dream", top_p=0.01)),
        (
            "unmask: {dimple: {algorithm: origin, threshold: 0.95, top_p: 0.95}}",
            Dimple(algorithm="origin", threshold=0.95, top_p=0.95),
        ),
    ],
)
def test_published_settings_as_a_recipe(text, want, model):
    """The settings that docs/backbones.md names for the published evaluation and for the README's example."""
    asked = rule_for(model, parse_recipe(f"schema: 1\nname: published\ngenerate: {{{text}}}\n"), {}, pictures=True)
    assert asked.unmasking == want


def test_a_recipe_takes_the_backbones_decoder_and_may_write_part_of_the_answer(model, prompts):
    asked = rule_for(model, parse_recipe("schema: 1\nname: plain\n"), {}, pictures=True)
    assert asked.unmasking == Dimple(threshold=0.95)
    assert asked.caching == Crop()
    assert (asked.gen_length, asked.steps, asked.stop) == (64, 64, ())
    text = "schema: 1\nname: prior\ngenerate: {answer: 'hello [MASK][MASK].', unmask: {dimple: {algorithm: origin}}}\n"
    asked = rule_for(model, parse_recipe(text), {}, pictures=True)
    assert asked.unmasking == Dimple(algorithm="origin")
    out = generate(model, prompts[:1], asked, ProbeTable(()))[0]
    hello, stop = model.tokenize("hello "), model.tokenize(".")
    assert out.ids[: len(hello)] == hello
    assert out.ids[-1:] == stop
    assert len(out.ids) == len(hello) + 3
    assert out.arrays["token"].shape[0] <= 3
