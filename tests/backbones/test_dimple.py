"""The Dimple adapter on small random checkpoints in the published layout: files, prompts, masks, types and errors."""

from __future__ import annotations

import json
import math

import pytest
import torch
from dimple_checkpoint import IDS, PREPROCESSOR, STAND_IN, TEMPLATE, shapes_of, write_dimple, write_tokenizer
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding

from probe.backbones import dimple_config as names
from probe.backbones import facts_of, load, visual_count
from probe.backbones.checkpoint import INDEX, PATTERNS
from probe.backbones.dimple import Dimple
from probe.backbones.dimple_modules import MultiAxisRotary, decoder_config, pair_mask, windows
from probe.backbones.dimple_pixels import patches_of
from probe.backbones.dimple_prompt import Grid, positions
from probe.backbones.splice import IMAGE
from probe.errors import ProbeError
from probe.site import Role


@pytest.fixture
def published(tmp_path):
    """`published(**changes)` writes a checkpoint into a fresh folder and returns it."""
    made = []

    def make(**changes):
        made.append(None)
        return write_dimple(tmp_path / f"dimple{len(made)}", **changes)

    return make


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_dimple(tmp_path_factory.mktemp("dimple"))


@pytest.fixture(scope="module")
def model(whole):
    return load(whole, attention="eager")


def picture(width, height, seed=0):
    noise = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(noise.numpy())


def test_the_published_layout_loads(whole, model):
    stored = {k: v for file in whole.glob("*.safetensors") for k, v in load_file(file).items()}
    own = model.state_dict()
    assert set(own) == set(stored) == set(json.loads((whole / INDEX).read_text())["weight_map"])
    assert all(own[name].equal(value) for name, value in stored.items())
    assert isinstance(model, Dimple)
    assert (model.shift, model.causal, model.batches) == (1, False, True)
    assert model.special == STAND_IN
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert facts_of(whole) == model.facts
    assert (model.facts.encoder_layers, model.facts.vocabulary) == (3, 280)


def test_published_names_and_sizes():
    """729 tensors and 8.32 billion parameters, none of them allocated."""
    own = shapes_of(names.PUBLISHED)
    text, tower = 4 + 28 * 12 - 1, 1 + 32 * 12 + 5
    assert len(own) == text + tower + 4
    for key, shape in {
        "model.embed_tokens.weight": (152064, 3584),
        "lm_head.weight": (152064, 3584),
        "model.layers.27.self_attn.k_proj.bias": (512,),
        "model.layers.27.mlp.down_proj.weight": (3584, 18944),
        "visual.patch_embed.proj.weight": (1280, 3, 2, 14, 14),
        "visual.blocks.31.attn.qkv.weight": (3840, 1280),
        "visual.blocks.31.mlp.down_proj.bias": (1280,),
        "visual.merger.mlp.0.weight": (5120, 5120),
        "visual.merger.mlp.2.weight": (3584, 5120),
        "img_projector.linear_1.weight": (3584, 3584),
        "img_projector.linear_2.bias": (3584,),
    }.items():
        assert own[key] == shape
    qwen2_7b = 7_615_616_512  # Qwen2.5-7B, head included
    projector = 2 * (3584 * 3584 + 3584)
    of_tower = sum(math.prod(s) for k, s in own.items() if k.startswith("visual."))
    assert sum(math.prod(s) for s in own.values()) == qwen2_7b + of_tower + projector


def test_published_facts_and_counts_need_no_download():
    facts = facts_of(names.PUBLISHED_NAME)
    assert (facts.layers, facts.heads, facts.width, facts.vocabulary, facts.encoder_layers) == (
        28,
        28,
        3584,
        152064,
        32,
    )
    assert visual_count(names.PUBLISHED_NAME, [(640, 480), (336, 336)]) == 391 + 144
    assert "merges.txt" in PATTERNS


def test_what_a_config_leaves_out(published):
    """A saved config names of its tower only what differs from the published class's defaults."""
    folder = published()
    config = json.loads((folder / "config.json").read_text())
    for key in ("full_attn_mask", "rope_scaling", "use_cache"):
        del config[key]
    config["vision_config"] = {k: v for k, v in config["vision_config"].items() if names.VISION.get(k) != v}
    (folder / "config.json").write_text(json.dumps(config))
    model = load(folder)
    assert model.visual.config.spatial_merge_size == 2
    assert not model.causal
    assert names.vision_settings({}) == names.VISION


