"""Every shipped pruner on every backbone: it runs and keeps what it says, or it is refused with the reason."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_autoregressive import DECODER, write_llava_next, write_qwen_vl
from torch.utils.flop_counter import FlopCounterMode

from probe.backbones import load
from probe.backbones.base import Backbone, Prompt
from probe.backbones.tiny import tiny_names, write_tiny
from probe.compile import BoundProbe, ProbeTable, compile_recipe
from probe.encoder import encode_with_probes
from probe.errors import ProbeError
from probe.generate import Generated, generate
from probe.generation import rule_for
from probe.pass_state import PassState
from probe.recipe import Recipe, load_recipe, shipped_recipes
from probe.registry import unmaskings
from probe.selections import token_count
from probe.site import Clock, Fate, Phase, Site

LAYERS = 4
QUESTIONS = ("What is it?", "Read the page, please.")
SIZES = ((60, 30), (30, 56))
NAMES = [i.name for i in shipped_recipes() if i.name.startswith(("prune/", "study/"))]
COMES = {"jump": -1.0, "confidence": 0.0, "below": 1.0}
"""Dials of recipes that wait for a signal, turned so that it comes."""
FOUR_LAYERS = {"prune/sparsevlm_rank": "layers=[0,1,2,3]", "prune/downsample": "scale=0.95"}
"""Shares of the depth that fall together in four layers; pictures that would be smaller than a patch of Dimple."""


def _autoregressive(write: Callable[..., Path], **config: Any) -> Callable[[Path], Path]:
    return lambda folder: write(folder, **config)


BUILDERS: dict[str, Callable[[Path], Path]] = {
    **{name: lambda folder, name=name: write_tiny(name, folder, layers=LAYERS) for name in tiny_names()},
    "llava-next": _autoregressive(
        write_llava_next,
        text_config={"model_type": "mistral", "sliding_window": None, **DECODER, "num_hidden_layers": LAYERS},
    ),
    "qwen-vl": _autoregressive(write_qwen_vl, num_hidden_layers=LAYERS),
}
LOOKED_AT = [name for name in BUILDERS if "LLaDA-V" in name or "lavida-dream" in name]
EVERYWHERE = {"fastv", "divprune", "sparsevlm", "vtw", "progressive", "layer_skip", "tome", "trim", "redvtp"}
"""Recipes that the other backbones run, too; all of them are `slow`."""


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Backbone]:
    """`backbone(name, attention)`: one small model of every kind."""
    folders: dict[str, Path] = {}

    @cache
    def get(name: str, attention: str | None = None) -> Backbone:
        if name not in folders:
            folders[name] = BUILDERS[name](tmp_path_factory.mktemp("model") / "it")
        return load(folders[name], dtype="float32", attention=attention)

    return get


@pytest.fixture(scope="module")
def routers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DyVTE's routers for a model of width 32; those of the later layers want the picture out."""
    file, width = tmp_path_factory.mktemp("routers") / "routers.safetensors", 32
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(LAYERS):
        first, second = torch.full((4, 2 * width), 0.1), torch.tensor([0.0, 1.0 if layer >= 2 else -1.0])
        tensors |= {f"{layer}.0.weight": first, f"{layer}.0.bias": torch.zeros(4)}
        tensors |= {f"{layer}.2.weight": torch.zeros(2, 4), f"{layer}.2.bias": second}
    save_file(tensors, file)
    return file


@cache
def picture(size: tuple[int, int]) -> Image.Image:
    noise = np.random.default_rng(size).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


@dataclass(frozen=True)
class Ran:
    """A recipe that ran: what it was, what it was given, what came out, and what every layer's attention saw."""

    recipe: Recipe
    table: ProbeTable
    prompts: list[Prompt]
    out: list[Generated]
    seen: Mapping[tuple[int, int], list[int]]
    """(pass, layer) -> alive visual tokens among the keys, per sample."""
    clocks: Mapping[int, Clock]


def ready(name: str, routers: Path, cached: bool) -> Recipe:
    """The recipe for four layers, eight slots and four steps, with or without a cache."""
    recipe = load_recipe(name)
    sets = [f"{dial}={value}" for dial, value in COMES.items() if dial in recipe.dial]
    sets += [f"file={routers}"] if "file" in recipe.dial else []
    sets += [FOUR_LAYERS[name]] if name in FOUR_LAYERS else []
    sets += [] if cached else ["generate.cache=none"]
    return recipe.with_sets([*sets, "generate.gen_length=8", "generate.steps=4"])


