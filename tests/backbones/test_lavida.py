"""The LaViDa adapter on small random checkpoints of the published layout: loading, prompts, pictures, errors."""

from __future__ import annotations

import math

import pytest
import torch
from lavida_checkpoints import ADDED, CONFIGS, PICTURES, ROWS, VISION, edit_config, edit_weights, write_checkpoint
from PIL import Image

from probe.backbones import facts_of, known_backbones, load, visual_count
from probe.backbones import lavida_config as names
from probe.backbones.anyres import Tiling
from probe.backbones.base import SpecialIds
from probe.backbones.lavida import Lavida
from probe.backbones.layout import Tiled
from probe.backbones.prompt import SYSTEM
from probe.backbones.siglip import siglip_config
from probe.backbones.splice import IMAGE
from probe.backbones.tiled_config import SIGLIP_SO400M
from probe.compile import compile_recipe
from probe.decoding.caching import PrefixLM
from probe.decoding.dream import Dream
from probe.decoding.lavida import LavidaLlada
from probe.errors import ProbeError
from probe.generate import generate
from probe.generation import rule_for
from probe.recipe import load_recipe
from probe.site import ModelFacts, Role

KINDS = ("dream", "llada")
LENGTH = {kind: 257 + len(ADDED[kind]) for kind in KINDS}
EMBEDDING = {"dream": "model.embed_tokens.weight", "llada": "model.transformer.wte.weight"}
HEAD = {"dream": "lm_head.weight", "llada": "model.transformer.ff_out.weight"}
DOWN = {"dream": "model.layers.1.mlp.down_proj.weight", "llada": "model.transformer.blocks.1.ff_out.weight"}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One checkpoint of each kind, for tests that only read."""
    root = tmp_path_factory.mktemp("lavida")
    return {kind: write_checkpoint(root / kind, kind) for kind in KINDS}


@pytest.fixture
def folder(folders, kind):
    return folders[kind]


@pytest.fixture
def make(tmp_path, kind):
    made = []

    def write(**changes):
        made.append(None)
        return write_checkpoint(tmp_path / str(len(made)), kind, **changes)

    return write


def test_a_published_folder_loads(folder, kind):
    model = load(folder)
    assert isinstance(model, Lavida)
    assert len(list(folder.glob("*.safetensors"))) == 3
    assert model.shift == {"dream": 1, "llada": 0}[kind]
    assert not model.causal and model.batches
    assert model.facts == facts_of(folder)
    assert model.facts == ModelFacts(str(folder), 2, 4, 32, LENGTH[kind], 2, patches=25)
    assert model.special == SpecialIds(*(257 + ADDED[kind].index(t) for t in special_tokens(kind)), ())
    assert model.defaults.cache == {"prefix": {}}
    assert list(model.defaults.unmask) == [{"dream": "dream", "llada": "lavida_llada"}[kind]]
    assert model.defaults.stop == ()
    assert not any(t.is_meta or t.requires_grad for t in [*model.parameters(), *model.buffers()])
    assert {p.dtype for p in load(folder, dtype="bfloat16").parameters()} == {torch.bfloat16}


def special_tokens(kind):
    return (
        ("<|mask|>", "<|endoftext|>", "<|im_end|>")
        if kind == "dream"
        else ("<|mdm_mask|>", "<|endoftext|>", "<|eot_id|>")
    )


def test_vocabulary_is_cut_to_the_tokenizer(folder, make, kind):
    cut, full = load(folder), load(folder, vocab="full")
    assert (cut.facts.vocabulary, full.facts.vocabulary) == (LENGTH[kind], ROWS)
    hidden = torch.randn(3, 32)
    torch.testing.assert_close(cut.head(hidden), full.head(hidden)[:, : LENGTH[kind]])
    saved = load(make(rows=LENGTH[kind]))  # a loader's cut, saved under the old config
    assert saved.facts.vocabulary == LENGTH[kind]
    with pytest.raises(ProbeError, match=rf"{EMBEDDING[kind]} \[280, 32\] instead of \[{ROWS}, 32\]"):
        load(make(rows=280))
    with pytest.raises(ProbeError, match=f"the tokenizer has {LENGTH[kind]} tokens, the model only 200 rows"):
        load(make(vocab_size=200, **({"embedding_size": 200} if kind == "llada" else {})))


def test_a_wrong_tensor_is_named(make, kind):
    def without(weights):
        weights.pop(DOWN[kind], None)

    def reshaped(weights):
        if DOWN[kind] in weights:
            weights[DOWN[kind]] = weights[DOWN[kind]][:, 1:].contiguous()

    def larger(weights):
        if HEAD[kind] in weights:
            weights[HEAD[kind]] = torch.zeros(ROWS + 1, 32)

    def extra(weights):
        if DOWN[kind] in weights:
            weights["model.mm_projector.4.weight"] = torch.zeros(2)

    for change, message in (
        (without, rf"1 missing: {DOWN[kind]} \[32, 48\]"),
        (reshaped, rf"1 of another shape: {DOWN[kind]} \[32, 47\] instead of \[32, 48\]"),
        (larger, rf"1 of another shape: {HEAD[kind]} \[{ROWS + 1}, 32\]"),
        (extra, r"1 unexpected: model.mm_projector.4.weight \[2\]"),
    ):
        folder = make()
        edit_weights(folder, change)
        with pytest.raises(ProbeError, match=message):
            load(folder)


def test_a_missing_head_is_missing_unless_the_model_ties_it(make, kind):
    """LLaDA's config carries transformers' `tie_word_embeddings: true`, which says nothing about it."""
    folder = make()
    edit_weights(folder, lambda weights: weights.pop(HEAD[kind], None))
    with pytest.raises(ProbeError, match=f"missing: {HEAD[kind]}"):
        load(folder)
    edit_config(folder, **{"dream": {"tie_word_embeddings": True}, "llada": {"weight_tying": True}}[kind])
    model = load(folder)
    assert model.lm_head.weight.equal(model.model.embed_tokens.weight)


def test_special_ids(make, kind):
    given = SpecialIds(3, 4, 5, (6,))
    assert load(make(), special=given).special is given
    assert load(make(mask_token_id=7, eos_token_id=8)).special == SpecialIds(7, 8, load(make()).special.stop, ())
    bare = make(tokenizer=False, mask_token_id=7, eos_token_id=8)
    model = load(bare)
    assert model.special == SpecialIds(7, 8, 8, ())
    with pytest.raises(ProbeError, match="has no tokenizer"):
        model.encode([], "Who?")
    with pytest.raises(ProbeError, match=rf"outside of the {ROWS} rows"):
        load(make(tokenizer=False))
    with pytest.raises(ProbeError, match="outside of the 262|263 rows"):
        load(make(mask_token_id=299))


def test_the_decoder_type_is_told_by_its_fields(make, kind):
    """`llava_llada` is LLaDA-V's model type as well; the name of the width tells them apart."""
    folder = make()
    edit_config(folder, model_type={"dream": "Dream", "llada": "llada"}[kind])
    with pytest.raises(ProbeError, match="is of no known backbone"):
        load(folder)
    assert names.is_lavida(CONFIGS[kind])
    assert not names.is_lavida({"model_type": "llava_llada", "hidden_size": 32})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_type": "sequential"}, "block_type is 'sequential'; supported: 'llama'"),
        ({"alibi": True}, "alibi is True; supported: False"),
        ({"n_layers": None}, "lacks a usable 'num_hidden_layers'"),
        ({"n_heads": 5}, "does not describe a Llama"),
    ],
)
def test_a_llada_that_is_no_llama_is_refused(tmp_path, changes, message):
    folder = write_checkpoint(tmp_path / "odd", "llada")
    edit_config(folder, **changes)
    with pytest.raises(ProbeError, match=message):
        load(folder)


