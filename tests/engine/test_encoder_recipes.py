"""Recipes of the encoder: what their parts are given, what they do on several backbones, and what is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoder_probes import APPEND, HEADER, OUTPUT, RECORD, encode
from PIL import Image
from torch import Tensor

from probe.backbones import load
from probe.backbones.llada_v import LladaV
from probe.backbones.llada_v_config import published_facts
from probe.backbones.splice import IMAGE
from probe.backbones.tiled import TiledBackbone
from probe.compile import Vocabulary, compile_recipe
from probe.data import load as pictures
from probe.encoder import encode_with_probes
from probe.errors import ProbeError
from probe.explain import explain
from probe.recipe import load_recipe, parse_recipe, shipped_recipes
from probe.registry import Registry
from probe.site import Fate, Site

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """A picture that is cut into a base view and four tiles."""
    return next(pictures("world/mixed", 1)).images[0]


def test_parts_are_given_what_they_name(tiny: LladaV, picture: Image.Image) -> None:
    """Of one view, and of all views of a picture together; a token that was added sees no place of its own."""
    words = Vocabulary.installed()
    spied: list[dict[str, Any]] = []
    registry = Registry("score")
    for entry in words.scores:
        registry.register(entry.function, name=entry.name, **entry.meta)

    @registry.register
    def spy(
        n: int, original: int, hidden: Tensor, keys: Tensor, received: Tensor, n_queries: int, size: Tensor,
        view: Tensor, box: Tensor, row: Tensor, columns: int, layer_index: int | None, *,
        queries: str = "all", layer: int = 0, form: str = "softmax",
    ) -> Tensor:  # fmt: skip
        """What came."""
        spied.append(dict(locals()))
        return torch.arange(n, 0, -1).float()

    text = (
        APPEND
        + """
- name: one
  at: {site: projector.output}
  score: spy
  select: {top_k: {keep: 4}}
  do: drop
- name: all
  at: {site: projector.output, group: picture}
  score: {spy: {queries: visual}}
  select: {top_k: {keep: 7}}
  do: drop
"""
    )
    encode(tiny, [picture], text, replace(words, scores=registry))
    assert len(spied) == 5 + 1
    patches, heads = tiny.facts.patches, tiny.vision_tower.config.num_attention_heads
    views, n = tiny.views([picture]), patches // 4 + 1
    for v, given in enumerate(spied[:5]):
        assert (given["n"], given["original"], given["columns"]) == (n, patches, 6)
        assert given["hidden"].shape == (n, tiny.facts.width)
        assert given["keys"].shape == (heads, n, 32 // heads)
        assert given["received"].shape == (heads, n)
        assert given["n_queries"] == patches
        assert given["layer_index"] is None
        assert given["view"].tolist() == [v] * n
        assert given["row"].tolist() == list(range(n))
        assert given["size"].tolist() == [1.0] * n
        assert given["box"][-1].isnan().all()
        assert (given["box"][:-1, None] == views.box[v]).all(-1).any(1).all()
        assert given["received"][:, -1].isnan().all()
        assert not given["received"][:, :-1].isnan().any()
    together = spied[5]
    assert (together["n"], together["original"]) == (20, 5 * patches)
    assert together["view"].tolist() == [v for v in range(5) for _ in range(4)]


@torch.inference_mode()
def test_one_head_over_the_full_width(tiny: LladaV, picture: Image.Image) -> None:
    """PruMerge's attention: softmax(q k^T / sqrt(width)), averaged over the rows that look."""
    at = "at: {site: encoder.layer.attention, layer: -1}"
    done = encode(tiny, [picture], f"- {{{at}, record: [{{patch_importance: {{form: full_width}}}}]}}\n")
    attention, seen = tiny.vision_tower.encoder.layers[-1].self_attn, []
    handle = attention.register_forward_pre_hook(lambda m, a, k: seen.append(k["hidden_states"]), with_kwargs=True)
    tiny.encode_images([picture])
    handle.remove()
    q, k = attention.q_proj(seen[0]), attention.k_proj(seen[0])
    expected = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1).mean(1)
    np.testing.assert_allclose(done.arrays["patch_importance"][-1], expected.flatten(), atol=1e-6)


# -- recipes and other backbones -----------------------------------------------------------------------------------

SHIPPED = [info.name for info in shipped_recipes() if "site: encoder." in info.path.read_text()]
SHIPPED = [name for name in SHIPPED if "text_image" not in load_recipe(name).to_yaml()]


