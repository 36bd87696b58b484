"""DiffusionGemma's checkpoints, pictures, prompts and answers."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy as copy_of
from itertools import pairwise

import numpy as np
import pytest
import torch
from gemma_checkpoint import ENDS, IDS, TEMPLATE, TEXT, VISION, native, write_gemma, write_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.models.gemma4.image_processing_pil_gemma4 import (
    Gemma4ImageProcessorPil,
    get_aspect_ratio_preserving_size,
)

from probe.backbones import diffusion_gemma_config as names
from probe.backbones import facts_of, gemma_prompt, known_backbones, load, visual_count
from probe.backbones.checkpoint import WEIGHTS
from probe.backbones.diffusion_gemma_config import Grid
from probe.errors import ProbeError
from probe.site import Role


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_gemma(tmp_path_factory.mktemp("gemma"))


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the checkpoint to spoil."""
    return shutil.copytree(folder, tmp_path / "copy")


def edit(folder, name, change):
    path = folder / name
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


# -- checkpoints ------------------------------------------------------------------------------------------------


def test_the_written_layout_is_the_published_one(folder):
    stored = load_file(folder / WEIGHTS)
    halves = {k.split(".")[1] for k in stored}
    assert halves == {"decoder", "encoder"} and "lm_head.weight" not in stored
    language = [k for k in stored if k.startswith("model.encoder.language_model.")]
    assert sorted(language) == [f"model.encoder.language_model.layers.{i}.layer_scalar" for i in range(4)]
    values = [k for k in stored if k.endswith("self_attn.v_proj.weight") and ".decoder." in k]
    assert len(values) == 2  # full attention has none


def test_every_weight_is_the_native_one(model, folder):
    theirs = native(folder).state_dict()
    from probe.backbones.diffusion_gemma_modules import published_name

    ours = {published_name(k): v for k, v in model.state_dict().items()}
    assert ours.keys() <= theirs.keys()
    assert all(v.equal(theirs[k]) for k, v in ours.items())


def test_shards_are_the_same_model(model, tmp_path):
    split = load(write_gemma(tmp_path / "split", shard="50KB"))
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 1
    assert all(v.equal(model.state_dict()[k]) for k, v in split.state_dict().items())


def test_the_published_spelling_of_full_layers(model, copy):
    """`global_head_dim` and `num_global_key_value_heads` instead of what `save_pretrained` writes today."""

    def respell(config):
        text = config["text_config"]
        del text["per_layer_config"]
        text["global_head_dim"], text["num_global_key_value_heads"] = 16, 1

    edit(copy, "config.json", respell)
    assert all(v.equal(model.state_dict()[k]) for k, v in load(copy).state_dict().items())


def test_types(folder):
    half = load(folder, dtype="bfloat16")
    assert {v.dtype for v in half.state_dict().values()} == {torch.bfloat16}
    assert half.lm.rotary_emb.full_attention_inv_freq.dtype == torch.float32
    assert half.head(torch.zeros(1, 32, dtype=torch.bfloat16)).dtype == torch.float32


def test_buffers_are_the_native_ones(model, folder):
    theirs = native(folder)
    for name, value in theirs.model.decoder.rotary_emb.named_buffers():
        assert model.lm.rotary_emb.get_buffer(name).equal(value)
    assert model.lm.embed_tokens.embed_scale.equal(theirs.model.decoder.embed_tokens.embed_scale)
    ours = model.vision_tower.encoder.rotary_emb.inv_freq
    assert ours.equal(theirs.model.encoder.vision_tower.encoder.rotary_emb.inv_freq)
    assert not any(p.is_meta for p in [*model.parameters(), *model.buffers()])


