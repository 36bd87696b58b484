"""The LLaDA-V adapter on small random checkpoints: variants, roles, masks, types and errors."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from probe.backbones import facts_of, load, visual_count
from probe.backbones import llada_v_config as names
from probe.backbones import prompt as text
from probe.backbones.anyres import Tiling
from probe.backbones.base import SpecialIds
from probe.backbones.bidirectional import attention_bias, llama_config
from probe.backbones.llada_v import LladaV
from probe.backbones.siglip import siglip_config
from probe.backbones.splice import IMAGE
from probe.backbones.tiled_config import SIGLIP_SO400M, count_visual
from probe.errors import ProbeError
from probe.site import ModelFacts, Role


def reference_llama(weights, config, embeds, position=None, allowed=None):
    """The decoder from the formulae: `(length, width)` float64 to final-normed rows."""
    weights = {k: v.double() for k, v in weights.items()}
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    size = config["hidden_size"] // heads
    position = torch.arange(embeds.shape[0]) if position is None else position
    frequency = config["rope_theta"] ** (-torch.arange(0, size, 2).double() / size)
    angle = position.double()[:, None] * frequency

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * weights[name]

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", torch.zeros(()).double())

    def turn(x):
        a, b = x[..., : size // 2], x[..., size // 2 :]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    hidden = embeds.double()
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}"
        normed = norm(hidden, f"{at}.input_layernorm.weight")
        q, k, v = (linear(normed, f"{at}.self_attn.{n}_proj").unflatten(-1, (-1, size)).transpose(0, 1) for n in "qkv")
        k, v = (x.repeat_interleave(heads // groups, 0) for x in (k, v))
        scores = turn(q) @ turn(k).transpose(1, 2) / math.sqrt(size)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -math.inf)
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        hidden = hidden + linear(mixed, f"{at}.self_attn.o_proj")
        normed = norm(hidden, f"{at}.post_attention_layernorm.weight")
        gate = torch.nn.functional.silu(linear(normed, f"{at}.mlp.gate_proj"))
        hidden = hidden + linear(gate * linear(normed, f"{at}.mlp.up_proj"), f"{at}.mlp.down_proj")
    return norm(hidden, "model.norm.weight")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "changes", [{}, {"num_key_value_heads": 2}, {"num_key_value_heads": 1, "attention_bias": True}]
)
def test_language_model(checkpoint, attention, changes):
    folder = checkpoint(pictures=False, **changes)
    model = load(folder, attention=attention, dtype=torch.float32)
    weights, config = load_file(folder / "model.safetensors"), files_config(folder)
    embeds = torch.randn(2, 11, 32)
    keep = torch.tensor([[1] * 11, [1] * 7 + [0] * 4]).bool()
    gaps = torch.tensor([0, 1, 5, 6, 7, 20, 21, 22, 23, 40, 41])
    causal = torch.ones(11, 11).tril().bool()
    cases = [
        ({}, [{}, {}]),
        ({"position_ids": gaps.expand(2, -1)}, [{"position": gaps}] * 2),
        ({"attention_mask": keep}, [{"allowed": k.expand(11, 11)} for k in keep]),
        ({"attention_mask": keep.long()}, [{"allowed": k.expand(11, 11)} for k in keep]),
        ({"attention_mask": causal[None, None].expand(2, 1, 11, 11)}, [{"allowed": causal}] * 2),
        (
            {"attention_mask": keep[:, None, None, :].expand(2, 1, 11, 11)},
            [{"allowed": k.expand(11, 11)} for k in keep],
        ),
        ({"attention_mask": torch.where(causal, 0.0, -1e9)[None, None]}, [{"allowed": causal}] * 2),
    ]
    for arguments, references in cases:
        got = model.lm(inputs_embeds=embeds, **arguments).last_hidden_state
        want = torch.stack([reference_llama(weights, config, e, **r) for e, r in zip(embeds, references, strict=True)])
        torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.head(got), got @ weights["lm_head.weight"][: model.facts.vocabulary].T)


def files_config(folder):
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def test_every_position_sees_every_other(small):
    for attention in ("sdpa", "eager"):
        model = load(small, attention=attention)
        assert not any(x.attention.is_causal for x in model.layers)
        embeds = torch.randn(1, 9, 32)
        before = model.lm(inputs_embeds=embeds).last_hidden_state
        embeds[:, -1] += 1
        after = model.lm(inputs_embeds=embeds).last_hidden_state
        assert (before - after).abs().amax(-1).min() > 1e-6


def test_attention_bias():
    allowed = torch.tensor([[[[True, False]]]])
    assert attention_bias(None, "eager", torch.float32) is None
    padded = torch.tensor([[1, 0]])
    assert attention_bias(padded, "eager", torch.float32) is padded
    assert attention_bias(allowed, "sdpa", torch.float32) is allowed
    added = attention_bias(allowed, "eager", torch.bfloat16)
    assert added.dtype == torch.bfloat16
    assert added[..., 0] == 0
    assert added[..., 1] == torch.finfo(torch.bfloat16).min


def test_published_names_and_sizes():
    """717 tensors and 8.43 billion parameters, none of them allocated."""
    with torch.device("meta"):
        model = LladaV(
            llama_config(names.PUBLISHED, names.PUBLISHED["vocab_size"], "sdpa"),
            siglip_config(SIGLIP_SO400M, "sdpa"),
            facts=ModelFacts("", 0, 0, 0, 0, 0),
            special=SpecialIds(0, 0, 0, ()),
        )
    own = {LladaV.published_name(k, {}): tuple(v.shape) for k, v in model.state_dict().items()}
    assert len(own) == 717
    assert sum(math.prod(s) for s in own.values()) == 8_434_837_024
    tower = "model.vision_tower.vision_tower.vision_model"
    for key, shape in {
        "model.embed_tokens.weight": (126464, 4096),
        "lm_head.weight": (126464, 4096),
        "model.layers.31.mlp.down_proj.weight": (4096, 12288),
        "model.image_newline": (4096,),
        "model.mm_projector.2.bias": (4096,),
        f"{tower}.embeddings.patch_embedding.weight": (1152, 3, 14, 14),
        f"{tower}.embeddings.position_embedding.weight": (729, 1152),
        f"{tower}.encoder.layers.25.self_attn.out_proj.bias": (1152,),
        f"{tower}.post_layernorm.weight": (1152,),
    }.items():
        assert own[key] == shape


def test_vocabulary_is_cut_to_the_tokenizer(checkpoint):
    folder = checkpoint()
    cut, full = load(folder), load(folder, vocab="full")
    length = len(cut.tokenizer)
    assert (cut.facts.vocabulary, full.facts.vocabulary) == (length, 320)
    assert facts_of(folder) == cut.facts
    hidden = torch.randn(3, 32)
    assert cut.head(hidden).shape[-1] == length
    torch.testing.assert_close(cut.head(hidden), full.head(hidden)[:, :length])
    with pytest.raises(ProbeError, match="known: tokenizer, full"):
        load(folder, vocab="half")
    with pytest.raises(ProbeError, match="the tokenizer has 262 tokens, the model only 100 rows"):
        load(checkpoint(vocab_size=100))


def test_types(checkpoint, small):
    half = checkpoint(dtype=torch.float16)
    assert load(half).dtype == torch.float32
    assert load(half, dtype="float16").dtype == torch.float16
    assert load(checkpoint(dtype=torch.bfloat16)).dtype == torch.bfloat16
    model = load(small, dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    prompt = model.encode([Image.new("RGB", (50, 40))], "What?")
    assert prompt.embeds.dtype == torch.bfloat16
    assert model.head(model.lm(inputs_embeds=prompt.embeds[None]).last_hidden_state).dtype == torch.float32
    for wrong in ("float", "int8", "fp16"):
        with pytest.raises(ProbeError, match="known: auto, float32, bfloat16, float16, float64"):
            load(small, dtype=wrong)


def test_weights_are_frozen(small):
    model = load(small)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])


def test_tied_head(checkpoint):
    folder = checkpoint(tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors")
    model = load(folder)
    assert model.lm_head.weight.equal(model.model.embed_tokens.weight)


def test_tower_stops_before_its_last_layer(small):
    """Features are the last kept layer's output, with no norm after it."""
    model = load(small, attention="eager")
    assert len(model.encoder_layers) == model.facts.encoder_layers == SIGLIP_SO400M["num_hidden_layers"] - 25
    seen = []
    handle = model.encoder_layers[-1].layer.register_forward_hook(lambda m, a, out: seen.append(out))
    features = model.vision_features(torch.rand(2, 3, 30, 30))
    handle.remove()
    assert features.equal(seen[0])
    assert features.shape == (2, 16, 16)


