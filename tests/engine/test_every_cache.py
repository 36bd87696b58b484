"""Interventions and signals under every cache: what must hold of them all, whatever the weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from interventions import EDITS, RECORD

from probe.assemble import ALWAYS
from probe.backbones.llada_v import LladaV
from probe.decoding.caching import Crop, PrefixLM
from probe.decoding.dllm_cache import DllmCache
from probe.decoding.dpad import Dpad
from probe.decoding.fast_cache import Dkv, FastDual, FastPrefix, SparseDllm
from probe.decoding.policy import Caching
from probe.site import Fate

CACHES: dict[str, Caching] = {
    "fast_prefix": FastPrefix(),
    "fast_dual": FastDual(refresh=3),
    "dkv": Dkv(refresh=3),
    "sparse_dllm": SparseDllm(),
    "sparse_few": SparseDllm(keep=0.2, kernel=1),
    "dllm_cache": DllmCache(prompt=5, answer=3, ratio=0.5),
    "dllm_frozen": DllmCache(prompt=100, answer=100, ratio=0.0),
    "dpad": Dpad(sigma=2.0, scale=1.5, window=3),
}
RULE = {"gen_length": 8, "block_length": 8, "steps": 8}
NOTHING = "- {at: {site: logits}, record: [confidence]}\n"
# edits whose rows are computed in every pass of these caches, or which make the pass compute everything
PLAIN = ["fastv", "fastv_late_for_good", "divprune", "random", "two_layers", "withdraw"]
NEEDS_ROWS = ["output", "between", "between_compact_for_good"]

both = pytest.mark.parametrize("name", CACHES)


# dLLM-Cache stores what a layer's halves add: an edit between them is refused before it runs (probe.composition)
PAIRS = [
    (name, edit)
    for name in CACHES
    for edit in ["none", *PLAIN, *NEEDS_ROWS]
    if not (name.startswith("dllm") and edit.startswith("between"))
]


@pytest.mark.parametrize(("name", "edit"), PAIRS)
def test_a_batch_is_its_samples_and_looking_changes_nothing(
    name: str, edit: str, tiny: LladaV, prompts_for: Any, run_probes: Any
) -> None:
    prompts, caching = prompts_for(tiny, 2), CACHES[name]
    text = NOTHING if edit == "none" else EDITS[edit]
    together = run_probes(tiny, prompts, text + RECORD, samples=[0, 0], caching=caching, **RULE)
    for i, prompt in enumerate(prompts):
        alone = run_probes(tiny, [prompt], text + RECORD, samples=[0], caching=caching, **RULE)[0]
        bare = run_probes(tiny, [prompt], text, samples=[0], caching=caching, **RULE)[0]
        assert together[i].ids == alone.ids == bare.ids
        np.testing.assert_array_equal(alone.arrays["confidence"], bare.arrays["confidence"])
        for variable in ("confidence", "attention_mass", "visual_importance", "entropy"):
            np.testing.assert_allclose(
                together[i].arrays[variable], alone.arrays[variable], atol=1e-4, err_msg=variable
            )
        for variable in ("visual_kept", "visual_tokens", "commit_step", "recomputed", "rows_computed"):
            np.testing.assert_array_equal(together[i].arrays[variable], alone.arrays[variable], err_msg=variable)
        mass = alone.arrays["attention_mass"].sum(-1)
        np.testing.assert_allclose(mass[~np.isnan(mass)], 1, atol=1e-5)
        seen = ~np.isnan(alone.arrays["visual_importance"])
        rows = ~np.isnan(mass)[:, :, 0]
        alive = alone.arrays["visual_kept"] == int(Fate.KEPT)
        np.testing.assert_array_equal(seen[rows], alive[rows])
        np.testing.assert_array_equal(alive.sum(-1), alone.arrays["visual_tokens"])


@both
@pytest.mark.parametrize("edit", ["none", *PLAIN, "output"])
def test_flops_are_torchs(name: str, edit: str, tiny_eager: LladaV, prompts_for: Any, run_probes: Any) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    prompts = prompts_for(tiny_eager, 1)
    text = NOTHING if edit == "none" else EDITS[edit]
    with FlopCounterMode(display=False) as counter:
        out = run_probes(tiny_eager, prompts, text, caching=CACHES[name], **RULE)[0]
    assert out.arrays["flops"].sum() == counter.get_total_flops()


@pytest.mark.parametrize(
    "caching",
    [FastPrefix(refresh=1), FastDual(refresh=1), Dkv(refresh=1), DllmCache(prompt=1, answer=1), Dpad(scale=100.0)],
    ids=lambda c: type(c).__name__,
)
@pytest.mark.parametrize("edit", ["none", *PLAIN])
@pytest.mark.parametrize("settings", [{}, {"cfg_scale": 0.7}], ids=["plain", "guided"])
def test_what_is_refreshed_in_every_pass_is_no_cache(
    caching: Caching, edit: str, settings: Any, tiny: LladaV, prompts_for: Any, run_probes: Any
) -> None:
    """Bit for bit: tokens, confidences, and what became of every visual token."""
    text = NOTHING if edit == "none" else EDITS[edit]
    prompts = prompts_for(tiny, 2)
    ours = run_probes(tiny, prompts, text, caching=caching, **RULE, **settings)
    plain = run_probes(tiny, prompts, text, **RULE, **settings)
    for a, b in zip(ours, plain, strict=True):
        assert a.ids == b.ids
        for variable in ("confidence", "visual_kept", "token"):
            np.testing.assert_array_equal(a.arrays[variable], b.arrays[variable])


@pytest.mark.parametrize("name", ["fast_prefix", "fast_dual", "dkv", "dllm_cache", "crop", "sparse_dllm"])
def test_a_removal_for_good_makes_the_next_pass_a_refresh(
    name: str, tiny: LladaV, prompts_for: Any, run_probes: Any
) -> None:
    caching = CACHES.get(name, Crop())
    text = EDITS["random"].replace("lasts: forward", "lasts: generation, on_cache: WHICH")
    text = text.replace("from: 25%", "at: [4]")
    prompts = prompts_for(tiny, 1)
    renewed = run_probes(tiny, prompts, text.replace("WHICH", "refresh"), caching=caching, **RULE)[0].arrays
    cut = run_probes(tiny, prompts, text.replace("WHICH", "columns"), caching=caching, **RULE)[0].arrays
    (phases,) = [v.flags for v in ALWAYS if v.name == "phase_of_pass"]
    assert phases is not None
    assert renewed["removal_on_cache"].tolist() == [0, 0, 0, 0, 2, 0, 0, 0]
    assert cut["removal_on_cache"].tolist() == [0, 0, 0, 0, 1, 0, 0, 0]
    assert renewed["phase_of_pass"][5] == phases["refresh"]
    assert renewed["rows_computed"][5] > cut["rows_computed"][5] or cut["phase_of_pass"][5] == phases["refresh"]
    np.testing.assert_array_equal(renewed["confidence"][:5], cut["confidence"][:5])


def test_a_prefix_that_is_never_computed_again_is_cut(tiny: LladaV, prompts_for: Any, run_probes: Any) -> None:
    text = EDITS["random"].replace("lasts: forward", "lasts: generation")
    out = run_probes(tiny, prompts_for(tiny, 1), text, caching=PrefixLM(), **RULE)[0].arrays
    assert set(out["removal_on_cache"].tolist()) == {0, 1}


def test_evicted_columns_are_a_share_and_come_back(tiny: LladaV, prompts_for: Any, run_probes: Any) -> None:
    prompts = prompts_for(tiny, 1)
    rule = {**RULE, "block_length": 4}
    out = run_probes(tiny, prompts, NOTHING, caching=SparseDllm(keep=0.25), **rule)[0].arrays
    fates, n = out["visual_kept"], out["visual_tokens"]
    assert (n[[0, 1, 4, 5]] == n[0, 0]).all()
    assert (n[[2, 3, 6, 7]] < n[0, 0]).all()
    assert ((fates[2] == int(Fate.KEPT)) | (fates[2] == int(Fate.EVICTED))).all()
    assert len({tuple(row) for row in fates[2]}) > 1  # every layer has its own
    whole = run_probes(tiny, prompts, NOTHING, caching=SparseDllm(keep=1.0), **rule)[0]
    dual = run_probes(tiny, prompts, NOTHING, caching=TwiceRefreshed(), **rule)[0]
    np.testing.assert_allclose(whole.arrays["confidence"], dual.arrays["confidence"], atol=2e-5)
    assert whole.ids == dual.ids


class TwiceRefreshed(FastDual):
    """A dual cache that two full passes begin."""

    def due(self, ask: Any) -> bool:
        return ask.step_in_block < 2


def test_the_least_similar_rows_are_computed(tiny: LladaV, prompts_for: Any, run_probes: Any) -> None:
    caching = DllmCache(prompt=4, answer=4, ratio=0.5)
    out = run_probes(tiny, prompts_for(tiny, 1), NOTHING, caching=caching, **RULE)[0].arrays
    n = int(out["prompt_length"]) + 8
    assert out["rows_computed"].tolist() == [n, 4, 4, 4, n, 4, 4, 4]
    assert out["recomputed"].sum(1).tolist() == [8, 4, 4, 4, 8, 4, 4, 4]
    for step in (1, 2, 3, 5, 6, 7):  # a token that was just written is new to every layer
        written = (out["commit_step"] == step - 1).nonzero()[0]
        assert out["recomputed"][step][written].all()