def test_a_dream_that_is_no_plain_qwen2_is_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "odd", "dream")
    edit_config(folder, use_sliding_window=True, sliding_window=4, max_window_layers=0)
    with pytest.raises(ProbeError, match="sliding windows"):
        load(folder)


def text_of(model, prompt, role):
    return model.tokenizer._fast.decode(prompt.ids[prompt.role == role].tolist())


def test_prompt_with_a_picture(folder, kind):
    model = load(folder)
    image = Image.new("RGB", (70, 50))
    prompt = model.encode([image], "What is it?")
    tiling = Tiling(model.geometry, 70, 50)
    count = visual_count(folder, [image.size])
    assert prompt.n_visual == tiling.count == count == 9 + math.prod(tiling.shape) + tiling.shape[0]
    before = text_of(model, prompt, Role.SYSTEM)
    after = text_of(model, prompt, Role.QUESTION)
    opening, turn, closing = {
        "dream": ("<|beginoftext|><|im_start|>system\n", "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
        "llada": (
            "<|startoftext|><|start_header_id|>system<|end_header_id|>\n\n",
            "<|start_header_id|>user<|end_header_id|>\n\n",
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
    }[kind]
    assert before.startswith(opening + SYSTEM)
    assert before.endswith(turn)
    assert after == "What is it?" + closing  # the newline after the picture is lost behind a start token
    assert (prompt.ids[prompt.visual >= 0] == IMAGE).all()
    assert prompt.position is None


def test_the_newline_stays_without_a_start_token(make, kind):
    model = load(make(template="{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"))
    prompt = model.encode([Image.new("RGB", (70, 50))], "What?")
    assert text_of(model, prompt, Role.QUESTION) == "\nWhat? "
    assert text_of(model, prompt, Role.SYSTEM) == f"system: {SYSTEM} user: "


def test_text_alone(folder):
    model = load(folder)
    prompt = model.encode([], "Who are you?")
    assert prompt.n_visual == 0
    assert text_of(model, prompt, Role.QUESTION).startswith("Who are you?")
    assert SYSTEM in text_of(model, prompt, Role.SYSTEM)


def test_a_template_is_needed(make):
    model = load(make(template=None))
    with pytest.raises(ProbeError, match="no chat template"):
        model.encode([], "Who?")
    model = load(make(template="{{ raise_exception('no system turns') }}"))
    with pytest.raises(ProbeError, match="cannot render a question: no system turns"):
        model.encode([], "Who?")


def test_no_thinking_switch(folder):
    with pytest.raises(ProbeError, match="no thinking switch"):
        load(folder).encode([], "Who?", think=True)


def test_decode(folder, kind):
    model = load(folder)
    ids = [*model.tokenize("!! Yes, the end. "), model.special.stop, model.special.eos, model.special.mask]
    assert model.decode(ids) == "Yes, the end."
    written = model.clean("!Yes<|im_end|>\n!")
    assert written == {"dream": "Yes!", "llada": "Yes<|im_end|>\n!"}[kind]


def test_several_pictures(folder):
    images = [Image.new("RGB", s, c) for s, c in (((70, 50), "red"), ((30, 90), "blue"))]
    model = load(folder)
    prompt = model.encode(images, "Same?")
    patches = (VISION["image_size"] // VISION["patch_size"]) ** 2
    assert prompt.n_visual == 2 * patches == visual_count(folder, [i.size for i in images])
    assert not (prompt.role == Role.NEWLINE).any()
    listed = load(folder, several="list").encode(images, "Same?")
    assert listed.n_visual == 2 * (9 + 1)
    assert listed.picture.tolist() == [i for i in range(2) for _ in range(10)]
    assert listed.box.isnan().all(-1).nonzero().flatten().tolist() == [9, 19]


def test_without_an_aspect_setting_pictures_are_squares(make):
    folder = make()
    edit_config(folder, image_aspect_ratio=None)
    prompt = load(folder).encode([Image.new("RGB", (70, 50))], "What?")
    assert prompt.n_visual == 25 == visual_count(folder, [(70, 50)])


def test_clip(folder):
    prompt = load(folder).assemble("What?", load(folder).encode_video([Image.new("RGB", (40, 30))] * 4))
    assert prompt.n_visual == 4 * 3 * (3 + 1)
    assert int((prompt.role == Role.NEWLINE).sum()) == 12


@pytest.mark.parametrize(("pool", "side"), [("bilinear", 3), ("average", 2), ("none", 5)])
def test_pooling(make, folder, pool, side):
    image = Image.new("RGB", (160, 160))
    want = side**2 + 2 * side * (2 * side + 1)
    assert load(folder, pool=pool).encode([image], "What?").n_visual == want
    if pool != "none":
        assert visual_count(make(mm_spatial_pool_mode=pool), [image.size]) == want


def test_pictures_are_pooled_after_the_projector(folder):
    """A token is the mixture of projected patches, not the projection of a mixture."""
    model = load(folder)
    views = torch.rand(3, 3, 80, 80)
    projected = model.encode_views(views)
    assert projected.shape == (3, 25, 32)
    tiling = Tiling(model.geometry, 60, 60)
    tokens = Tiled(tiling).tokens(projected, model.image_newline)
    weights = torch.tensor([2 / 3, 1 / 3])  # the first of three tokens over five patches is centred at 1/3
    corner = projected[0].unflatten(0, (5, 5))[:2, :2]
    torch.testing.assert_close(tokens[0], torch.einsum("i,j,ijw->w", weights, weights, corner), atol=1e-5, rtol=1e-4)


def test_rotary_frequencies(folders):
    exact, cast = load(folders["dream"]), load(folders["dream"], rope_dtype="bfloat16")
    rounded = exact.model.rotary_emb.inv_freq.bfloat16().float()
    assert cast.model.rotary_emb.inv_freq.equal(rounded)
    assert not rounded.equal(exact.model.rotary_emb.inv_freq)
    assert cast.model.rotary_emb.inv_freq.dtype == torch.float32
    with pytest.raises(ProbeError, match="LLaDA keeps its frequencies in float32"):
        load(folders["llada"], rope_dtype="bfloat16")


@pytest.mark.parametrize("option", ["rope_dtype", "pool", "several"])
def test_unknown_choices(folder, option):
    with pytest.raises(ProbeError, match=f"{option}='odd'; known: "):
        load(folder, **{option: "odd"})


def test_unsupported_pooling(make):
    with pytest.raises(ProbeError, match="pooling of visual tokens is 'max'; supported: bilinear, average"):
        load(make(mm_spatial_pool_mode="max"))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_padded_batch_equals_its_samples(folder, attention):
    model = load(folder, attention=attention)
    prompts = [model.encode([Image.new("RGB", (70, 50), "red")], "What?").embeds, model.encode([], "Who?").embeds]
    longest = max(len(p) for p in prompts)
    batch = torch.stack([torch.nn.functional.pad(p, (0, 0, 0, longest - len(p))) for p in prompts])
    mask = torch.stack([torch.arange(longest) < len(p) for p in prompts])
    together = model.lm(inputs_embeds=batch, attention_mask=mask).last_hidden_state
    for row, prompt in zip(together, prompts, strict=True):
        alone = model.lm(inputs_embeds=prompt[None]).last_hidden_state[0]
        torch.testing.assert_close(row[: len(prompt)], alone, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def asked(folders):
    """Each kind's model, and two samples of different lengths with their pictures."""

    def prompts(kind):
        model = load(folders[kind])
        noise = torch.rand(90, 60, 3, generator=torch.Generator().manual_seed(1)).mul(255).byte()
        samples = ((Image.fromarray(noise.numpy()), "What is it?"), (Image.new("RGB", (70, 50), "red"), "Which one?"))
        return model, [model.encode([image], question) for image, question in samples]

    return {kind: prompts(kind) for kind in KINDS}


def answers(model, prompts, recipe, numbers=(0, 1)):
    rule, table = rule_for(model, recipe, {}, pictures=True), compile_recipe(recipe, model.facts)
    found = [generate(model, [prompts[i]], rule, table, samples=[i])[0].ids for i in numbers]
    assert [g.ids for g in generate(model, [prompts[i] for i in numbers], rule, table, samples=numbers)] == found
    return found


@pytest.mark.parametrize("cache", ["prefix", "none"])
def test_recipes_run_on_the_published_decoder(asked, kind, cache):
    """In a batch as one by one, over the prompt's cache and without; keeping everything is no recipe at all."""
    model, prompts = asked[kind]
    sets = ["generate.gen_length=8", f"generate.cache={cache}"]
    bare = answers(model, prompts, load_recipe("random", [*sets, "keep=1.0"]).without_interventions())
    assert answers(model, prompts, load_recipe("random", [*sets, "keep=1.0"])) == bare
    assert answers(model, prompts, load_recipe("random", [*sets, "keep=1"])) != bare
    assert len(set(bare[0])) > 1


def test_decoding_as_evaluated_is_the_default(asked, kind):
    model, _ = asked[kind]
    rule = rule_for(model, load_recipe("random", ["generate.gen_length=8"]), {}, pictures=True)
    dream = Dream(algorithm="topk_margin", top_k=50, capped=True)
    assert rule.caching == PrefixLM()
    assert rule.unmasking == (dream if kind == "dream" else LavidaLlada())
    assert (rule.block_length, rule.steps, rule.nominal_steps) == (8, 8, 8)
    whole = rule_for(model, load_recipe("random"), {}, pictures=True)
    assert (whole.gen_length, whole.block_length, whole.nominal_steps) == (256, 256 if kind == "dream" else 128, 256)


def test_modules_for_hooks(folder):
    model = load(folder)
    assert len(model.layers) == len(model.encoder_layers) == 2
    for modules in (*model.layers, *model.encoder_layers):
        named = (modules.attention, modules.pre_attention_norm, modules.pre_mlp_norm, modules.mlp)
        assert all(module in set(modules.layer.modules()) for module in named)
    first = model.layers[0]
    seen = []
    for module in (first.pre_attention_norm, first.attention, first.pre_mlp_norm, first.mlp):
        module.register_forward_hook(lambda m, a, out: seen.append(m))
    model.lm(inputs_embeds=torch.randn(1, 4, 32))
    assert seen == [first.pre_attention_norm, first.attention, first.pre_mlp_norm, first.mlp]


@pytest.mark.parametrize(
    ("kind", "config", "kept", "shapes"),
    [
        (
            "dream",
            names.PUBLISHED_DREAM,
            151667,
            {
                "model.embed_tokens.weight": (151667, 3584),
                "lm_head.weight": (151667, 3584),
                "model.layers.27.self_attn.k_proj.bias": (512,),
                "model.layers.27.self_attn.o_proj.weight": (3584, 3584),
                "model.layers.0.mlp.down_proj.weight": (3584, 18944),
            },
        ),
        (
            "llada",
            names.PUBLISHED_LLADA,
            126349,
            {
                "model.transformer.wte.weight": (126349, 4096),
                "model.transformer.ff_out.weight": (126349, 4096),
                "model.transformer.blocks.31.attn_out.weight": (4096, 4096),
                "model.transformer.blocks.31.ff_out.weight": (4096, 12288),
                "model.transformer.ln_f.weight": (4096,),
            },
        ),
    ],
)
def test_published_names_and_sizes(kind, config, kept, shapes):
    """Names and shapes of the fact sheet, and all parameters counted by hand; none of them is allocated."""
    with torch.device("meta"):
        model = Lavida(
            Lavida.decoder_config(config, kept, "sdpa"),
            siglip_config(SIGLIP_SO400M, "sdpa"),
            facts=ModelFacts("", 0, 0, 0, 0, 0),
            special=SpecialIds(0, 0, 0, ()),
        )
    own = {Lavida.published_name(k, config): tuple(v.shape) for k, v in model.state_dict().items()}
    tower = "model.vision_tower.vision_tower.vision_model"
    width = shapes[DOWN[kind].replace(".1.", ".0.")][0] if kind == "dream" else 4096
    for key, shape in {
        **shapes,
        "model.image_newline": (width,),
        "model.mm_projector.0.weight": (width, 1152),
        f"{tower}.encoder.layers.25.self_attn.out_proj.bias": (1152,),
        f"{tower}.embeddings.position_embedding.weight": (729, 1152),
        f"{tower}.post_layernorm.weight": (1152,),
    }.items():
        assert own[key] == shape
    assert f"{tower}.encoder.layers.26.mlp.fc1.weight" not in own
    vision = (
        26 * (4 * 1152 * 1153 + 2 * 1152 * 4304 + 4304 + 1152 + 4 * 1152) + 1152 * (588 + 1) + 729 * 1152 + 2 * 1152
    )
    glue = width * 1153 + width * (width + 1) + width
    layers, keys, inner, biases = (28, 512, 18944, 3584 + 2 * 512) if kind == "dream" else (32, 4096, 12288, 0)
    layer = 2 * width * width + 2 * keys * width + biases + 3 * width * inner + 2 * width
    assert sum(map(math.prod, own.values())) == 2 * kept * width + width + layers * layer + glue + vision


@pytest.mark.parametrize(
    ("size", "bilinear", "average"),
    [
        ((1000, 1000), 1008, 871),
        ((640, 480), 834, 709),
        ((480, 640), 840, 715),
        ((1200, 400), 798, 689),
        ((400, 1200), 826, 715),
        ((2000, 300), 454, 369),
        ((336, 336), 406, 365),
        ((384, 384), 406, 365),
        ((80, 60), 346, None),
    ],
)
def test_published_counts(size, bilinear, average):
    """The fact sheet's table, without a download or a pixel."""
    for name in (names.DREAM_NAME, names.LLADA_NAME):
        assert visual_count(name, [size]) == bilinear
        assert visual_count(name, [size] * 2) == 2 * 729
    if average is not None:
        averaged = names.geometry({**names.VISION, "mm_spatial_pool_mode": "average"}, SIGLIP_SO400M)
        assert Tiling(averaged, *size).count == average


def test_the_published_models_are_listed():
    known = {b.name: b for b in known_backbones()}
    assert (known[names.DREAM_NAME].layers, known[names.DREAM_NAME].width) == (28, 3584)
    assert (known[names.LLADA_NAME].layers, known[names.LLADA_NAME].vocabulary) == (32, 126349)


def test_canvases_may_be_written_as_text(make, folder):
    text = str([tuple(p) for p in PICTURES["image_grid_pinpoints"]])
    assert load(make(image_grid_pinpoints=text)).geometry == load(folder).geometry


def test_a_tower_at_a_local_path_is_known_by_its_width(make):
    folder = make(mm_vision_tower="/data/models/siglip", mm_hidden_size=1152)
    (folder / "vision_config.json").unlink()
    edit_config(folder, image_grid_pinpoints=names.VISION["image_grid_pinpoints"])
    assert facts_of(folder).encoder_layers == 26
    assert visual_count(folder, [(100, 100)] * 2) == 2 * 729