def test_roles_of_one_picture(small):
    model = load(small)
    image = Image.new("RGB", (70, 50))
    prompt = model.encode([image], "What is it?")
    tiling = Tiling(model.geometry, 70, 50)
    seen = prompt.visual >= 0
    assert prompt.n_visual == tiling.count == int(seen.sum())
    assert prompt.visual[seen].tolist() == list(range(prompt.n_visual))
    first = int(seen.nonzero()[0])
    assert (prompt.role[:first] == Role.SYSTEM).all()
    assert (prompt.role[first + prompt.n_visual :] == Role.QUESTION).all()
    newlines = (prompt.role == Role.NEWLINE).nonzero().flatten()
    assert len(newlines) == tiling.shape[0]
    assert prompt.embeds[newlines].equal(model.image_newline.expand(len(newlines), -1))
    assert model.tokenizer.decode(prompt.ids[prompt.role == Role.SYSTEM].tolist()).startswith("system\n\nYou are")
    after = prompt.ids[prompt.role == Role.QUESTION].tolist()
    assert model.tokenizer.decode(after) == "What is it? /no_thinkassistant\n\n"
    assert (prompt.ids[seen] == IMAGE).all()
    assert (prompt.ids[~seen] >= 0).all()
    assert prompt.role.dtype == torch.int8
    assert prompt.view.dtype == prompt.picture.dtype == torch.int16
    assert prompt.box.dtype == torch.float32
    assert count_visual([image.size], model.geometry) == prompt.n_visual == visual_count(small, [image.size])


