"""Re-noised canvases through the loop: every step of native generations, caches, batches, ends, guidance, draws."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gemma_checkpoint import (
    CASES,
    ENDS,
    IDS,
    calm_copy,
    native,
    native_steps,
    noise_picture,
    processed,
    soft_types,
    write_gemma,
)  # fmt: skip
from transformers.models.diffusion_gemma.generation_diffusion_gemma import EntropyBoundSamplerConfig

from probe.backbones import gemma_prompt as text
from probe.backbones import load
from probe.backbones.base import Backbone, Prompt
from probe.canvas import make_canvas
from probe.compile import ProbeTable
from probe.decoding.caching import Blocks, NoCache
from probe.decoding.confidence import Confidence
from probe.decoding.draw import Draw, draws
from probe.decoding.policy import Ask, Decision, State
from probe.decoding.renoise import CANVAS, Renoise
from probe.errors import ProbeError
from probe.generation import rule_for
from probe.loop import Finished, Rule, Step, denoise
from probe.recipe import parse_recipe
from probe.site import Phase
from probe.tracer import Tracer

CACHES = pytest.mark.parametrize("caching", [NoCache(), Blocks()], ids=["none", "blocks"])
EMPTY = "schema: 1\nname: test\nprobes:\n- {at: {site: logits}, record: [confidence]}\n"
CLOSE = {"atol": 2e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def exact(tmp_path_factory: Any) -> Path:
    """Fed back through self-conditioning, rounding grows with every step; so these weights are float64."""
    return write_gemma(tmp_path_factory.mktemp("gemma64"), dtype=torch.float64)


@pytest.fixture(scope="module")
def calm(exact: Path, tmp_path_factory: Any) -> Path:
    return calm_copy(exact, tmp_path_factory.mktemp("calm64") / "gemma")


@pytest.fixture(scope="module")
def model(exact: Path) -> Backbone:
    return load(exact, experts="eager")


@pytest.fixture(scope="module")
def prompts(model: Backbone) -> list[Prompt]:
    """Of three lengths, with two pictures, none and one."""
    two = [noise_picture(20, 17), noise_picture(31, 12)]
    return [model.encode(two, "Same?"), model.encode([], "Who is there?"), model.encode(two[:1], "What?")]


def rule(model: Backbone, unmasking: Renoise | None = None, **settings: Any) -> Rule:
    given = {"gen_length": 15, "block_length": 5, "steps": 12, "caching": NoCache()} | settings
    return Rule(
        **given, mask_id=model.special.mask, vocabulary=model.facts.vocabulary, unmasking=unmasking or Renoise()
    )


@torch.inference_mode()
def run(
    model: Backbone, prompts: list[Prompt], asked: Rule, seed: int = 0, samples: list[int] | None = None
) -> tuple[list[Step], Finished, Tracer]:
    numbers = samples or list(range(len(prompts)))
    canvas = make_canvas(prompts, model.embed(torch.tensor(asked.mask_id)), asked.gen_length)
    tracer = Tracer(model, ProbeTable(()), canvas, seeds=numbers)
    *steps, end = denoise(canvas, tracer, asked, model.embed, draws(seed, numbers))
    assert isinstance(end, Finished)
    return steps, end, tracer  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class Watched(Renoise):
    """Keeps what stands on the canvas after every pass, and the logits that the next one is told."""

    canvas: list[torch.Tensor] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)

    def decide(self, state: State, ask: Ask, logits: torch.Tensor) -> Decision:
        decision = super().decide(state, ask, logits)
        self.canvas.append(state.memory[CANVAS].show)
        self.logits.append(state.memory[CANVAS].previous)
        return decision


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("pictures", "caching"), [(0, NoCache()), (2, Blocks())], ids=["none", "blocks"])
def test_every_step_is_that_of_the_native_generation(
    caching: Any, case: str, pictures: int, exact: Path, calm: Path
) -> None:
    said, folder = CASES[case], calm if case == "stable" else exact
    model, oracle = load(folder, experts="eager"), native(folder)
    oracle.set_experts_implementation("eager")
    images = [noise_picture(20 + 7 * i, 17) for i in range(pictures)]
    prompt = model.encode(images, "What?")
    ids = torch.where(prompt.ids < 0, IDS[text.PICTURE], prompt.ids)[None]
    given = {**processed(images, model.grid), "mm_token_type_ids": soft_types(ids)} if images else {}
    ends = said.get("ends", ENDS)
    theirs = native_steps(
        oracle,
        ids,
        3,
        max_new_tokens=said["canvases"] * 5,
        max_denoising_steps=said["steps"],
        sampler_config=EntropyBoundSamplerConfig(entropy_bound=said["bound"]),
        stability_threshold=said["stable"],
        confidence_threshold=said["sure"],
        eos_token_id=ends,
        **given,
    )
    watched = Watched(
        entropy_bound=said["bound"], stability_threshold=said["stable"], confidence_threshold=said["sure"]
    )
    asked = rule(
        model,
        watched,
        gen_length=5 * said["canvases"],
        steps=said["steps"] * said["canvases"],
        stop=tuple((i,) for i in ends),
        caching=caching,
    )
    steps, end, _ = run(model, [prompt], asked, seed=3)
    assert len(steps) == len(theirs.top)
    stopped = len(steps) < asked.steps
    assert stopped == (case in ("stable", "confident", "ended"))  # each case is about what its name says
    for step, canvas, logits, *expected in zip(
        steps, watched.canvas, watched.logits, theirs.top, theirs.canvas, theirs.logits, strict=True
    ):
        top, show, told = expected
        torch.testing.assert_close(logits.double(), told, atol=1e-5, rtol=1e-5)
        assert step.candidate.equal(top)
        assert canvas.equal(top if step.committed.any() else show)
        assert step.committed.all() == step.committed.any()
    first = next((i for i, token in enumerate(theirs.tokens) if token in ends), len(theirs.tokens))
    assert end.output == [theirs.tokens[:first]]
    assert (first < len(theirs.tokens)) == (case == "ended")


@pytest.mark.parametrize("which", [[0], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("scale", [0.0, 0.7])
def test_a_cache_changes_nothing(which: list[int], scale: float, model: Backbone, prompts: list[Prompt]) -> None:
    chosen = [prompts[i] for i in which]
    plain, end, _ = run(model, chosen, rule(model, cfg_scale=scale), samples=which)
    stored, same, tracer = run(model, chosen, rule(model, cfg_scale=scale, caching=Blocks()), samples=which)
    assert end.output == same.output
    for a, b in zip(plain, stored, strict=True):
        torch.testing.assert_close(a.logits, b.logits, **CLOSE)
    longest = max(len(p.ids) for p in chosen)
    assert [max(r) for r in tracer.rows] == [longest + 5, 5, 5, 5, *[10, 5, 5, 5] * 2]
    assert [s.clock.phase for s in stored] == [Phase.PREFILL, *[Phase.DENOISE] * 11]


@CACHES
def test_a_batch_is_its_samples(caching: Any, model: Backbone, prompts: list[Prompt]) -> None:
    """Also where samples are done, and over, in different passes."""
    settings = {"entropy_bound": 50.0, "stability_threshold": 0, "confidence_threshold": 2.2}
    asked = rule(model, Renoise(**settings), steps=27, stop=tuple((i,) for i in range(40, 60)), caching=caching)
    together, end, _ = run(model, prompts, asked, samples=[4, 1, 7])
    lengths = set()
    for b, number in enumerate([4, 1, 7]):
        alone, ended, _ = run(model, [prompts[b]], asked, samples=[number])
        assert end.output[b] == ended.output[0] and end.stop_at[b] == ended.stop_at[0]
        took_part = [s for s in together if s.active[b]]
        assert len(took_part) == len(alone)
        lengths.add(len(alone))
        for ours, theirs in zip(took_part, alone, strict=True):
            torch.testing.assert_close(ours.logits[b], theirs.logits[0], **CLOSE)
            assert (ours.tokens[b] == theirs.tokens[0]).all()
            assert ours.committed[b].equal(theirs.committed[0])
    assert len(lengths) > 1


def test_an_answer_ends_at_the_first_end_of_any_kind(model: Backbone, prompts: list[Prompt]) -> None:
    plain = run(model, prompts[:1], rule(model))[1].output[0]
    stop = ((plain[8],), (plain[6],), (999,))
    assert plain.index(plain[6]) == 6 and plain.index(plain[8]) == 8
    steps, end, _ = run(model, prompts[:1], rule(model, stop=stop))
    assert end.output[0] == plain[:6] and end.stop_at == [6]
    assert {s.clock.block for s in steps} == {0, 1}


def test_guidance_between_equal_prompts_is_none(model: Backbone, prompts: list[Prompt]) -> None:
    """The unguided stream sees the same noise and is told the same logits; here it also has the same prompt."""
    blank = model.embed(torch.full((9,), model.special.mask))
    role, visual = prompts[1].role[:9], torch.full((9,), -1)
    prompt = replace(prompts[1], embeds=blank, ids=prompts[1].ids[:9], role=role, visual=visual)
    plain, _, _ = run(model, [prompt], rule(model))
    guided, _, _ = run(model, [prompt], rule(model, cfg_scale=1.5))
    for a, b in zip(plain, guided, strict=True):
        torch.testing.assert_close(a.logits, b.logits, **CLOSE)
    other, _, _ = run(model, prompts[1:2], rule(model, cfg_scale=1.5))
    unguided, _, _ = run(model, prompts[1:2], rule(model))
    assert (other[0].logits - unguided[0].logits).abs().max() > 0.1


def test_what_is_written_when(model: Backbone, prompts: list[Prompt]) -> None:
    """Slots are masked until their canvas is done, then all of it is the arg-max; nothing is written twice."""
    steps, end, _ = run(model, prompts[2:], rule(model))
    mask = model.special.mask
    for i, step in enumerate(steps):
        block, last = divmod(i, 4)
        assert (step.clock.block, step.clock.step_in_block, step.clock.step) == (block, last, i)
        assert step.slots == list(range(5 * block, 5 * block + 5))
        done = 5 * (block + (last == 3))
        assert (step.tokens[0, done:] == mask).all() and step.tokens[0, :done].tolist() == end.output[0][:done]
        assert step.committed.all() == (last == 3) and step.eligible.all()
        assert step.candidate.equal(step.logits.argmax(-1))
        top = step.logits.double().softmax(-1).amax(-1)
        torch.testing.assert_close(step.confidence, top)


def test_inversion_draws_from_the_same_distribution() -> None:
    logits = 2 * torch.randn(1, 3, 6, generator=torch.Generator().manual_seed(1))
    ask = Ask(np.arange(3), np.ones((1, 3), bool), [0], [True], 0, (0, 3))
    counts: dict[str, torch.Tensor] = {}
    for kind in ("inversion", "multinomial"):
        state: Any = type("State", (), {"draw": [Draw(torch.Generator().manual_seed(5))]})
        drawn = [Renoise(sample=kind)._drawn(state, ask, logits) for _ in range(2000)]  # type: ignore[arg-type]
        counts[kind] = torch.stack([torch.nn.functional.one_hot(s[0], 6) for s, _ in drawn]).double().mean(0)
        noise = torch.stack([n for _, n in drawn]).flatten()
        assert (noise.bincount(minlength=6) / len(noise) - 1 / 6).abs().max() < 0.03
    p = logits[0].double().softmax(-1)
    for share in counts.values():
        assert (share - p).abs().max() < 5 * (0.25 / 2000) ** 0.5


def test_inversion_decodes(model: Backbone, prompts: list[Prompt]) -> None:
    one = run(model, prompts[:1], rule(model, Renoise(sample="inversion")))[1].output[0]
    assert one == run(model, prompts[:1], rule(model, Renoise(sample="inversion"), caching=Blocks()))[1].output[0]
    assert len(one) == 15


@pytest.mark.parametrize(
    ("unmasking", "settings", "message"),
    [
        ({}, {"vocabulary": None}, "must say the `vocabulary`"),
        ({}, {"gen_length": 14}, "no multiple of block_length"),
        ({}, {"steps": 10}, "steps 10 is no multiple of the 3 blocks"),
        ({}, {"temperature": 0.7}, "temperature 0.7: `renoise` has a schedule of its own"),
        ({}, {"remasking": "random"}, "remasking `random`"),
        ({}, {"prior": ((1, 5),)}, "no part of the answer can be given"),
        ({"t_min": 0.9}, {}, "t_min 0.9, t_max 0.8"),
        ({"t_min": 0.0, "t_max": 0.0}, {}, "t_max above 0 would do"),
        ({"stability_threshold": -1}, {}, "stability_threshold -1"),
    ],
)
def test_rules_that_make_no_sense(unmasking: Any, settings: Any, message: str) -> None:
    given = {"gen_length": 15, "block_length": 5, "steps": 12, "mask_id": 4, "vocabulary": 9} | settings
    with pytest.raises(ProbeError, match=message):
        Rule(**given, unmasking=Renoise(**unmasking))


def test_the_cache_is_for_blocks_that_are_done() -> None:
    asked = Rule(gen_length=10, block_length=5, steps=4, mask_id=4, unmasking=Confidence(), caching=Blocks())
    with pytest.raises(ProbeError, match="for decoders that finish one block"):
        asked.caching.check(asked, 0)


def test_the_checkpoints_own_rule(model: Backbone) -> None:
    recipe = parse_recipe(EMPTY)
    for pictures in (False, True):
        asked = rule_for(model, recipe, {}, pictures=pictures)
        assert (asked.gen_length, asked.block_length, asked.steps, asked.vocabulary) == (5, 5, 6, 272)
        assert asked.unmasking == Renoise() and asked.caching == Blocks()
        assert asked.stop == tuple((i,) for i in ENDS)
    own = parse_recipe(EMPTY + "generate: {unmask: {renoise: {entropy_bound: 0.3, sample: inversion}}, stop: []}\n")
    asked = rule_for(model, own, {}, pictures=True)
    assert asked.unmasking == Renoise(entropy_bound=0.3, sample="inversion") and asked.stop == ()