def test_defaults_come_from_the_checkpoint(model, copy):
    given = model.defaults
    assert (given.gen_length, given.block_length, given.steps) == (5, 5, 6)
    assert given.stop == ("<eos>", "<turn|>", "<|tool_response>")
    assert given.cache == {"blocks": {}}
    assert dict(given.unmask["renoise"]) == names.SAMPLING
    edit(copy, "generation_config.json", lambda g: g.update(max_new_tokens=11, t_max=0.9))
    changed = load(copy).defaults
    assert (changed.gen_length, changed.block_length, changed.steps) == (15, 5, 18)
    assert changed.unmask["renoise"]["t_max"] == 0.9
    (copy / "generation_config.json").unlink()
    plain = load(copy)
    assert plain.defaults.steps == names.DENOISING_STEPS and plain.ends == (1,)
    assert dict(plain.defaults.unmask["renoise"]) == names.SAMPLING


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.decoder.norm.weight"), r"1 missing: model.decoder.norm.weight \[32\]"),
        (lambda w: w.update({"lm_head.weight": torch.zeros(2)}), r"1 unexpected: lm_head.weight \[2\]"),
        (
            lambda w: w.update({"model.encoder.language_model.layers.2.layer_scalar": torch.zeros(2)}),
            r"1 of another shape: model.encoder.language_model.layers.2.layer_scalar \[2\] instead of \[1\]",
        ),
    ],
)
def test_weights_that_do_not_fit(copy, change, message):
    weights = load_file(copy / WEIGHTS)
    change(weights)
    save_file(weights, copy / WEIGHTS)
    with pytest.raises(ProbeError, match=message):
        load(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(tie_word_embeddings=False), "must share their weights"),
        (lambda c: c["text_config"].update(use_bidirectional_attention="all"), "supported: null, 'vision'"),
        (lambda c: c["text_config"].update(num_experts=None), "lacks num_experts"),
        (lambda c: c["text_config"].update(hidden_size="wide"), "unusable|usable|does not describe"),
        (lambda c: c.pop("vision_config"), "has no `vision_config`"),
        (lambda c: c["text_config"].pop("num_hidden_layers"), "lacks a usable 'num_hidden_layers'"),
    ],
)
def test_configs_that_are_refused(copy, change, message):
    edit(copy, "config.json", change)
    with pytest.raises(ProbeError, match=message):
        load(copy)


def test_other_mistakes(folder, copy):
    with pytest.raises(ProbeError, match="attention='flash_attention_2'"):
        load(folder, attention="flash_attention_2")
    edit(copy, "processor_config.json", lambda p: p["image_processor"].update(patch_size=16))
    with pytest.raises(ProbeError, match="patches of 16 pixels and pools 3, the encoder 2 and 3"):
        load(copy)
    edit(copy, "generation_config.json", lambda g: g.update(sampler_config={"_cls_name": "Other"}))
    edit(copy, "processor_config.json", lambda p: p["image_processor"].update(patch_size=2))
    with pytest.raises(ProbeError, match="sampler 'Other' is not known"):
        load(copy)


def test_without_a_tokenizer(tmp_path):
    model = load(write_gemma(tmp_path / "bare", tokenizer=False))
    assert model.special.mask == 4 and model.defaults.stop == ()
    with pytest.raises(ProbeError, match=r"has no tokenizer: put tokenizer.json"):
        model.tokenize("x")


def test_sizes_without_weights(folder, copy):
    facts = facts_of(folder)
    assert (facts.layers, facts.heads, facts.width, facts.vocabulary, facts.encoder_layers) == (4, 4, 32, 272, 2)
    assert TEXT["num_hidden_layers"] == 4 and VISION["num_hidden_layers"] == 2
    (copy / WEIGHTS).unlink()
    assert facts_of(copy).layers == 4 and visual_count(copy, [(30, 30)]) == 9
    published = facts_of(names.PUBLISHED_NAME)
    assert (published.layers, published.width, published.encoder_layers) == (30, 2816, 27)
    assert visual_count(names.PUBLISHED_NAME, [(640, 480)]) == 19 * 14
    assert names.PUBLISHED_NAME in {b.name for b in known_backbones()}


# -- pictures ---------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.sampled_from([70, 140, 280, 560, 1120]),
    st.sampled_from([(16, 3), (2, 3), (14, 2)]),
)
def test_sizes_are_the_native_ones(width, height, most, cell):
    patch, pool = cell
    across, down = Grid(patch, pool, most).fit(width, height)
    native_size = get_aspect_ratio_preserving_size(height, width, patch, most * pool**2, pool)
    assert (down * patch * pool, across * patch * pool) == native_size
    assert 1 <= across * down <= most