def test_there_are_recipes_of_the_encoder() -> None:
    assert len(SHIPPED) >= 10


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_do_what_they_say(name: str, tiny: LladaV, picture: Image.Image) -> None:
    """Every patch is accounted for; where the recipe alone says how many stay, so many do."""
    recipe = load_recipe(name)
    table = compile_recipe(recipe, tiny.facts)
    done = encode_with_probes(tiny, [picture], table)
    left = done.features.survivors
    assert left is not None
    prompt = tiny.assemble("what?", done.features)
    assert prompt.fate is not None
    assert int((prompt.visual >= 0).sum()) == int((prompt.fate == int(Fate.KEPT)).sum())
    assert torch.isfinite(prompt.embeds).all()
    said = explain(recipe, tiny.facts)
    if match := re.search(r"leaves +((?:\d+, )*)(\d+) tokens", said):
        assert [a.shape[0] for a in left.alive] == [int(match[2])] * 5
    assert int(left.size[torch.cat(left.alive)].sum()) <= 5 * tiny.facts.patches
    share = recipe.dial.get("keep")
    if isinstance(share, float):
        assert 0.5 * share < prompt.fate.eq(int(Fate.KEPT)).sum() / (5 * tiny.facts.patches) <= share + 1e-6


@pytest.mark.parametrize(("name", "r"), [("study_tome", 14), ("study_tome", 21), ("study_tome", 25)])
def test_the_study_s_merges_leave_what_it_reports(name: str, r: int) -> None:
    """365, 183 and 79 of 729 patches on LLaDA-V's 26 layers."""
    said = explain(load_recipe(f"study/{name}", [f"r={r}"]), published_facts())
    assert f"{ {14: 365, 21: 183, 25: 79}[r] } tokens of a view's 729 patches" in re.sub(r"\s+", " ", said)


def test_the_study_s_tome_on_lavida_drops_if_asked_to(tiny: LladaV, picture: Image.Image) -> None:
    merged, dropped = (
        encode_with_probes(tiny, [picture], compile_recipe(load_recipe("study/study_tome_lavida", sets), tiny.facts))
        for sets in (["r=7"], ["r=7", "operation={drop: {order: raster, positions: compact}}"])
    )
    left, gone = merged.features.survivors, dropped.features.survivors
    assert left is not None
    assert gone is not None
    assert [a.shape[0] for a in left.alive] == [a.shape[0] for a in gone.alive]
    assert Fate.MERGED in left.fate
    assert Fate.MERGED not in gone.fate
    assert (gone.size == 1).all(), "no sizes in attention"