def run(model: Backbone, recipe: Recipe, samples: list[int]) -> Ran:
    table = compile_recipe(recipe, model.facts)
    rule = rule_for(model, recipe, {}, pictures=True)
    prompts = [_prompt(model, table, i) for i in samples]
    seen: dict[tuple[int, int], list[int]] = {}
    clocks: dict[int, Clock] = {}

    def look(state: PassState, layer: int) -> None:
        keys, alive = state.keys, []
        clocks[state.clock.pass_index] = state.clock
        for b, rows in enumerate(keys.visual_rows):
            hidden = 0 if keys.hidden_key is None else int(keys.hidden_key[b, rows].sum())
            alive.append(rows.shape[0] - hidden)
        seen[state.clock.pass_index, layer] = alive

    def leave(state: PassState, layer: int, do: Any = PassState.leave_attention) -> None:
        look(state, layer)
        do(state, layer)

    def count(state: PassState, do: Any = PassState.count_all_layers) -> None:
        for layer in range(state.kit.dims.layers):
            look(state, layer)
        do(state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PassState, "leave_attention", leave)
        patch.setattr(PassState, "count_all_layers", count)
        out = generate(model, prompts, rule, table, samples=samples)
    return Ran(recipe, table, prompts, out, seen, clocks)


_PROMPTS: dict[tuple[int, int], Prompt] = {}


def _prompt(model: Backbone, table: ProbeTable, i: int) -> Prompt:
    """Encoded once per model where no probe acts in the encoder."""
    key = (id(model), i)
    if table.encoder or key not in _PROMPTS:
        done = encode_with_probes(model, [picture(SIZES[i])], table, question=QUESTIONS[i], seed=i)
        prompt = done.assemble(model, QUESTIONS[i])
        if table.encoder:
            return prompt
        _PROMPTS[key] = prompt
    return _PROMPTS[key]


# -- what should happen --------------------------------------------------------------------------------------------


def refusal(recipe: Recipe, model: Backbone, cached: bool) -> str | None:
    """Why a recipe cannot run on a backbone, in a word that the message must have; None where it can."""
    text, cache_name = recipe.to_yaml(), next(iter(model.defaults.cache)) if cached else "none"
    sites = {probe.at.site for probe in recipe.probes} - {Site.IMAGES}
    if "text_image" in text and not model.facts.text_tower:
        return "no text tower|encoder"
    offered = model.encoder_cost is not None and not sites & set(dict(model.facts.refused))
    if any(site.in_encoder for site in sites) and not offered:
        return "encoder"
    if Site.PREFIX_CACHE in sites and cache_name == "none":
        return "there is no cache: set `generate.cache`"
    if any(probe.at.steps.exactly == ("prefill",) for probe in recipe.probes) and cache_name == "none":
        return "there is none: set `generate.cache`"
    if model.causal and re.search(r"(queries|from): \[?\$?masked|queries: masked", _spelled(recipe)):
        return "one token after the other"
    if cache_name == "prefix" and Site.FINAL in sites:
        return "reads the hidden states of visual tokens"
    return None


def _spelled(recipe: Recipe) -> str:
    """Scores and conditions with their dials replaced."""
    parts = [str([x.params for x in (p.score, p.select, p.do) if x]).replace("'", "") for p in recipe.probes]
    return " ".join([*parts, *(f"from: {c.source}" for p in recipe.probes for c in p.at.when)])


PLANNED = ("drop", "withdraw", "skip_layers", "merge")
NO_ONE_YET = ("masked", "answer", "filled", "predicting")
"""Rows that the prefill of a prefix cache does not have."""


def planned(ran: Ran, b: int, cache_name: str) -> np.ndarray | None:
    """`(pass, layer)`: alive tokens by the recipe's own numbers; None where they depend on the sample's content."""
    edits, n = ran.table.edits, ran.prompts[b].n_original
    if not all(_by_number(p) for p in edits):
        return None
    out, left = np.full((len(ran.clocks), LAYERS), n), n
    for i, clock in sorted(ran.clocks.items()):
        out[i], after = left, left
        for probe in edits:
            alone = cache_name == "prefix" and clock.phase is Phase.PREFILL  # the prompt without the answer
            unseen = alone and probe.layer is not None and _queries(probe) in NO_ONE_YET
            assert probe.edit is not None
            if unseen or not probe.fires(clock):
                continue
            do, layer = probe.edit.do, -1 if probe.layer is None else probe.layer
            if do.entry.name == "skip_layers":
                out[i, layer] = 0
                continue
            target = 0 if do.entry.name == "withdraw" else _kept(probe, clock, n)
            first = {Site.BEFORE_LM: 0, Site.PREFIX_CACHE: 0, Site.LAYER_INPUT: layer, Site.FINAL: LAYERS}.get(
                probe.site, layer + 1
            )
            out[i, first:] = np.minimum(out[i, first:], target)
            if do.params(clock).get("lasts") == "generation":
                after = min(after, target)
        left = after
    return out


