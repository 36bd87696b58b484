"""DiffusionGemma's sampler: every rule against the native one, and every step of native generations.

Generations run in float64: fed back through self-conditioning, rounding grows with every step, several times a step
in a model of random weights.
"""

from __future__ import annotations

import pytest
import torch
from gemma_checkpoint import (
    CASES,
    ENDS,
    IDS,
    Steps,
    Store,
    calm_copy,
    native,
    native_steps,
    processed,
    rows,
    soft_types,
    write_gemma,
)
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    EntropyBoundSampler,
    EntropyBoundSamplerConfig,
    LinearTemperatureScheduleLogitsProcessor,
    StableAndConfidentStoppingCriteria,
)

from probe.backbones import gemma_prompt as text
from probe.backbones import load
from probe.decoding import renoise

LETTERS = (len(IDS), 270)


@pytest.mark.parametrize("steps", [1, 5, 48])
def test_temperatures_are_the_native_ones(steps):
    schedule = LinearTemperatureScheduleLogitsProcessor(t_min=0.3, t_max=0.9, max_denoising_steps=steps)
    one = torch.ones(1)
    for step in range(steps):
        ours = one / renoise.temperature(step, steps, 0.3, 0.9)
        assert schedule(None, one, torch.tensor(steps - step, dtype=torch.int32)).equal(ours)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("bound", [1e-6, 0.1, 2.0, 1e3])
def test_acceptance_is_the_native_one(seed, bound):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 9, 40, generator=generator) * torch.rand(3, 9, 1, generator=generator) * 12
    logits[0, 0, 3:] = -torch.inf
    sampler = EntropyBoundSampler(EntropyBoundSamplerConfig(entropy_bound=bound), 9, 40, 5)
    sampler.accept_canvas(torch.zeros(3, 9).long(), torch.ones(3, 9).long(), logits, 1)
    accepted = renoise.accept(renoise.entropy(logits), bound)
    assert accepted.equal(sampler.accepted_token_mask)
    assert accepted.any(1).all() and (bound < 1e3 or accepted.all())
    distribution = torch.distributions.Categorical(logits=logits)
    assert renoise.entropy(logits).equal(distribution.entropy())


@pytest.mark.parametrize("stable", [0, 1, 3])
def test_stopping_is_the_native_one(stable):
    generator = torch.Generator().manual_seed(stable)
    theirs = StableAndConfidentStoppingCriteria(stability_threshold=stable, confidence_threshold=0.4)
    history = torch.full((stable, 2, 3), -1)
    seen = set()
    for step in range(40):
        if step % 5 == 0:
            logits = torch.randn(2, 3, 6, generator=generator) * (12 if step % 10 else 2)
        top = logits.argmax(-1)
        done = renoise.settled(history, top, renoise.entropy(logits), 0.4)
        assert done.equal(theirs(top, logits))
        history = torch.cat([history, top[None]])[1:] if stable else history
        seen |= set(done.tolist())
    assert seen == {True, False}


def our_steps(model, embeds, picture, seed, *, canvases, steps, bound, stable, sure, low=0.4, high=0.8, ends=ENDS):
    """The same with the adapter and `probe.decoding.renoise`: a stored prefix, canvas after canvas."""
    generator = torch.Generator().manual_seed(seed)
    width, size = model.facts.vocabulary, model.canvas_length
    seen, store = Steps(), Store()
    held, closed = None, embeds[None]
    for _ in range(canvases):
        start = 0 if held is None else held.position.shape[1]
        own = rows(closed.shape[1], start=start, picture=picture if held is None else None)
        key = own if held is None else held.then(own)
        store.keeps = True
        call = {"attention_mask": model.sees(own, key), "position_ids": model.row_ids(own)}
        model.lm(inputs_embeds=closed, past_key_values=store, **call)
        held, store.keeps = key, False
        canvas = torch.randint(0, width, (1, size), generator=generator)
        window = rows(0, size, start=start + closed.shape[1])
        history, previous = torch.full((stable, 1, size), -1), None
        for step in range(steps):
            call = {
                "attention_mask": model.sees(window, held.then(window)),
                "position_ids": model.row_ids(window),
            }
            shown = model.condition(model.embed(canvas), previous)
            hidden = model.lm(inputs_embeds=shown, past_key_values=store, **call).last_hidden_state
            previous = model.head(hidden) / renoise.temperature(step, steps, low, high)
            sampled = torch.multinomial(previous.softmax(-1).view(-1, width), 1, generator=generator).view(1, size)
            top = previous.argmax(-1)
            doubt = renoise.entropy(previous)
            noise = torch.randint(0, width, (1, size), generator=generator)
            canvas = torch.where(renoise.accept(doubt, bound), sampled, noise)
            seen.canvas.append(canvas)
            seen.top.append(top)
            seen.logits.append(previous)
            if renoise.settled(history, top, doubt, sure).item():
                break
            history = torch.cat([history, top[None]])[1:] if stable else history
        said = top[0].tolist()
        first = next((i for i, t in enumerate(said) if t in ends), None)
        seen.tokens += said if first is None else said[: first + 1] + [0] * (size - first - 1)
        if first is not None:
            break
        closed = model.embed(top)
    return seen


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_gemma(tmp_path_factory.mktemp("gemma"), dtype=torch.float64)


@pytest.fixture(scope="module")
def calm(folder, tmp_path_factory):
    """The same, with tokens that look nearly alike: predictions then hardly depend on the noise, and settle."""
    return calm_copy(folder, tmp_path_factory.mktemp("calm") / "gemma")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("pictures", [0, 2])
def test_every_step_of_native_generations(folder, calm, picture, case, seed, pictures):
    settings, weights = CASES[case], calm if case == "stable" else folder
    model, oracle = load(weights, experts="eager"), native(weights)
    oracle.set_experts_implementation("eager")
    prompt = model.encode([picture(20 + 7 * i, 17) for i in range(pictures)], "What?")
    ids = torch.where(prompt.ids < 0, IDS[text.PICTURE], prompt.ids)[None]
    given = {}
    if pictures:
        images = [picture(20 + 7 * i, 17) for i in range(pictures)]
        given = {**processed(images, model.grid), "mm_token_type_ids": soft_types(ids)}
    theirs = native_steps(
        oracle,
        ids,
        seed,
        max_new_tokens=settings["canvases"] * model.canvas_length,
        max_denoising_steps=settings["steps"],
        sampler_config=EntropyBoundSamplerConfig(entropy_bound=settings["bound"]),
        stability_threshold=settings["stable"],
        confidence_threshold=settings["sure"],
        eos_token_id=settings.get("ends", ENDS),
        **given,
    )
    group = torch.full_like(prompt.visual, -1)
    group[prompt.visual >= 0] = prompt.picture[prompt.visual[prompt.visual >= 0]].long()
    ours = our_steps(model, prompt.embeds, group, seed, **settings)
    assert len(ours.canvas) == len(theirs.canvas)
    # each case is about what its name says
    stopped = len(ours.canvas) < settings["canvases"] * settings["steps"]
    assert stopped == (case in ("stable", "confident", "ended"))
    assert (len(ours.tokens) < settings["canvases"] * model.canvas_length) == (case == "ended")
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)
    assert torch.cat(ours.top).equal(torch.cat(theirs.top))
    assert torch.cat(ours.canvas).equal(torch.cat(theirs.canvas))
    assert ours.tokens == theirs.tokens