FOLDERS = [p.parent for p in sorted(FIXTURES.glob("lavida*/config.json"))]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
@torch.inference_mode()
def test_a_backbone_that_pools_its_views_is_not_pooled_once_patches_are_gone(folder: Path) -> None:
    """LaViDa: untouched features are pooled and joined as ever; pruned ones are patches, view after view."""
    model = load(folder, dtype="float32")
    assert isinstance(model, TiledBackbone)
    image = Image.effect_noise((300, 200), 80).convert("RGB")
    ids = [5, IMAGE, 6, 7]
    bare = model.with_pictures(ids, model.encode_images([image]))
    watched = encode_with_probes(model, [image], compile_recipe(parse_recipe(HEADER + RECORD), model.facts))
    assert torch.equal(model.with_pictures(ids, watched.features).embeds, bare.embeds)
    tome = compile_recipe(load_recipe("prune/tome", ["r=300"]), model.facts)
    done = encode_with_probes(model, [image], tome)
    prompt = model.with_pictures(ids, done.features)
    views, patches = len(model.views([image]).base), model.facts.patches
    assert prompt.n_visual == views * patches
    assert prompt.n_original == bare.n_visual
    kept = patches
    for _ in range(model.facts.encoder_layers):
        kept -= min(300, kept // 2)
    assert int((prompt.visual >= 0).sum()) == views * kept
    assert prompt.role.tolist() == [0, *[1] * (views * kept), 3, 3]
    kept_there = compile_recipe(load_recipe("prune/tome", ["r=300", "positions=keep"]), model.facts)
    again = model.with_pictures(ids, encode_with_probes(model, [image], kept_there).features)
    assert torch.equal(again.embeds, prompt.embeds)
    assert again.position is not None
    assert torch.equal(bare.ids[again.position], again.ids), "four patches of a view share the position of a token"
    assert done.flops < model.encode_flops(model.encode_images([image]))


def test_a_model_without_the_sites_says_so(tiny: LladaV) -> None:
    bare = replace(tiny.facts, encoder_layers=0, patches=0)
    packed = replace(tiny.facts, refused=((Site.ENCODER_OUTPUT, "its views are packed"),))
    for facts, said in ((bare, "has no image encoder"), (packed, "has no `encoder.output`: its views are packed")):
        with pytest.raises(ProbeError, match=said):
            compile_recipe(parse_recipe(HEADER + OUTPUT), facts)


OUT = "at: {site: encoder.output}"
LOOK = "at: {site: encoder.layer.attention, layer: 0}"
FOUR = "select: {top_k: {keep: 4}}, do: drop"


@pytest.mark.parametrize(
    ("probe", "said"),
    [
        (LOOK.replace("0", "9") + ", record: patch_importance", "the encoder of .* has layers 0..1"),
        (LOOK + ", record: [{patch_importance: {queries: cls}}]", "no class token"),
        (LOOK + ", do: withdraw", "only be recorded; .* `encoder.layer.after_attention`"),
        ("at: {site: encoder.output, steps: {from: 50%}}, score: norm, " + FOUR, "encoded once"),
        (f"{OUT}, score: {{attention: {{queries: last}}}}, {FOUR}", "looks from the language model"),
        (f"{OUT}, score: {{attention: {{queries: cls}}}}, {FOUR}", "no class token"),
        (f"{OUT}, score: {{attention: {{queries: all, layer: 1}}}}, {FOUR}", "has not run"),
        (f"{OUT}, score: {{attention: {{queries: all, layer: -2}}}}, {FOUR}", "no layer 2 before it"),
        (f"{OUT}, score: {{attention: {{queries: all, correct: rotary}}}}, {FOUR}", "no rotary positions"),
        (f"{OUT}, score: norm, {FOUR.replace('drop', 'mask')}", "sequence of the language model"),
        (f"{OUT}, score: norm, {FOUR.replace('drop', '{drop: {answer_positions: shrunk}}')}", "knows no answer"),
        (f"{OUT}, score: norm, {FOUR.replace('drop', '{drop: {lasts: forward}}')}", "lost for the whole generation"),
        (f"{OUT}, score: norm, {FOUR.replace('4', '{0%: 5, 50%: 1}')}", "a schedule over the steps"),
        (f"{OUT}, score: {{norm: {{space: keys, layer: -5}}}}, {FOUR}", "no layer 5 before it"),
        (f"{OUT}, score: {{similarity: {{space: embedding, stat: mean}}}}, {FOUR}", "use `space: hidden`"),
        (f"{OUT}, score: norm, select: {{top_k: {{keep: {{rank: {{scale: 1}}}}}}}}, do: drop", "rank"),
        (f"{OUT[:-1]}, group: picture}}, score: norm, {FOUR.replace('drop', 'append')}", "added to one view only"),
        ("at: {site: before_lm, views: base}, do: withdraw", "only in the image encoder"),
        ("at: {site: encoder.output, views: half}, do: withdraw", "none of the choices"),
        ("at: {site: encoder.output, layer: 1}, do: withdraw", "has no layers"),
        ("at: {site: encoder.layer.after_attention}, do: withdraw", "exists once per layer"),
        ("at: {site: before_lm}, record: patch_norm", "is recorded at `encoder.layer.after_attention`"),
    ],
)
def test_what_an_encoder_cannot_do_is_refused_with_its_place(probe: str, said: str, tiny: LladaV) -> None:
    with pytest.raises(ProbeError, match=rf"<string>:\d+:\d+: .*{said}"):
        compile_recipe(parse_recipe(f"{HEADER}- {{{probe}}}\n"), tiny.facts)


PAGE = Path(__file__).parents[2] / "docs" / "encoder.md"


@pytest.mark.parametrize("snippet", re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL))
def test_snippets_of_the_page_do_something(snippet: str, tiny: LladaV, picture: Image.Image) -> None:
    assert encode(tiny, [picture], snippet).features.survivors is not None


def test_a_kernel_that_answers_no_probes_is_named(tiny_folder: Path, picture: Image.Image) -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("deaf", sdpa_attention_forward)
    model = load(tiny_folder, encoder_attention="deaf")
    with pytest.raises(ProbeError, match="encoder layer 0 answered nothing; .* `sdpa` or `eager`"):
        encode(model, [picture], OUTPUT)