def _queries(probe: BoundProbe) -> str:
    score = probe.edit.score if probe.edit else None
    return str(score.variants[0].get("queries", "")) if score else ""


def _by_number(probe: BoundProbe) -> bool:
    assert probe.edit is not None
    name, how = probe.edit.do.entry.name, probe.edit.select
    if probe.site.in_encoder or probe.when or name not in PLANNED:
        return False
    if name in ("withdraw", "skip_layers"):
        return how.entry.name == "none"
    return isinstance(how.variants[0].get("keep"), int | float) and how.entry.name != "pivots"


def _kept(probe: BoundProbe, clock: Clock, n: int) -> int:
    assert probe.edit is not None
    params = probe.edit.select.params(clock)
    return token_count(params["keep"], n, params.get("round", "floor"))


# -- what does -----------------------------------------------------------------------------------------------------


def check(ran: Ran, cache_name: str) -> None:
    """One fate per token and place; the ledger's counts are those of the keys that were there, and those planned."""
    for b, (prompt, out) in enumerate(zip(ran.prompts, ran.out, strict=True)):
        fates, counts = out.arrays["visual_kept"], out.arrays["visual_tokens"]
        assert fates.shape == (*counts.shape, prompt.n_visual)
        assert set(np.unique(fates)) <= {int(f) for f in Fate}
        assert counts.shape[1] == LAYERS
        assert np.isfinite(out.arrays["flops"]).all()
        kept = (fates == int(Fate.KEPT)).sum(-1)
        assert (counts >= kept).all()
        if len(ran.prompts) == 1:
            realised = [[ran.seen[i, layer][0] for layer in range(LAYERS)] for i in range(len(counts))]
            np.testing.assert_array_equal(realised, counts)
        expected = planned(ran, b, cache_name) if len(ran.prompts) == 1 else None
        if expected is not None:
            np.testing.assert_array_equal(counts, expected)
        if all(probe.site.in_encoder for probe in ran.table.edits):
            assert (counts == int((prompt.visual >= 0).sum())).all()


def matrix() -> list[Any]:
    cases = []
    for name in NAMES:
        for model in BUILDERS:
            always = name.split("/")[1] in EVERYWHERE or model in LOOKED_AT
            marks = () if always else (pytest.mark.slow,)
            cases.append(pytest.param(name, model, marks=marks, id=f"{name}-{model.split('/')[-1]}"))
    return cases


@pytest.mark.parametrize(("name", "model"), matrix())
def test_a_recipe_runs_on_a_backbone_or_says_why_not(
    name: str, model: str, backbone: Callable[..., Backbone], routers: Path
) -> None:
    it = backbone(model)
    own = next(iter(it.defaults.cache))
    assert next(iter(it.defaults.unmask)) in unmaskings
    for cache_name in dict.fromkeys([own, "none"]):
        recipe = ready(name, routers, cached=cache_name == own)
        if reason := refusal(recipe, it, cached=cache_name == own):
            with pytest.raises(ProbeError, match=reason):
                run(it, recipe, [0])
            continue
        alone = run(it, recipe, [0])
        check(alone, cache_name)
        if it.batches and cache_name == own:
            both = run(it, recipe, [0, 1])
            check(both, cache_name)
            assert both.out[0].ids == alone.out[0].ids
            np.testing.assert_array_equal(both.out[0].arrays["visual_kept"], alone.out[0].arrays["visual_kept"])


FLOPS = ["divprune", "fastv", "sparsevlm", "sparsevlm_plus", "dart", "pyramiddrop", "topv", "vtw", "random_merge"]