def replace_weights(folder, change):
    for file in folder.glob("*.safetensors"):
        weights = load_file(file)
        change(weights)
        save_file(weights, file)


def test_errors_name_the_key(published):
    folder = published(shards=1)

    def change(weights):
        del weights["visual.blocks.1.attn.qkv.bias"]
        weights["img_projector.linear_3.weight"] = torch.zeros(2, 3)
        weights["model.layers.1.self_attn.k_proj.bias"] = torch.zeros(5)

    replace_weights(folder, change)
    with pytest.raises(ProbeError) as caught:
        load(folder)
    message = str(caught.value)
    assert "1 missing: visual.blocks.1.attn.qkv.bias [48]" in message
    assert "1 unexpected: img_projector.linear_3.weight [2, 3]" in message
    assert "1 of another shape: model.layers.1.self_attn.k_proj.bias [5] instead of [16]" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"type": "yarn"}}, "`rope_scaling` of config.json is .*supported: null"),
        ({"mrope_section": [1, 1, 1]}, r"`mrope_section` \[1, 1, 1\] shares out 3 frequencies, each head has 4"),
        ({"use_sliding_window": True}, "`use_sliding_window` of config.json is True; supported: false"),
        ({"hidden_act": 3}, "does not describe a Qwen2"),
        ({"image_token_id": 7}, r"<\|image_pad\|> is 266 in the tokenizer, `image_token_id` of config.json is 7"),
        ({"vocab_size": 265, "tokenizer": True}, "the tokenizer has 269 tokens, the model only 265 rows"),
        ({"mask_token_id": 300}, "special id 300 is outside of the 280 rows"),
        ({"preprocessor": {"patch_size": 16}}, "`patch_size` of preprocessor_config.json is 16, .* is 14"),
        ({"preprocessor": {"do_resize": False}}, "sets `do_resize` to False"),
        ({"preprocessor": {"min_pixels": 5, "max_pixels": 4}}, "min_pixels=5, max_pixels=4; expected"),
        ({"preprocessor": {"max_pixels": "many"}}, "max_pixels=many; expected whole numbers"),
    ],
)  # fmt: skip
def test_unsupported_settings(published, changes, message):
    given = {k: changes[k] for k in ("preprocessor", "tokenizer") if k in changes}
    folder = published(**given)
    config = json.loads((folder / "config.json").read_text()) | {k: v for k, v in changes.items() if k not in given}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ProbeError, match=message):
        load(folder)