def test_a_tokenizer_that_adds_the_start_token_keeps_the_newline(checkpoint):
    model = load(checkpoint(adds_bos=True))
    prompt = model.encode([Image.new("RGB", (30, 30))], "What?", think=True)
    assert model.tokenizer.decode(prompt.ids[prompt.role == Role.QUESTION].tolist()).startswith("\nWhat? /think")
    assert prompt.ids[:2].tolist() == [0, 0]


def test_several_pictures(small):
    model = load(small)
    images = [Image.new("RGB", s, c) for s, c in (((70, 50), "red"), ((30, 90), "blue"), ((8, 8), "white"))]
    prompt = model.encode(images, "Same?")
    patches = model.geometry.side**2
    assert prompt.n_visual == 3 * patches == visual_count(small, [i.size for i in images])
    assert not (prompt.role == Role.NEWLINE).any()
    assert prompt.picture.tolist() == prompt.view.tolist() == [i for i in range(3) for _ in range(patches)]
    seen = (prompt.visual >= 0).nonzero().flatten()
    assert (prompt.role[seen[0] :][prompt.visual[seen[0] :] < 0] == Role.QUESTION).all()


def test_places_within_the_question(small):
    model = load(small)
    image = Image.new("RGB", (30, 30), "red")
    features = model.encode_images([image])
    twice = model.assemble("Is <image> like <image>?", features)
    once = model.assemble("Is <image> so?", features)
    assert twice.n_visual == 2 * once.n_visual
    assert twice.visual.max() + 1 == twice.n_visual
    assert twice.box[: once.n_visual].nan_to_num(-1).equal(once.box.nan_to_num(-1))
    assert twice.box[once.n_visual :].nan_to_num(-1).equal(once.box.nan_to_num(-1))
    assert "think" not in model.tokenizer.decode(twice.ids[twice.role == Role.QUESTION].tolist())


def test_clip(small):
    model = load(small)
    prompt = model.assemble("What happens?", model.encode_video([Image.new("RGB", (40, 30))] * 3))
    side = math.ceil(model.geometry.side / 2)
    assert prompt.n_visual == 3 * side * (side + 1)
    assert int((prompt.role == Role.NEWLINE).sum()) == 3 * side