@pytest.mark.parametrize(
    ("name", "model"),
    [
        pytest.param(f"prune/{name}", model, marks=() if i % 3 == j else (pytest.mark.slow,))
        for i, name in enumerate(FLOPS)
        for j, model in enumerate(m for m in BUILDERS if "lavida-dream" in m or "Dimple" in m or m == "qwen-vl")
    ],
)
def test_counted_flops_are_those_of_torchs_counter(
    name: str, model: str, backbone: Callable[..., Backbone], routers: Path
) -> None:
    it = backbone(model, "eager")
    recipe = ready(name, routers, cached=True)
    table, rule = compile_recipe(recipe, it.facts), rule_for(it, recipe, {}, pictures=True)
    prompt = _prompt(it, table, 0)
    with FlopCounterMode(display=False) as counter:
        out = generate(it, [prompt], rule, table, samples=[0])[0]
    assert out.arrays["flops"].sum() == counter.get_total_flops()


def test_named_steps_act_each_for_itself_with_a_cache(backbone: Callable[..., Backbone], routers: Path) -> None:
    """A cache that computes the prompt once does so again where a later act must see it: all planned cuts happen."""
    it = backbone(next(m for m in BUILDERS if "Dimple" in m))
    cached, whole = (run(it, ready("prune/progressive", routers, cached=c), [0]).out[0] for c in (True, False))
    np.testing.assert_array_equal(cached.arrays["visual_tokens"], whole.arrays["visual_tokens"])
    assert len(np.unique(whole.arrays["visual_tokens"])) >= 3


def test_tokens_that_live_for_one_pass_are_not_stored(backbone: Callable[..., Backbone], routers: Path) -> None:
    """`recycled: forward`: behind the layer they are there in that pass, and in none after it, cache or not."""
    for model in (m for m in BUILDERS if "lavida-dream" in m or "Dimple" in m or m == "qwen-vl"):
        ran = run(backbone(model), ready("study/study_sparsevlm", routers, cached=True), [0])
        counts, kept = ran.out[0].arrays["visual_tokens"], ran.out[0].arrays["visual_kept"] == int(Fate.KEPT)
        extra = counts - kept.sum(-1)
        assert extra[0].max() > 0
        assert (extra[1:] == 0).all()
        check(ran, next(iter(backbone(model).defaults.cache)))


@pytest.mark.parametrize("model", BUILDERS)
def test_a_smaller_picture_is_counted_against_the_whole_one(
    model: str, backbone: Callable[..., Backbone], routers: Path
) -> None:
    it, recipe = backbone(model), ready("prune/downsample", routers, cached=True)
    whole = it.encode([picture((112, 84))], QUESTIONS[0])
    table = compile_recipe(recipe.with_sets(["scale=0.5"]), it.facts)
    small = encode_with_probes(it, [picture((112, 84))], table).assemble(it, QUESTIONS[0])
    direct = it.encode([picture((112, 84)).resize((56, 42), Image.Resampling.BICUBIC)], QUESTIONS[0])
    assert torch.equal(small.embeds, direct.embeds)
    assert small.n_original == whole.n_visual == whole.n_original
    assert small.n_visual == direct.n_visual
    rule = rule_for(it, recipe, {}, pictures=True)
    assert int(generate(it, [small], rule, table)[0].arrays["visual_original"]) == whole.n_visual
    same = compile_recipe(recipe.with_sets(["scale=1.0"]), it.facts)
    assert torch.equal(
        encode_with_probes(it, [picture((112, 84))], same).assemble(it, QUESTIONS[0]).embeds, whole.embeds
    )


@torch.inference_mode()
def test_pooling_is_torchs_average_of_squares(backbone: Callable[..., Backbone], routers: Path) -> None:
    """Every view behind the projector, against `avg_pool2d` with smaller squares at the edges."""
    it = backbone(next(m for m in BUILDERS if "LLaDA-V" in m))
    bare = it.encode_images([picture((60, 30))]).projected
    side = round(bare.shape[1] ** 0.5)
    table = compile_recipe(ready("prune/pool", routers, cached=True).with_sets(["side=3"]), it.facts)
    done = encode_with_probes(it, [picture((60, 30))], table).features
    grid = bare.reshape(-1, side, side, bare.shape[2]).permute(0, 3, 1, 2)
    pooled = torch.nn.functional.avg_pool2d(grid, 3, ceil_mode=True).flatten(2).transpose(1, 2)
    assert done.survivors is not None
    for view, alive in enumerate(done.survivors.alive):
        torch.testing.assert_close(done.projected[view, : alive.shape[0]], pooled[view], atol=1e-5, rtol=1e-5)