def test_types(published, whole):
    assert load(published(dtype=torch.float16)).dtype == torch.float32
    assert load(published(dtype=torch.bfloat16)).dtype == torch.bfloat16
    model = load(whole, dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == model.visual.rotary_pos_emb.inv_freq.dtype == torch.float32
    prompt = model.encode([picture(60, 60)], "hello?")
    assert prompt.embeds.dtype == torch.bfloat16
    rows = model.lm(
        inputs_embeds=prompt.embeds[None], position_ids=model.position_ids(prompt.position[None])
    ).last_hidden_state
    assert model.head(rows).dtype == torch.float32


def test_tied_head(published):
    folder = published(tie_word_embeddings=True)
    replace_weights(folder, lambda weights: weights.pop("lm_head.weight", None))
    model = load(folder)
    assert model.lm_head.weight.equal(model.model.embed_tokens.weight)


def test_prompt_with_a_picture(whole, model):
    prompt = model.encode([picture(90, 70)], "What <image>is it?")
    rows, columns = model.preprocessing.grid(90, 70)
    assert (rows, columns) == (2, 3)
    assert prompt.n_visual == 6 == visual_count(whole, [(90, 70)])
    seen = prompt.visual >= 0
    assert prompt.visual[seen].tolist() == list(range(6))
    assert (prompt.ids[seen] == IMAGE).all()
    ids = prompt.ids.masked_fill(seen, IDS["<|image_pad|>"]).tolist()
    said = "<|im_start|>system\nBe helpful.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
    after = "<|vision_end|>What is it?<|im_end|>\n<|im_start|>assistant\n"
    assert ids == model.tokenize(said + "<|image_pad|>" * 6 + after)
    assert (prompt.role == Role.SYSTEM).sum() == len(model.tokenize(said))
    assert (prompt.role == Role.QUESTION).sum() == len(model.tokenize(after))
    assert (prompt.role[seen] == Role.VISUAL).all()
    assert prompt.role.dtype == torch.int8
    assert prompt.view.dtype == prompt.picture.dtype == torch.int16
    want = [[c / 3, r / 2, (c + 1) / 3, (r + 1) / 2] for r in range(2) for c in range(3)]
    torch.testing.assert_close(prompt.box, torch.tensor(want))
    before = len(model.tokenize(said))
    assert prompt.position[:before].tolist() == [[i] * 3 for i in range(before)]
    assert prompt.position[seen].tolist() == [[before, before + r, before + c] for r in range(2) for c in range(3)]
    assert prompt.position[before + 6 :].tolist() == [[before + 3 + i] * 3 for i in range(len(model.tokenize(after)))]
    features = model.encode_images([picture(90, 70)])
    assert prompt.embeds[seen].equal(features.projected[0])


def test_several_pictures(whole, model):
    images = [picture(90, 70), picture(60, 60, 1), picture(28, 120, 2)]
    prompt = model.encode(images, "Same?")
    counts = [visual_count(whole, [i.size]) for i in images]
    assert prompt.n_visual == sum(counts) == visual_count(whole, [i.size for i in images])
    assert prompt.picture.tolist() == prompt.view.tolist() == [i for i, n in enumerate(counts) for _ in range(n)]
    alone = [model.encode_images([i]).projected[0] for i in images]
    torch.testing.assert_close(prompt.embeds[prompt.visual >= 0], torch.cat(alone), atol=1e-5, rtol=1e-5)
    between = prompt.ids[prompt.role == Role.QUESTION][:3].tolist()
    assert between == [IDS["<|vision_end|>"], IDS["<|vision_start|>"], IDS["<|vision_end|>"]]
    starts = [int((prompt.picture == i).nonzero()[0]) for i in range(3)]
    firsts = prompt.position[prompt.visual >= 0][starts]
    assert (firsts == firsts[:, :1]).all()
    assert int(firsts[1, 0] - firsts[0, 0]) == max(model.preprocessing.grid(90, 70)) + 2


def test_interleaved_pictures(whole):
    model = load(whole, interleave=True)
    images = [picture(90, 70), picture(60, 60, 1), picture(56, 84, 2)]
    prompt = model.encode(images, "Is <image 2> like <image 1> or <image 9>?")
    counts = [visual_count(whole, [i.size]) for i in images]
    assert prompt.picture.tolist() == [1] * counts[1] + [0] * counts[0] + [2] * counts[2]
    text = model.decode(prompt.ids[prompt.ids >= 0].tolist())
    assert text.endswith("user\nIs  like  or ?\nassistant\n")
    features = model.encode_images(images)
    each = features.projected[0].split(counts)
    assert prompt.embeds[prompt.visual >= 0].equal(torch.cat([each[1], each[0], each[2]]))
    assert model.encode(images, "None named?").n_visual == 0
    assert model.encode([], "Is <image 1> here?").n_visual == 0


def test_text_alone(model):
    prompt = model.encode([], " Who are you? ")
    assert prompt.n_visual == 0
    assert prompt.box.shape == (0, 4)
    assert (prompt.visual == -1).all()
    assert prompt.position.tolist() == [[i] * 3 for i in range(prompt.ids.shape[0])]
    question = model.tokenizer.decode(prompt.ids[prompt.role == Role.QUESTION].tolist())
    assert question == " Who are you? \nassistant\n"
    assert model.tokenizer.decode(prompt.ids[prompt.role == Role.SYSTEM].tolist()).endswith("user\n")


def test_what_cannot_be_asked(model):
    features = model.encode_images([picture(60, 60)])
    with pytest.raises(ProbeError, match="2 places for 1 pictures; a question must not contain"):
        model.assemble("What is <|image_pad|>?", features)
    with pytest.raises(ProbeError, match="1 places for 0 pictures"):
        model.assemble("What is <|image_pad|>?", None)
    with pytest.raises(ProbeError, match="no thinking switch"):
        model.assemble("Why?", features, think=True)
    with pytest.raises(ProbeError, match="takes no video"):
        model.encode_video([picture(60, 60)] * 2)
    with pytest.raises(ProbeError, match="no picture to encode"):
        model.encode_images([])
    with pytest.raises(ProbeError, match="20 x 60 pixels: each side needs at least 28"):
        model.encode_images([picture(20, 60)])
    for wrong in ([1, 2], [1, IMAGE, 2, IMAGE]):
        with pytest.raises(ProbeError, match=f"{wrong.count(IMAGE)} places for 1 pictures"):
            model.with_pictures(wrong, features)


def test_tokenizer_files(published, whole, model):
    """One file or two: the same ids. Without any, ids are still taken."""
    single = published()
    model.tokenizer._fast.backend_tokenizer.save(str(single / "tokenizer.json"))
    (single / "vocab.json").unlink()
    (single / "merges.txt").unlink()
    other = load(single)
    text = "hello <|im_end|> h\u00e9 \u0065\u0301 99 don't\n\n"
    assert other.tokenize(text) == model.tokenize(text)
    assert 259 in model.tokenize(text)
    bare = load(published(tokenizer=False))
    assert bare.special.eos == IDS["<|endoftext|>"]
    assert load(published(tokenizer=False), special=STAND_IN).special is STAND_IN
    with pytest.raises(ProbeError, match="has no tokenizer: put vocab.json"):
        bare.encode([], "Who?")
    assert bare.with_pictures([1, IMAGE, 2], bare.encode_images([picture(60, 60)])).n_visual == 4


def test_chat_template_files(published):
    folder = published()
    write_tokenizer(folder, template=None)
    with pytest.raises(ProbeError, match="no chat template"):
        load(folder).encode([], "Who?")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    assert load(folder).encode([], "Who?").ids.shape[0] > 10
    (folder / "vocab.json").write_text("{")
    with pytest.raises(ProbeError, match="no usable tokenizer"):
        load(folder)


def test_decode(model):
    ids = model.tokenize("hello. ")
    assert model.decode([*ids, IDS["<|im_end|>"], IDS["<|mask|>"], IDS["<|endoftext|>"], *ids]) == "hello. hello. "


def test_the_pixel_budget(published, whole):
    assert load(whole).preprocessing.max_pixels == PREPROCESSOR["max_pixels"]
    small = load(whole, max_pixels=28 * 28 * 6, min_pixels=28 * 28)
    assert small.encode([picture(300, 200)], "?").n_visual == 6
    bare = load(published(preprocessor=None)).preprocessing
    assert (bare.min_pixels, bare.max_pixels) == (56 * 56, 28 * 28 * 1280)
    for size in ({"shortest_edge": 784, "longest_edge": 7840}, {"min_pixels": 784, "max_pixels": 7840}):
        told = load(published(preprocessor={"size": size})).preprocessing
        assert (told.min_pixels, told.max_pixels) == (784, 7840)
    with pytest.raises(ProbeError, match="known: processor, evaluation"):
        load(whole, pixels="exact")
    assert load(whole, pixels="evaluation").encode([picture(20, 60)], "?").n_visual > 0


def test_rotary_tables_are_those_of_qwen_2_5_vl(whole):
    """transformers' own M-RoPE, with its sections where Dimple has a field of its own."""
    settings = names.text_settings(json.loads((whole / "config.json").read_text()))
    ours = MultiAxisRotary(decoder_config(settings, "sdpa"), [1, 1, 2])
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
    theirs = Qwen2_5_VLRotaryEmbedding(
        Qwen2_5_VLTextConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, rope_parameters=rope)
    )
    hidden, position = torch.zeros(2, 7, 32), torch.randint(0, 900, (3, 2, 7))
    model = load(whole)
    assert model.position_ids(position.movedim(0, -1)).equal(position)
    assert model.position_ids(position[0]).equal(position[:1].expand(3, -1, -1))
    for got, want in zip(ours(hidden, position), theirs(hidden, position), strict=True):
        torch.testing.assert_close(got, want, atol=0, rtol=0)
    for got, want in zip(ours(hidden, position[0]), theirs(hidden, position[:1].expand(3, -1, -1)), strict=True):
        torch.testing.assert_close(got, want, atol=0, rtol=0)


