"""Probes on a backbone that is unlike the others: kinds of layers, causal rows, pictures, canvases of noise.

The identities of the other backbones' tests, on small random weights in float64: what a canvas becomes is told to the
next pass, so rounding would grow.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gemma_checkpoint import noise_picture, write_gemma
from interventions import EDITS, RECORD
from torch.utils.flop_counter import FlopCounterMode

import probe
from probe.backbones import load
from probe.backbones.base import Backbone, Prompt
from probe.backbones.rows import Rows
from probe.data import Sample
from probe.decoding.caching import Blocks, NoCache
from probe.decoding.renoise import Renoise
from probe.recipe import parse_recipe
from probe.site import Fate
from probe.trace import open_trace

NOTHING = "- {at: {site: logits}, record: [confidence]}\n"
CACHES = pytest.mark.parametrize("caching", [NoCache(), Blocks()], ids=["none", "blocks"])
CUTS = ("fastv", "fastv_late_for_good", "between", "divprune", "two_layers", "withdraw")
OTHERS = ("merge", "sparsevlm", "skip_some", "reweight", "rotary", "pyramiddrop")
FEW = [(edit, caching) for caching in (NoCache(), Blocks()) for edit in ("none", *CUTS[:4])]
MANY = pytest.mark.parametrize(("edit", "caching"), [*FEW, *((edit, Blocks()) for edit in OTHERS)])
PROJECTED = """
- name: edit
  at: {site: layer.input, layer: LAYER}
  score: {attention: {projected: true, layer: 0, queries: last}}
  select: {top_k: {keep: 0.25}}
  do: {drop: {lasts: forward}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    return write_gemma(tmp_path_factory.mktemp("gemma"), dtype=torch.float64)


@pytest.fixture(scope="module")
def model(folder: Path) -> Backbone:
    return load(folder, experts="eager")


@pytest.fixture(scope="module")
def eager(folder: Path) -> Backbone:
    return load(folder, experts="eager", attention="eager")


@pytest.fixture(scope="module")
def prompts(model: Backbone) -> list[Prompt]:
    """Of different lengths; the first shows two pictures."""
    two = [noise_picture(20, 17), noise_picture(31, 12)]
    return [model.encode(two, "Same?"), model.encode(two[1:], "What is it?")]


@pytest.fixture(scope="module")
def run(model: Backbone, run_probes: Any) -> Any:
    def go(prompts: list[Prompt], probes: str = NOTHING, *, on: Backbone = model, **settings: Any) -> Any:
        given = {"gen_length": 10, "block_length": 5, "steps": 6, "unmasking": Renoise(), "vocabulary": 272}
        return run_probes(on, prompts, probes, **given | settings)

    return go


def same(a: Any, b: Any) -> None:
    assert a.ids == b.ids
    for name in ("token", "confidence", "commit_step"):
        np.testing.assert_array_equal(a.arrays[name], b.arrays[name], err_msg=name)


@CACHES
@pytest.mark.parametrize("edit", ["none", "fastv"])
def test_recording_changes_nothing_bit_for_bit(edit: str, caching: Any, run: Any, prompts: list[Prompt]) -> None:
    text = NOTHING if edit == "none" else EDITS[edit]
    same(run(prompts[:1], text + RECORD, caching=caching)[0], run(prompts[:1], text, caching=caching)[0])


@CACHES
@pytest.mark.parametrize("edit", ["fastv", "divprune", "output"])
def test_keeping_everything_is_no_probe_bit_for_bit(edit: str, caching: Any, run: Any, prompts: list[Prompt]) -> None:
    kept = run(prompts[:1], EDITS[edit].replace("keep: 0.25", "keep: 1.0"), caching=caching)[0]
    same(kept, run(prompts[:1], caching=caching)[0])


@MANY
def test_a_batch_is_its_samples_and_what_is_seen_adds_up(
    edit: str, caching: Any, run: Any, prompts: list[Prompt]
) -> None:
    text = (NOTHING if edit == "none" else EDITS[edit]) + RECORD
    together = run(prompts, text, samples=[3, 8], caching=caching)
    for i, prompt in enumerate(prompts):
        alone = run([prompt], text, samples=[[3, 8][i]], caching=caching)[0]
        assert together[i].ids == alone.ids
        for name in ("confidence", "attention_mass", "visual_importance", "entropy"):
            np.testing.assert_allclose(together[i].arrays[name], alone.arrays[name], atol=5e-5, err_msg=name)
        for name in ("visual_kept", "visual_tokens", "commit_step", "token"):
            np.testing.assert_array_equal(together[i].arrays[name], alone.arrays[name], err_msg=name)
        mass = alone.arrays["attention_mass"].sum(-1)
        np.testing.assert_allclose(mass[~np.isnan(mass)], 1, atol=1e-5)
        assert not np.isnan(mass).all()


@CACHES
@pytest.mark.parametrize("edit", CUTS)
def test_an_edit_does_change_something(edit: str, caching: Any, run: Any, prompts: list[Prompt]) -> None:
    plain = run(prompts[:1], caching=caching)[0].arrays["confidence"]
    cut = run(prompts[:1], EDITS[edit], caching=caching)[0]
    assert not np.array_equal(plain, cut.arrays["confidence"], equal_nan=True)
    assert (cut.arrays["visual_kept"] != int(Fate.KEPT)).any()


@CACHES
@pytest.mark.parametrize("edit", CUTS[:-1])
def test_masking_equals_dropping_with_positions_kept(edit: str, caching: Any, run: Any, prompts: list[Prompt]) -> None:
    lasts = "generation" if "lasts: generation" in EDITS[edit] else "forward"
    text = EDITS[edit].split("  do:")[0] + f"  do: {{mask: {{lasts: {lasts}}}}}\n"
    pairs = zip(run(prompts, EDITS[edit], caching=caching), run(prompts, text, caching=caching), strict=True)
    for dropped, masked in pairs:
        assert dropped.ids == masked.ids
        np.testing.assert_allclose(dropped.arrays["confidence"], masked.arrays["confidence"], atol=2e-5)
        kept = dropped.arrays["visual_kept"] == int(Fate.KEPT)
        np.testing.assert_array_equal(kept, masked.arrays["visual_kept"] == int(Fate.KEPT))


@CACHES
@pytest.mark.parametrize("lasts", ["forward", "generation"])
def test_dropping_before_the_model_is_a_prompt_without_them(
    lasts: str, caching: Any, run: Any, prompts: list[Prompt]
) -> None:
    """A prompt that never had the dropped tokens, its others where they were: decided once, or again in every pass."""
    (prompt,) = prompts[:1]
    cut = run([prompt], EDITS["divprune"].replace("lasts: generation", f"lasts: {lasts}"), caching=caching)[0]
    kept = cut.arrays["visual_kept"][:, 0] == int(Fate.KEPT)
    assert (kept == kept[0]).all() and 0 < kept[0].sum() < kept[0].size
    alive = torch.from_numpy(kept[0])
    rows = (prompt.visual < 0) | alive[prompt.visual.clamp(min=0)]
    short = replace(
        prompt,
        embeds=prompt.embeds[rows],
        ids=prompt.ids[rows],
        role=prompt.role[rows],
        visual=torch.where(prompt.visual >= 0, alive.cumsum(0)[prompt.visual.clamp(min=0)] - 1, -1)[rows],
        box=prompt.box[alive],
        view=prompt.view[alive],
        picture=prompt.picture[alive],
        position=torch.arange(len(prompt.ids))[rows],
    )
    expected = run([short], caching=caching)[0]
    assert cut.ids == expected.ids
    np.testing.assert_allclose(cut.arrays["confidence"], expected.arrays["confidence"], atol=2e-5)


@pytest.mark.parametrize("layer", [1, 2])
def test_projected_attention_is_what_the_layer_then_pays(layer: int, run: Any, prompts: list[Prompt]) -> None:
    """In a layer of either kind: its own rotary table, its own mask. Scored before it runs, and after."""
    after = EDITS["fastv"].replace("layer: 2", f"layer: {layer + 1}")
    before = PROJECTED.replace("LAYER", str(layer))
    for p in prompts:
        found = [run([p], text)[0].arrays["visual_kept"][0, layer + 1] for text in (before, after)]
        np.testing.assert_array_equal(found[0], found[1])
        assert (found[0] == int(Fate.KEPT)).sum() == p.n_visual // 4


@MANY
def test_flops_are_torchs(edit: str, caching: Any, run: Any, prompts: list[Prompt], eager: Backbone) -> None:
    with FlopCounterMode(display=False) as counter:
        out = run(prompts[:1], NOTHING if edit == "none" else EDITS[edit], caching=caching, on=eager)[0]
    assert out.arrays["flops"].sum() == counter.get_total_flops()


def test_positions_that_were_shrunk_hide_nothing(
    run: Any, prompts: list[Prompt], model: Backbone, monkeypatch: Any
) -> None:
    """Stored keys keep their places; an answer that moves to the left still sees all that stands before it."""
    masks: list[torch.Tensor] = []
    sees = model.sees

    def watched(query: Rows, key: Rows) -> tuple[torch.Tensor | None, ...]:
        out = sees(query, key)
        masks.append(out[1])  # the kind without a window
        if query.open.all():
            moved.append(bool((key.position.amax(1) > query.position.amax(1)).any()))
        return out

    moved: list[bool] = []
    monkeypatch.setattr(model, "sees", watched)
    text = EDITS["divprune"].replace("before_lm", "before_lm, steps: {at: [1]}")
    options = "lasts: generation, on_cache: columns, answer_positions: shrunk"
    run(prompts[:1], text.replace("lasts: generation", options), caching=Blocks())
    assert any(moved)
    for mask in masks:
        if mask.shape[2] == 5:
            assert mask.all()


def test_arrays_of_a_generation(run: Any, prompts: list[Prompt], model: Backbone) -> None:
    out = run(prompts, RECORD, caching=Blocks())
    for prompt, one in zip(prompts, out, strict=True):
        n, arrays = prompt.n_visual, one.arrays
        assert arrays["visual_importance"].shape == (6, 4, n)
        assert arrays["visual_kept"].shape == (6, 4, n) and (arrays["visual_kept"] == int(Fate.KEPT)).all()
        assert arrays["commit_step"].tolist() == [2] * 5 + [5] * 5
        assert arrays["block"].tolist() == [0, 0, 0, 1, 1, 1]
        assert arrays["rows_computed"].tolist() == [len(prompt.ids) + 5, 5, 5, 10, 5, 5]
        open_ = np.repeat([[True] * 5 + [False] * 5, [False] * 5 + [True] * 5], 3, 0)
        np.testing.assert_array_equal(np.isnan(arrays["confidence"]), ~open_)
        np.testing.assert_array_equal(np.isnan(arrays["entropy"]), ~open_)
        computed = open_.copy()
        computed[3, :5] = True
        np.testing.assert_array_equal(arrays["recomputed"], computed)
        assert (arrays["token"][:2] == model.special.mask).all() and arrays["token"][-1].tolist() == one.ids
        assert arrays["flops_total"] > 0 and one.text == model.decode(one.ids)
    assert len({tuple(one.ids) for one in out}) == 2


RECIPE = """
schema: 1
name: gemma
generate: {gen_length: 10, block_length: 5, steps: 6}
probes:
- {name: seen, at: {site: layer.attention, layers: all}, record: [attention_mass, visual_importance]}
- {name: said, at: {site: logits}, record: [entropy, margin, logit_kl]}
- {name: moved, at: {site: layer.output, layers: all}, record: [hidden_norm]}
- name: cut
  at: {site: layer.input, layer: 2}
  score: {attention: {layer: -1, queries: last}}
  select: {top_k: {keep: 0.5}}
  do: {drop: {lasts: forward}}
"""


def test_a_run_leaves_traces(model: Backbone, tmp_path: Path) -> None:
    samples = [
        Sample(str(i), (noise_picture(20 + i, 17),), question) for i, question in enumerate(("What?", "Where is it?"))
    ]
    done = probe.run(parse_recipe(RECIPE), backbone=model, samples=samples, out=tmp_path)
    assert done.failed == 0 and done.samples == 2
    with open_trace(done.trace) as cut, open_trace(done.baseline) as plain:
        assert cut.n_samples == plain.n_samples == 2
        for i in range(2):
            n = 9  # soft tokens: the most that 12 allow in a square
            seen, kept = cut.row("visual_importance", i), cut.row("visual_kept", i)
            assert seen.shape == kept.shape == (6, 4, n)
            assert ((kept == int(Fate.KEPT)).sum(-1) == [n, n, n // 2, n // 2]).all()
            np.testing.assert_array_equal(np.isnan(seen), kept != int(Fate.KEPT))
            np.testing.assert_allclose(cut.row("attention_mass", i).sum(-1), 1, atol=1e-5)
            apart = cut.row("logit_kl", i)
            assert np.isfinite(cut.row("hidden_norm", i)).any() and np.nanmax(apart) > 1e-3
            assert (np.isnan(apart) == np.isnan(cut.row("entropy", i))).all()
            assert cut.row("flops_unrecorded", i) < plain.row("flops_unrecorded", i)
            assert (plain.row("visual_kept", i) == int(Fate.KEPT)).all()