@pytest.mark.parametrize("size", [(50, 33), (7, 90), (300, 10), (64, 64)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_patches_are_the_native_ones(picture, size, mode):
    image = picture(*size).convert(mode)
    processor = Gemma4ImageProcessorPil(patch_size=2, max_soft_tokens=70)
    expected = processor(image, return_tensors="pt")
    pixels, places = gemma_prompt.patches(image, Grid(2, 3, 70))
    n = len(pixels)
    assert int(expected["num_soft_tokens_per_image"]) * 9 == n
    assert expected["pixel_values"][0, :n].equal(pixels)
    assert expected["image_position_ids"][0, :n].equal(places)
    assert (expected["image_position_ids"][0, n:] == -1).all()


def test_soft_tokens_are_the_native_ones(model, folder, picture):
    """One by one and unpadded, against one padded batch."""
    images = [picture(31, 17), picture(12, 40), picture(20, 20)]
    pixels, places = torch.zeros(3, 108, 12), torch.full((3, 108, 2), -1)
    for i, image in enumerate(images):
        cut, at = gemma_prompt.patches(image, model.grid)
        pixels[i, : len(cut)], places[i, : len(at)] = cut, at
    with torch.no_grad():
        expected = native(folder).model.encoder.get_image_features(pixels, places).pooler_output
    torch.testing.assert_close(model.encode_images(images).projected[0], expected, atol=2e-5, rtol=2e-5)


def test_boxes_tile_the_picture_in_raster_order():
    box = gemma_prompt.boxes(4, 3)
    assert box.shape == (12, 4)
    assert torch.allclose(((box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])).sum(), torch.tensor(1.0))
    assert box[0].tolist() == [0, 0, 0.25, pytest.approx(1 / 3)]
    order = [(round(float(y) * 3), round(float(x) * 4)) for x, y, *_ in box]
    assert order == sorted(order) == [(y, x) for y in range(3) for x in range(4)]


def test_a_soft_token_sees_its_box(model):
    """Without attention, blacking out one cell of a picture changes the token whose box it is, and no other."""
    model = copy_of(model)
    for layer in model.vision_tower.encoder.layers:
        layer.self_attn.o_proj.linear.weight.zero_()
    across, down = model.grid.fit(30, 20)
    size = across * model.grid.cell, down * model.grid.cell
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    whole = model.encode_images([Image.fromarray(noise)])
    assert whole.layout == ((across, down),)
    for i, (x0, y0, x1, y1) in enumerate(gemma_prompt.boxes(across, down).tolist()):
        cut = noise.copy()
        cut[round(y0 * size[1]) : round(y1 * size[1]), round(x0 * size[0]) : round(x1 * size[0])] = 0
        changed = model.encode_images([Image.fromarray(cut)]).projected[0] - whole.projected[0]
        assert (changed.norm(dim=-1) > 1e-3).nonzero().flatten().tolist() == [i]


def test_nothing_to_encode(model):
    with pytest.raises(ProbeError, match="no picture to encode"):
        model.encode_images([])
    with pytest.raises(ProbeError, match="0x3 pixels"):
        Grid(2, 3, 12).fit(0, 3)


# -- prompts ----------------------------------------------------------------------------------------------------


def expanded(prompt, counts, tokenizer):
    """As the native processor does it: the text is expanded, then tokenised."""
    pieces = prompt.split("<|image|>")
    out = pieces[0]
    for count, piece in zip(counts, pieces[1:], strict=True):
        out += "<|image>" + "<|image|>" * count + "<image|>" + piece
    return tokenizer.encode_bare(out)


@pytest.mark.parametrize("think", [False, True])
@pytest.mark.parametrize("pictures", [0, 1, 2])
def test_ids_and_roles(model, picture, think, pictures):
    images = [picture(20 + 9 * i, 17) for i in range(pictures)]
    prompt = model.encode(images, " What is it? ", think=think)
    message = [{"type": "image"}] * pictures + [{"type": "text", "text": " What is it? "}]
    rendered = model.tokenizer.template([{"role": "user", "content": message}], enable_thinking=think)
    assert ("<|think|>" in rendered) == think
    counts = [a * d for a, d in (model.grid.fit(*i.size) for i in images)]
    ids = expanded(rendered, counts, model.tokenizer)
    assert torch.where(prompt.ids < 0, IDS["<|image|>"], prompt.ids).tolist() == ids
    assert prompt.n_visual == sum(counts) == int((prompt.visual >= 0).sum())
    assert prompt.visual[prompt.visual >= 0].tolist() == list(range(sum(counts)))
    assert (prompt.role == int(Role.VISUAL)).equal(prompt.visual >= 0)
    assert prompt.picture.tolist() == [i for i, n in enumerate(counts) for _ in range(n)] == prompt.view.tolist()
    role = prompt.role.tolist()
    first = role.index(int(Role.VISUAL)) if pictures else ids.index(model.tokenize("W")[0])
    assert set(role[:first]) == {int(Role.SYSTEM)} and int(Role.SYSTEM) not in role[first:]
    if pictures:
        assert ids[first - 1] == IDS["<|image>"]
        soft = model.encode_images(images).projected[0]
        assert prompt.embeds[prompt.visual >= 0].equal(soft)
    assert prompt.embeds[0].equal(model.embed(torch.tensor(IDS["<bos>"])))
    assert prompt.position is None


def test_places_in_the_question(model, picture):
    images = [picture(20, 17), picture(17, 20)]
    prompt = model.encode(images, "First <image> then <image> done")
    begin, end = (prompt.ids.tolist().index(IDS[t]) for t in ("<|turn>", "<turn|>"))
    said = [i for i in prompt.ids[begin:end].tolist() if i >= 0 and i not in (IDS["<|image>"], IDS["<image|>"])]
    assert model.tokenizer.decode(said) == "user\nFirst\nthen\ndone"
    role = prompt.role.tolist()
    assert sum(1 for a, b in pairwise(role) if b == Role.VISUAL != a) == 2
    assert prompt.role[prompt.ids.tolist().index(model.tokenize("F")[0])] == Role.SYSTEM
    with pytest.raises(ProbeError, match="names 1 places"):
        model.encode(images, "Only <image> here")


def test_without_a_template(tmp_path, picture):
    model = load(write_gemma(tmp_path / "plain", template=None))
    prompt = model.encode([picture(20, 17)], "Hi")
    ids = [IDS["<bos>"], IDS["<|turn>"], *model.tokenize("user\n"), IDS["<|image>"]]
    assert prompt.ids[: len(ids)].tolist() == ids
    tail = [IDS["<image|>"], *model.tokenize("Hi"), IDS["<turn|>"], *model.tokenize("\n"), IDS["<|turn>"]]
    assert prompt.ids[-len(tail) - len(model.tokenize("model\n")) :][: len(tail)].tolist() == tail
    thinking = model.encode([], "Hi", think=True)
    assert thinking.ids[:2].tolist() == [IDS["<bos>"], IDS["<|turn>"]] and IDS["<|think|>"] in thinking.ids.tolist()


def test_a_template_that_begins_otherwise_gets_the_tokenizers_start(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    write_tokenizer(other, TEMPLATE.replace("{{ bos_token }}", ""), adds_bos=True)
    assert load(other).encode([], "Hi").ids[:2].tolist() == [IDS["<bos>"], IDS["<|turn>"]]
    write_tokenizer(other, adds_bos=True)
    assert load(other).encode([], "Hi").ids[:2].tolist() == [IDS["<bos>"], IDS["<|turn>"]]


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("it is red", "it is red"),
        (" it is red<turn|>and more", "it is red"),
        ("<|channel>thought\nhm<channel|>red<eos>x", "red"),
        ("<eos>", ""),
        ("<|channel>a<channel|>b<channel|> c ", "c"),
        ("red<turn|><channel|>x", "red"),
    ],
)
def test_answers(model, said, answer):
    assert model.decode(model.tokenize(said)) == answer
    assert model.special.eos == ENDS[0] and model.special.mask == IDS["<mask>"]