def test_positions():
    want = [[0, 0, 0], *([1, 1 + r, 1 + c] for r in range(3) for c in range(2)), [4] * 3, [5] * 3, [6] * 3, [7] * 3]
    assert positions([5, IMAGE, 5, 5, IMAGE, 5], [Grid(3, 2), Grid(1, 1)]).tolist() == want


def test_masks(model):
    real = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    want = [[[(i == j) or bool(row[i] and row[j]) for j in range(4)] for i in range(4)] for row in real]
    assert pair_mask(real)[:, 0].tolist() == want
    embeds = torch.randn(1, 9, 32)
    before = model.lm(inputs_embeds=embeds).last_hidden_state
    embeds[:, -1] += 1
    assert (before - model.lm(inputs_embeds=embeds).last_hidden_state).abs().amax(-1).min() > 1e-6


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_causal(whole, attention):
    model = load(whole, attention=attention, full_attn_mask=False)
    assert model.causal
    embeds, keep = torch.randn(2, 9, 32), torch.tensor([[1] * 9, [1] * 6 + [0] * 3]).bool()
    last = model.lm(inputs_embeds=embeds).last_hidden_state
    changed = embeds.clone()
    changed[:, 5:] += 1
    again = model.lm(inputs_embeds=changed).last_hidden_state
    assert again[:, :5].equal(last[:, :5])
    assert (again[:, 5:] - last[:, 5:]).abs().amax(-1).min() > 1e-6
    padded = model.lm(inputs_embeds=embeds, attention_mask=keep).last_hidden_state
    torch.testing.assert_close(padded[keep], last[keep], atol=1e-5, rtol=1e-5)
    square = keep[:, None, None, :] & torch.ones(9, 9).tril().bool()
    given = model.lm(inputs_embeds=embeds, attention_mask=square).last_hidden_state
    torch.testing.assert_close(given[keep], last[keep], atol=1e-5, rtol=1e-5)

    class Growing:
        def __init__(self):
            self.kept = {}

        def update(self, key, value, layer_idx, *args, **kwargs):
            pair = (key, value)
            if layer_idx in self.kept:
                pair = tuple(torch.cat(two, 2) for two in zip(self.kept[layer_idx], pair, strict=True))
            self.kept[layer_idx] = pair
            return pair

        def get_seq_length(self, layer_idx=0):
            return self.kept[0][0].shape[2] if self.kept else 0

    cache, parts = Growing(), []
    for first, end in ((0, 4), (4, 5), (5, 9)):
        at = torch.arange(first, end).expand(2, -1)
        parts.append(model.lm(inputs_embeds=embeds[:, first:end], position_ids=at, past_key_values=cache)[0])
    torch.testing.assert_close(torch.cat(parts, 1), last, atol=1e-5, rtol=1e-5)


