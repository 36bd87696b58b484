"""Runs with probes in the encoder: both sides, the trace, and edits in the language model behind them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoder_probes import APPEND, EDITS, HEADER, PROJECTED, RECORD, TOME, encode
from PIL import Image

import probe
from probe.backbones.llada_v import LladaV
from probe.compile import compile_recipe
from probe.data import load as pictures
from probe.generate import generate
from probe.loop import Rule
from probe.recipe import parse_recipe
from probe.site import Fate

LATER = """
- name: later
  at: {site: layer.input, layer: 2}
  score: {attention: {layer: -1, queries: all}}
  select: {top_k: {keep: 0.1}}
  do: {drop: {lasts: generation}}
"""
LOOK = "- {name: look, at: {site: layer.attention, layers: all}, record: [attention_mass, visual_importance]}\n"


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return next(pictures("world/mixed", 1)).images[0]


def answer(model: LladaV, prompts: list[Any], text: str) -> list[Any]:
    table = compile_recipe(parse_recipe(HEADER + text), model.facts)
    rule = Rule(gen_length=8, block_length=8, steps=4, mask_id=model.special.mask, suppressed=model.special.suppressed)
    return generate(model, prompts, rule, table)


@pytest.mark.parametrize("edit", EDITS)
def test_every_patch_is_in_one_state_at_every_step_and_layer(edit: str, tiny: LladaV, picture: Image.Image) -> None:
    prompt = tiny.assemble("what?", encode(tiny, [picture], EDITS[edit]).features)
    for text in (LOOK, LATER + LOOK):
        out = answer(tiny, [prompt], text)[0].arrays
        kept = out["visual_kept"]
        assert kept.shape[-1] == prompt.n_visual == out["visual_box"].shape[0] == out["visual_role"].shape[0]
        assert (kept > 0).all()
        np.testing.assert_array_equal((kept == Fate.KEPT).sum(-1), out["visual_tokens"])
        assert prompt.fate is not None
        gone = (prompt.fate != int(Fate.KEPT)).numpy()
        assert (kept[..., gone] == prompt.fate.numpy()[gone]).all(), "what the encoder lost stays lost"
        assert np.isnan(out["visual_importance"][..., gone]).all()
        np.testing.assert_allclose(out["attention_mass"].sum(-1), 1, atol=1e-5)
    assert out["visual_tokens"][0, -1] == min(prompt.n_original // 10, int((~gone).sum())), "a share of the unpruned"


def test_dropping_behind_the_projector_answers_as_dropping_before_the_language_model(
    tiny: LladaV, picture: Image.Image
) -> None:
    """The same tokens, hidden in the unpruned sequence: the same confidences."""
    done = encode(tiny, [picture], PROJECTED).features
    pruned, whole = tiny.assemble("what?", done), tiny.assemble("what?", tiny.encode_images([picture]))
    assert pruned.position is not None
    seen = set(whole.visual[pruned.position].tolist()) - {-1}
    keep = torch.zeros(whole.n_visual)
    keep[sorted(seen)] = 1.0

    import probe.registry as registry

    @registry.scores.register(name="encoder_test_same")
    def same(n: int) -> torch.Tensor:
        """One for tokens that the encoder left."""
        return keep

    try:
        text = "- {at: {site: before_lm}, score: encoder_test_same, "
        text += f"select: {{top_k: {{keep: {len(seen)}}}}}, do: {{mask: {{lasts: generation}}}}}}\n"
        masked = answer(tiny, [whole], text)[0]
    finally:
        del registry.scores._entries["encoder_test_same"]
    left = answer(tiny, [pruned], "- {at: {site: logits}, record: [confidence]}\n")[0]
    assert left.ids == masked.ids
    np.testing.assert_allclose(left.arrays["confidence"], masked.arrays["confidence"], atol=1e-5)


def test_a_batch_is_its_samples_one_by_one(tiny: LladaV, picture: Image.Image) -> None:
    images = [picture, picture.resize((96, 48)), picture.rotate(90)]
    prompts = [
        tiny.assemble("what?", encode(tiny, [i], t).features) for i, t in zip(images, (TOME, APPEND, TOME), strict=True)
    ]
    together = answer(tiny, prompts, LATER + LOOK)
    for prompt, one in zip(prompts, together, strict=True):
        alone = answer(tiny, [prompt], LATER + LOOK)[0]
        assert one.ids == alone.ids
        np.testing.assert_array_equal(one.arrays["visual_kept"], alone.arrays["visual_kept"])
        np.testing.assert_allclose(one.arrays["confidence"], alone.arrays["confidence"], atol=1e-5)


def run(text: str, model: LladaV, folder: Path, **options: Any) -> Any:
    return probe.run(probe.parse_recipe(text), backbone=model, out=folder, limit=2, **options)


def test_a_run_encodes_each_side_with_its_own_probes(tiny: LladaV, tmp_path: Path) -> None:
    text = f"schema: 1\nname: run\ngenerate: {{gen_length: 8, steps: 4}}\nprobes:{TOME}{RECORD}"
    result = run(text, tiny, tmp_path)
    assert result.failed == 0
    base, pruned = result.rows
    assert base.retention == 1.0
    assert pruned.retention == pytest.approx((5 * 36 - 5 * 14) / 192)
    assert pruned.flops < base.flops
    with probe.open(result.trace) as trace, probe.open(result.baseline) as baseline:
        assert trace.row("patch_importance", 0).shape == (2, 180)
        assert trace.array("visual_original").tolist() == [192, 192]
        assert trace.summary()["retention"] == pytest.approx(pruned.retention)
        assert trace.row("encoder_tokens", 0).tolist() == [[36] * 5, [29] * 5]
        kept = trace.row("visual_kept", 0)
        assert (kept == Fate.MERGED).sum(-1).tolist() == [[70] * 4] * kept.shape[0]
        assert "patch_importance" in baseline.variables, "the baseline records the unpruned encoder"
        assert baseline.row("encoder_tokens", 0).tolist() == [[36] * 5, [36] * 5]
        assert baseline.row("visual_kept", 0).shape[-1] == 192
        encode_, probe_ = (trace.coords["phase"].index(p) for p in ("encode", "probe"))
        flops = trace.row("flops", 0)
        assert 0 < flops[0, encode_] < baseline.row("flops", 0)[0, encode_]
        assert flops[0, probe_] > 0
        assert trace.row("seconds", 0)[0, [encode_, probe_]].min() > 0
        total, unrecorded = (float(trace.array(n)[0]) for n in ("flops_total", "flops_unrecorded"))
        assert total == pytest.approx(flops.sum())
        assert unrecorded < total, "recording in the encoder is not charged to the method"
    bare = run(text.replace(RECORD, "\n"), tiny, tmp_path / "bare")
    assert bare.rows[1].flops == pytest.approx(pruned.flops)
    with probe.open(bare.trace) as trace:
        assert float(trace.array("flops_total")[0]) == pytest.approx(unrecorded)


def test_a_trace_of_the_encoder_can_be_run_again(tiny: LladaV, tmp_path: Path) -> None:
    text = f"schema: 1\nname: again\ngenerate: {{gen_length: 8, steps: 4}}\nprobes:{EDITS['random']}"
    first = run(text, tiny, tmp_path / "a")
    again = run(text, tiny, tmp_path / "b")
    with probe.open(first.trace) as a, probe.open(again.trace) as b:
        for name in ("token", "visual_kept", "confidence"):
            for i in range(2):
                np.testing.assert_array_equal(a.row(name, i), b.row(name, i))
