"""Autoregressive baselines: prompts, forward passes and greedy answers against transformers' own classes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_autoregressive import FAMILIES, native_inputs, native_model, native_processor

from probe import attend
from probe.backbones import facts_of, load, visual_count
from probe.backbones.splice import IMAGE
from probe.canvas import make_canvas
from probe.compile import ProbeTable
from probe.decoding.autoregressive import Autoregressive
from probe.decoding.caching import KeyValue
from probe.decoding.draw import draws
from probe.decoding.policy import Caching
from probe.errors import ProbeError
from probe.loop import Rule, denoise
from probe.probe_code import CodeProbe, run_traced
from probe.recipe_at import Steps
from probe.site import Clock, Role
from probe.tracer import Tracer

SIZES = [(50, 90), (90, 50), (31, 29), (200, 40), (64, 64)]


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    rng = np.random.default_rng([seed, *size])
    return Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


class Pair:
    """An adapter and its oracle on the same weights."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model = folder, load(folder, attention="eager")
        self.native, self.processor = native_model(folder), native_processor(folder)

    def inputs(self, images: list[Image.Image], question: str) -> dict[str, torch.Tensor]:
        return native_inputs(self.processor, images, question)

    @torch.no_grad()
    def forward(self, images: list[Image.Image], question: str) -> Any:
        return self.native(**self.inputs(images, question), output_hidden_states=True, output_attentions=True)

    @torch.no_grad()
    def greedy(self, images: list[Image.Image], question: str, most: int) -> list[int]:
        inputs = self.inputs(images, question)
        said = self.native.generate(**inputs, max_new_tokens=most, do_sample=False)[0]
        return said[inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(FAMILIES[request.param](tmp_path_factory.mktemp("autoregressive") / request.param))


def positions(model: Any, prompt: Any) -> torch.Tensor:
    count = torch.arange(prompt.ids.shape[0]) if prompt.position is None else prompt.position
    return model.position_ids(count[None])


@torch.no_grad()
def run_lm(model: Any, prompt: Any, **more: Any) -> torch.Tensor:
    """Final-normed rows `(length, width)` of a prompt alone."""
    given = {"inputs_embeds": prompt.embeds[None], "position_ids": positions(model, prompt), **more}
    return model.lm(**given).last_hidden_state[0]


SAMPLES = {
    "one": ([SIZES[0]], "What is it?"),
    "wide": ([SIZES[1]], "Read the page."),
    "thin": ([SIZES[3]], "And now?"),
    "three": ([SIZES[2], SIZES[0], SIZES[4]], "Which one is larger?"),
    "none": ([], "Who are you?"),
}


@pytest.mark.parametrize("sample", SAMPLES)
def test_prompt_and_forward_are_the_native_ones(pair: Pair, sample: str) -> None:
    sizes, question = SAMPLES[sample]
    images = [picture(size, i) for i, size in enumerate(sizes)]
    inputs, native = pair.inputs(images, question), pair.forward(images, question)
    prompt = pair.model.encode(images, question)
    ids = inputs["input_ids"][0]
    assert torch.where(prompt.ids == IMAGE, pair.model.picture_id, prompt.ids).equal(ids)
    assert prompt.n_visual == int((ids == pair.model.picture_id).sum()) == visual_count(pair.folder, sizes)
    torch.testing.assert_close(prompt.embeds, native.hidden_states[0][0], atol=1e-5, rtol=1e-5)
    seen: dict[int, torch.Tensor] = {}
    handles = [
        x.layer.register_forward_hook(lambda m, a, out, i=i: seen.setdefault(i, out))
        for i, x in enumerate(pair.model.layers)
    ]
    last = run_lm(pair.model, prompt)
    for handle in handles:
        handle.remove()
    assert len(seen) == pair.model.facts.layers
    for i in range(pair.model.facts.layers - 1):
        torch.testing.assert_close(seen[i], native.hidden_states[i + 1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(pair.model.head(last), native.logits[0], atol=1e-4, rtol=1e-4)


def test_roles_views_and_boxes(pair: Pair) -> None:
    images = [picture(SIZES[0]), picture(SIZES[1])]
    prompt = pair.model.encode(images, "What is it?")
    there = prompt.visual >= 0
    assert prompt.visual[there].tolist() == list(range(prompt.n_visual))
    assert (prompt.role[: int(there.nonzero()[0])] == Role.SYSTEM).all()
    assert (prompt.role[~there][int(there.nonzero()[0]) :] == Role.QUESTION).all()
    assert ((prompt.role == Role.VISUAL) | (prompt.role == Role.NEWLINE)).equal(there)
    newline = prompt.role[there] == Role.NEWLINE
    assert prompt.box.isnan().all(1).equal(newline)
    seen = prompt.box[~newline]
    assert seen.min() == 0
    assert seen.max() == 1
    assert sorted(set(prompt.picture.tolist())) == [0, 1]
    assert (prompt.view.diff()[prompt.picture.diff() == 1] == 1).all()
    for number in (0, 1):  # a base view (or the only one) covers its picture
        first = prompt.view == prompt.view[prompt.picture == number].min()
        box = prompt.box[first & ~newline]
        assert ((box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])).sum() == pytest.approx(1, abs=1e-5)
    assert pair.model.tokenizer.decode(prompt.ids[prompt.role == Role.QUESTION].tolist()).count("What is it?") == 1
    alone = pair.model.encode([], "What is it?")
    asked = pair.model.tokenizer.decode(alone.ids[alone.role == Role.QUESTION].tolist())
    assert asked.startswith("What is it?")


def test_a_token_sees_what_its_box_says(pair: Pair) -> None:
    """Features change where the picture changes, at the tokens whose boxes lie there most of all."""
    plain = Image.new("RGB", (64, 64), (120, 120, 120))
    changed = plain.copy()
    changed.paste((255, 0, 0), (0, 0, 15, 15))
    before, after = (pair.model.encode([image], "?") for image in (plain, changed))
    moved = (before.embeds - after.embeds).norm(dim=-1)[before.visual >= 0]
    there = (before.box[:, 2] <= 0.26) & (before.box[:, 3] <= 0.26)
    far = (before.box[:, 0] > 0.7) & (before.box[:, 1] > 0.7)
    assert there.any() and far.any()
    assert moved[there].mean() > 2 * moved[far].mean()


def test_pictures_stand_where_the_question_names_them(pair: Pair) -> None:
    images = [picture(SIZES[2]), picture(SIZES[4])]
    prompt = pair.model.encode(images, "Is <image> like <image>?")
    text = pair.model.tokenizer.decode(prompt.ids.clamp(min=0)[prompt.visual < 0].tolist())
    assert "Is  like ?" in text
    first, second = (prompt.visual[prompt.visual >= 0][prompt.picture == n] for n in (0, 1))
    begin, end = (int((prompt.visual == v).nonzero()[0]) for v in (first.max(), second.min()))
    assert " like " in pair.model.tokenizer.decode(prompt.ids[begin + 1 : end].tolist())
    with pytest.raises(ProbeError, match="names 1 place"):
        pair.model.encode(images, "Is <image> so?")
    with pytest.raises(ProbeError, match="no picture is given"):
        pair.model.encode([], "Is <image> so?")
    with pytest.raises(ProbeError, match="2 places for 1"):
        pair.model.encode(images[:1], "Is <image> like <image>?")
    own = pair.model.tokenizer.strings([pair.model.picture_id])[0]
    with pytest.raises(ProbeError, match="places for 1"):
        pair.model.encode(images[:1], f"Is {own} like {own}?")


def answer(
    model: Any, prompts: list[Any], caching: Any, gen: int = 12, **rule: Any
) -> tuple[list[list[int]], Any, Any]:
    """Greedy answers through the loop, its steps, and the tracer."""
    settings = {"mask_id": model.special.mask, "unmasking": Autoregressive(), "caching": caching} | rule
    with torch.inference_mode():
        whole = Rule(gen_length=gen, block_length=gen, steps=gen, **settings)
        canvas = make_canvas(prompts, model.embed(torch.tensor(whole.mask_id)), gen)
        tracer = Tracer(model, ProbeTable(()), canvas)
        *steps, end = denoise(canvas, tracer, whole, model.embed, draws(0, list(range(len(prompts)))))
    return end.output, steps, tracer


@pytest.mark.parametrize("caching", [Caching(), KeyValue()], ids=["none", "kv"])
@pytest.mark.parametrize("sample", ["one", "three", "none"])
def test_greedy_answers_are_the_native_ones(pair: Pair, sample: str, caching: Caching) -> None:
    sizes, question = SAMPLES[sample]
    images = [picture(size, i) for i, size in enumerate(sizes)]
    wanted = pair.greedy(images, question, 12)
    prompt = pair.model.encode(images, question)
    stop = tuple((i,) for i in (pair.model.special.eos, *pair.model.tokenize(pair.model.defaults.stop[-1])))
    (got,), steps, _ = answer(pair.model, [prompt], caching, stop=stop)
    ended = wanted[-1] in {i for (i,) in stop}
    assert got == (wanted[:-1] if ended else wanted)
    assert len(steps) == len(wanted), "one step per token, the one that ends the answer included"


def test_an_answer_ends_where_the_native_one_does(pair: Pair, tmp_path: Path) -> None:
    """Some greedy token is made the one that ends answers."""
    images = [picture(SIZES[0])]
    said = pair.greedy(images, "What is it?", 12)
    end = said[2]
    wanted = said[: said.index(end)]
    (got,), steps, _ = answer(pair.model, [pair.model.encode(images, "What is it?")], KeyValue(), stop=((end,),))
    assert got == wanted
    assert len(steps) == len(wanted) + 1


@pytest.mark.parametrize("caching", [Caching(), KeyValue()], ids=["none", "kv"])
def test_a_batch_equals_its_samples(pair: Pair, caching: Caching) -> None:
    asked = [([SIZES[0]], "What is it?"), ([], "Who?"), ([SIZES[2], SIZES[1]], "Same?")]
    prompts = [pair.model.encode([picture(s) for s in sizes], question) for sizes, question in asked]
    together, steps, _ = answer(pair.model, prompts, caching)
    for b, prompt in enumerate(prompts):
        alone, own, _ = answer(pair.model, [prompt], caching)
        assert together[b] == alone[0]
        for one, other in zip(steps, own, strict=True):
            torch.testing.assert_close(one.logits[b], other.logits[0], atol=1e-4, rtol=1e-4)


def test_a_cached_step_computes_one_row(pair: Pair) -> None:
    prompt = pair.model.encode([picture(SIZES[0])], "What is it?")
    rows: list[int] = []
    hook = pair.model.layers[0].layer.register_forward_hook(lambda m, a, out: rows.append(out.shape[1]))
    answer(pair.model, [prompt], KeyValue(), gen=4)
    answer(pair.model, [prompt], Caching(), gen=3)
    hook.remove()
    length = prompt.ids.shape[0]
    assert rows == [length, 1, 1, 1, length, length + 1, length + 2]


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_attention_rows_are_the_native_maps(pair: Pair, kernel: str) -> None:
    """Rows asked for beside the kernel, with no mask given, are rows of transformers' eager causal attention."""
    images = [picture(SIZES[0])]
    model, native = load(pair.folder, attention=kernel), pair.forward(images, "What is it?")
    prompt = model.encode(images, "What is it?")
    rows = torch.tensor([[0, 5, prompt.ids.shape[0] - 1]])
    for i, modules in enumerate(model.layers):
        got: list[torch.Tensor] = []
        attend.ask(modules.attention, [attend.RowRequest(rows, "softmax", lambda w, first, got=got: got.append(w))])
        run_lm(model, prompt)
        attend.forget(modules.attention)
        torch.testing.assert_close(got[0], native.attentions[i][:, :, rows[0]], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_masks_of_every_form_stay_causal(pair: Pair, kernel: str) -> None:
    model = load(pair.folder, attention=kernel)
    prompt = model.encode([picture(SIZES[2])], "What is it?")
    n = prompt.ids.shape[0]
    plain = run_lm(model, prompt)
    square = torch.ones(n, n, dtype=torch.bool).tril()
    for mask in (torch.ones(1, n, dtype=torch.bool), torch.ones(1, n), square[None, None]):
        torch.testing.assert_close(run_lm(model, prompt, attention_mask=mask), plain, atol=1e-4, rtol=1e-4)
    seen = torch.rand(1, n) > 0.3
    seen[:, 0] = True
    wanted = run_lm(model, prompt, attention_mask=(square & seen)[None, None])
    torch.testing.assert_close(run_lm(model, prompt, attention_mask=seen), wanted, atol=1e-4, rtol=1e-4)
    assert (wanted - plain).abs().max() > 1e-3


class Plain:
    """The least that the adapter contract asks of a cache."""

    def __init__(self) -> None:
        self.held: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        if layer_idx in self.held:
            key, value = (torch.cat([a, b], 2) for a, b in zip(self.held[layer_idx], (key, value), strict=True))
        self.held[layer_idx] = key, value
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.held[layer_idx][0].shape[2] if layer_idx in self.held else 0


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_any_cache_gives_what_computing_every_row_gives(pair: Pair, kernel: str) -> None:
    model = load(pair.folder, attention=kernel)
    prompt = model.encode([picture(SIZES[2])], "What is it?")
    at, cache = positions(model, prompt), Plain()
    wanted, got, n = run_lm(model, prompt), [], prompt.ids.shape[0]
    cuts = [0, n // 2, n // 2 + 1, n - 1, n]
    for first, last in itertools.pairwise(cuts):
        part = {"inputs_embeds": prompt.embeds[None, first:last], "position_ids": at[..., first:last]}
        got.append(model.lm(**part, past_key_values=cache).last_hidden_state[0])
    torch.testing.assert_close(torch.cat(got), wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_rotary_tables_are_those_of_the_layers(pair: Pair) -> None:
    prompt = pair.model.encode([picture(SIZES[0])], "What is it?")
    tables: list[Any] = []
    hook = pair.model.layers[0].layer.register_forward_pre_hook(
        lambda m, a, kwargs: tables.append(kwargs["position_embeddings"]), with_kwargs=True
    )
    run_lm(pair.model, prompt)
    hook.remove()
    count = torch.arange(prompt.ids.shape[0]) if prompt.position is None else prompt.position
    for got, wanted in zip(pair.model.rotary(prompt.embeds[None], count[None]), tables[0], strict=True):
        torch.testing.assert_close(got, wanted, atol=0, rtol=0)


@torch.inference_mode()
def test_code_runs_inside_the_forward(pair: Pair) -> None:
    prompt = pair.model.encode([picture(SIZES[0])], "What is it?")

    def middle(model: Any, clock: Clock) -> Any:
        """The second layer's output."""
        return model.layers[1].output.save()

    inputs = {"inputs_embeds": prompt.embeds[None], "position_ids": positions(pair.model, prompt), "use_cache": False}
    clock = Clock(0, 0, 0, 0, 1, 1)
    hidden, saved = run_traced(pair.model, inputs, [CodeProbe("middle", middle, Steps.parse("all").fires)], clock)
    torch.testing.assert_close(hidden[0], run_lm(pair.model, prompt), atol=1e-5, rtol=1e-5)
    native = pair.forward([picture(SIZES[0])], "What is it?")
    torch.testing.assert_close(saved["middle"], native.hidden_states[2], atol=1e-4, rtol=1e-4)


def test_facts_without_weights_and_what_the_adapter_says_of_itself(pair: Pair) -> None:
    model = pair.model
    assert facts_of(pair.folder) == model.facts
    assert (model.shift, model.causal, model.batches) == (1, True, True)
    assert len(model.encoder_layers) == model.facts.encoder_layers
    assert len(model.layers) == model.facts.layers
    ends = pair.native.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    assert model.special.eos == model.special.stop == ends[0]
    assert model.special.mask not in ends, "open slots must not look like the end of an answer"
    assert [model.tokenize(s) for s in model.defaults.stop] == [[i] for i in ends]
    assert list(model.defaults.unmask) == ["autoregressive"]
    assert list(model.defaults.cache) == ["kv"]
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training
    assert model.decode([*model.tokenize(" A word."), *ends]) == "A word."


def test_encoding_costs_what_torch_counts(pair: Pair) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    images = [picture(SIZES[0]), picture(SIZES[3])]
    with FlopCounterMode(display=False) as counter:
        features = pair.model.encode_images(images)
    assert pair.model.encode_flops(features) == counter.get_total_flops()


def test_half_precision(pair: Pair) -> None:
    model = load(pair.folder, dtype="bfloat16")
    prompt = model.encode([picture(SIZES[0])], "What is it?")
    assert prompt.embeds.dtype == model.dtype == torch.bfloat16
    assert model.head(run_lm(model, prompt)).dtype == torch.float32


def test_what_a_model_lacks_is_said(pair: Pair) -> None:
    if pair.model.clip_id == pair.model.picture_id:
        with pytest.raises(ProbeError, match="takes no clips"):
            pair.model.encode_video([picture(SIZES[0])] * 2)
    with pytest.raises(ProbeError, match="no thinking switch"):
        pair.model.encode([], "Who?", think=True)
    with pytest.raises(ProbeError, match="no picture to encode"):
        pair.model.encode_images([])