def test_text_alone(small):
    model = load(small)
    prompt = model.encode([], " Who are you? ")
    assert prompt.n_visual == 0
    assert prompt.box.shape == (0, 4)
    assert (prompt.visual == -1).all()
    question = model.tokenizer.decode(prompt.ids[prompt.role == Role.QUESTION].tolist())
    assert question == "Who are you?assistant\n\n"
    assert model.tokenizer.decode(prompt.ids[prompt.role == Role.SYSTEM].tolist()).endswith("user\n\n")


def test_prompts_with_pictures_are_cut(checkpoint):
    model = load(checkpoint(tokenizer_model_max_length=260))
    prompt = model.encode([Image.new("RGB", (90, 90))], "What?")
    assert prompt.ids.shape[0] == 260
    assert 0 < prompt.n_visual == int((prompt.visual >= 0).sum()) < count_visual([(90, 90)], model.geometry)
    assert model.encode([], "x" * 300).ids.shape[0] > 260


def test_end_of_text_within_a_prompt_is_removed(small):
    model = load(small)
    image = Image.new("RGB", (30, 30))
    plain, marked = (model.encode([image], q) for q in ("What?", f"What?{names.EOS.text}"))
    assert plain.ids.equal(marked.ids)
    assert names.EOS.text in text.render(text.messages([("user", f"What?{names.EOS.text}")]))


def test_decode(small):
    model = load(small)
    ids = model.tokenize("Yes, it is.")
    assert model.decode([*ids, model.special.stop, model.special.mask, model.special.eos]) == "Yes, it is"
    assert model.tokenize(names.EOT.text) == [model.special.stop]


def test_special_ids(small, checkpoint, stand_in):
    assert load(small).special == stand_in
    bare = checkpoint(tokenizer=False)
    with pytest.raises(ProbeError, match="special id 126336 is outside of the 320 rows"):
        load(bare)
    model = load(bare, special=stand_in)
    assert model.special is stand_in
    with pytest.raises(ProbeError, match="has no tokenizer"):
        model.encode([], "Who?")
    assert model.assemble is not None
    assert model.with_pictures([7, IMAGE, 8], model.encode_images([Image.new("RGB", (30, 30))])).n_visual > 0


def test_special_ids_are_found_by_their_strings(checkpoint, stand_in):
    """The end and start of text may go by other names, which the tokenizer knows; the others may not."""
    folder = checkpoint()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        data = (folder / name).read_text(encoding="utf-8")
        (folder / name).write_text(data.replace(names.EOS.text, "<|end|>"), encoding="utf-8")
    assert load(folder).special == stand_in
    data = (folder / "tokenizer.json").read_text(encoding="utf-8")
    (folder / "tokenizer.json").write_text(data.replace(names.MASK.text, "<|hole|>"), encoding="utf-8")
    with pytest.raises(ProbeError, match=r"lacks <\|mdm_mask\|>; give `special` ids"):
        load(folder)
    assert load(folder, special=stand_in).special == stand_in


def test_language_model_alone(checkpoint):
    model = load(checkpoint(pictures=False))
    assert model.facts.encoder_layers == 0
    assert model.encoder_layers == ()
    with pytest.raises(ProbeError, match="language model alone"):
        model.encode([Image.new("RGB", (9, 9))], "What?")
    assert model.encode([], "Who?").n_visual == 0


def test_unknown_tower(checkpoint):
    folder = checkpoint()
    (folder / "vision_config.json").unlink()
    with pytest.raises(ProbeError, match="`mm_vision_tower` is 'siglip-tiny', whose sizes are not known"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_projector_type": "resampler"}, "supported: linear, mlpNx_gelu"),
        ({"num_attention_heads": 5}, "does not describe a Llama"),
        ({"image_aspect_ratio": "square"}, "anyres_max_N"),
    ],
)
def test_unsupported_settings(small, tmp_path, changes, message):
    folder = shutil.copytree(small, tmp_path / "copy")
    config = {**files_config(folder), **changes}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ProbeError, match=message):
        load(folder)