def test_the_encoder_runs_in_windows(model):
    """The order that `windows` tells leads from the rows that hooks see back to visual tokens."""
    pixels, grid = patches_of([picture(150, 120), picture(90, 200, 1)], model.preprocessing)
    seen = []
    handles = [x.layer.register_forward_hook(lambda m, a, out: seen.append(out)) for x in model.encoder_layers]
    features = model.vision_features(pixels, grid)
    for handle in handles:
        handle.remove()
    assert len(seen) == model.facts.encoder_layers
    order, ends = windows(model.visual.config, grid)
    assert order.tolist() != sorted(order.tolist())
    assert sorted(order.tolist()) == list(range(features.shape[0]))
    assert int(ends[-1]) == pixels.shape[0]
    merged = model.visual.merger(seen[-1])
    torch.testing.assert_close(merged, features[order])
    assert features.shape == (int(grid.prod(-1).sum()) // 4, 24)


def test_encoder_kernels_agree(whole, model):
    image = picture(150, 120)
    want = model.encode_images([image]).projected
    for attention, encoder in (("sdpa", None), ("eager", "sdpa"), ("sdpa", "eager")):
        other = load(whole, attention=attention, encoder_attention=encoder)
        torch.testing.assert_close(other.encode_images([image]).projected, want, atol=1e-5, rtol=1e-5)


def test_encode_flops_are_those_that_torch_counts(model):
    images = [picture(150, 120), picture(90, 200, 1)]
    with FlopCounterMode(display=False) as counter:
        features = model.encode_images(images)
    assert model.encode_flops(features) == counter.get_total_flops()
