"""Identities that hold whatever the weights: they need no expected numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from interventions import EDITS, LAYER_EDITS, RECORD
from torch.utils.flop_counter import FlopCounterMode

from probe.backbones.llada_v import LladaV
from probe.compile import ProbeTable
from probe.loop import Rule
from probe.site import Fate

NOTHING = "- {at: {site: logits}, record: [confidence]}\n"


def same(a: Any, b: Any, names: tuple[str, ...] = ("token", "confidence", "commit_step")) -> None:
    assert a.ids == b.ids
    for name in names:
        np.testing.assert_array_equal(a.arrays[name], b.arrays[name], err_msg=name)


@pytest.mark.parametrize("edit", [e for e in EDITS if "keep: 0.25" in EDITS[e]])
def test_keeping_everything_is_no_probe_bit_for_bit(edit: str, tiny: LladaV, prompts_for: Any, run_probes: Any) -> None:
    prompts = prompts_for(tiny, 1)
    kept = run_probes(tiny, prompts, EDITS[edit].replace("keep: 0.25", "keep: 1.0"))[0]
    same(kept, run_probes(tiny, prompts, NOTHING)[0])


def test_recording_changes_nothing_bit_for_bit(tiny: LladaV, prompts_for: Any, run_probes: Any) -> None:
    prompts = prompts_for(tiny, 1)
    same(run_probes(tiny, prompts, RECORD)[0], run_probes(tiny, prompts, NOTHING)[0])
    pruned = EDITS["fastv"]
    same(run_probes(tiny, prompts, pruned + RECORD)[0], run_probes(tiny, prompts, pruned)[0])


def test_an_edit_does_change_something(tiny: LladaV, prompts_for: Any, run_probes: Any) -> None:
    prompts = prompts_for(tiny, 1)
    plain = run_probes(tiny, prompts, NOTHING)[0].arrays["confidence"]
    for name, edit in EDITS.items():
        changed = run_probes(tiny, prompts, edit)[0].arrays["confidence"]
        assert not np.array_equal(plain, changed, equal_nan=True), name


@pytest.mark.parametrize("edit", [e for e in EDITS if "do: {drop" in EDITS[e] and "compact" not in EDITS[e]])
def test_masking_equals_dropping_with_positions_kept(
    edit: str, tiny: LladaV, prompts_for: Any, run_probes: Any
) -> None:
    prompts = prompts_for(tiny, 2)
    lasts = "generation" if "lasts: generation" in EDITS[edit] else "forward"
    text = EDITS[edit].split("  do:")[0] + f"  do: {{mask: {{lasts: {lasts}}}}}\n"
    for dropped, masked in zip(run_probes(tiny, prompts, EDITS[edit]), run_probes(tiny, prompts, text), strict=True):
        assert dropped.ids == masked.ids
        np.testing.assert_allclose(dropped.arrays["confidence"], masked.arrays["confidence"], atol=2e-5)
        kept = dropped.arrays["visual_kept"] == int(Fate.KEPT)
        np.testing.assert_array_equal(kept, masked.arrays["visual_kept"] == int(Fate.KEPT))


def test_withdrawing_after_the_last_layer_is_nothing(tiny: LladaV, prompts_for: Any, run_probes: Any) -> None:
    prompts = prompts_for(tiny, 1)
    withdrawn = run_probes(tiny, prompts, "- {at: {site: layer.output, layer: -1}, do: withdraw}\n")[0]
    plain = run_probes(tiny, prompts, NOTHING)[0]
    assert withdrawn.ids == plain.ids
    np.testing.assert_allclose(withdrawn.arrays["confidence"], plain.arrays["confidence"], atol=1e-6)


@pytest.mark.parametrize("edit", ["none", *EDITS])
def test_a_batch_equals_its_samples_one_by_one(edit: str, tiny: LladaV, prompts_for: Any, run_probes: Any) -> None:
    text = (NOTHING if edit == "none" else EDITS[edit]) + RECORD
    prompts = prompts_for(tiny, 3)
    together = run_probes(tiny, prompts, text, samples=[0, 1, 2])
    for i, prompt in enumerate(prompts):
        alone = run_probes(tiny, [prompt], text, samples=[i])[0]
        assert together[i].ids == alone.ids
        for name in ("confidence", "attention_mass", "visual_importance", "entropy"):
            np.testing.assert_allclose(together[i].arrays[name], alone.arrays[name], atol=5e-5, err_msg=name)
        for name in ("visual_kept", "visual_tokens", "commit_step"):
            np.testing.assert_array_equal(together[i].arrays[name], alone.arrays[name], err_msg=name)


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.7}, {"remasking": "random"}, {"temperature": 1.0, "remasking": "random"}]
)
def test_noise_does_not_depend_on_the_batch(
    settings: dict[str, Any], tiny: LladaV, prompts_for: Any, run_probes: Any
) -> None:
    prompts = prompts_for(tiny, 2)
    together = run_probes(tiny, prompts, NOTHING, samples=[4, 9], **settings)
    for i, number in enumerate([4, 9]):
        assert run_probes(tiny, [prompts[i]], NOTHING, samples=[number], **settings)[0].ids == together[i].ids


@pytest.mark.parametrize("edit", EDITS)
def test_every_visual_token_has_exactly_one_fate_and_counts_agree(
    edit: str, tiny: LladaV, prompts_for: Any, run_probes: Any
) -> None:
    for out in run_probes(tiny, prompts_for(tiny, 3), EDITS[edit] + RECORD):
        fates = out.arrays["visual_kept"]
        assert set(np.unique(fates)) <= {int(f) for f in Fate}
        made = out.arrays["visual_tokens"] - (fates == int(Fate.KEPT)).sum(-1)  # tokens without an original index
        assert (made > 0).any() if edit in ("append", "sparsevlm", "sparsevlm_for_good") else (made == 0).all()
        seen = ~np.isnan(out.arrays["visual_importance"])
        alive = fates == int(Fate.KEPT)
        hidden = fates == int(Fate.MASKED)
        np.testing.assert_array_equal(seen, alive | hidden)
        assert np.nanmax(np.where(hidden, out.arrays["visual_importance"], 0)) == 0


@pytest.mark.parametrize("edit", ["none", *EDITS])
def test_attention_mass_sums_to_one(edit: str, tiny: LladaV, prompts_for: Any, run_probes: Any) -> None:
    text = (NOTHING if edit == "none" else EDITS[edit]) + RECORD
    for out in run_probes(tiny, prompts_for(tiny, 2), text):
        np.testing.assert_allclose(out.arrays["attention_mass"].sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize("edit", ["none", *EDITS])
@pytest.mark.parametrize("settings", [{}, {"cfg_scale": 1.0}])
def test_flops_equal_torchs_counter(
    edit: str, settings: dict[str, Any], tiny_eager: LladaV, prompts_for: Any, run_probes: Any
) -> None:
    """Backbone and head from executed shapes; rows scored for probes and pairs compared by selections as well."""
    prompts = prompts_for(tiny_eager, 1)
    with FlopCounterMode(display=False) as counter:
        out = run_probes(tiny_eager, prompts, NOTHING if edit == "none" else EDITS[edit], **settings)[0]
    assert out.arrays["flops"].sum() == counter.get_total_flops()


@pytest.mark.parametrize("edit", LAYER_EDITS)
def test_no_square_attention_map_is_formed(
    edit: str, tiny: LladaV, prompts_for: Any, run_probes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With chunks of 4 rows, nothing but the (transposed) keys has a column for every key and more than 4 rows."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from probe import attend

    monkeypatch.setattr(attend, "CHUNK", 4)
    prompts = prompts_for(tiny, 1)
    length = prompts[0].embeds.shape[0] + 8
    head_size = tiny.facts.width // tiny.facts.heads
    assert 4 < head_size < length

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for x in result if isinstance(result, tuple | list) else [result]:
                if isinstance(x, torch.Tensor) and x.dim() >= 2 and x.shape[-1] == length and x.shape[0] == 1:
                    assert x.dim() < 4 or x.shape[-2] <= head_size, f"{func} made {tuple(x.shape)}"
            return result

    with Watch():
        run_probes(tiny, prompts, EDITS[edit])


def test_guided_stream_shares_the_plan(tiny: LladaV, prompts_for: Any, run_probes: Any) -> None:
    out = run_probes(tiny, prompts_for(tiny, 2), EDITS["fastv"] + RECORD, cfg_scale=1.5)
    assert all((o.arrays["visual_tokens"][:, -1] < o.arrays["visual_tokens"][:, 0]).all() for o in out)
    plain = run_probes(tiny, prompts_for(tiny, 2), EDITS["fastv"] + RECORD)
    # the first step's conditional stream is the same with and without guidance
    np.testing.assert_allclose(
        out[0].arrays["visual_importance"][0], plain[0].arrays["visual_importance"][0], atol=1e-6
    )


def test_same_seed_same_answer(tiny: LladaV, prompts_for: Any, run_probes: Any) -> None:
    prompts = prompts_for(tiny, 1)
    first, second = (run_probes(tiny, prompts, EDITS["random"] + RECORD)[0] for _ in range(2))
    same(first, second, ("token", "confidence", "commit_step", "visual_kept", "visual_importance", "attention_mass"))


def test_an_empty_table_and_a_bare_rule_work(tiny: LladaV, prompts_for: Any) -> None:
    from probe.generate import generate

    rule = Rule(gen_length=4, block_length=2, steps=4, mask_id=tiny.special.mask, suppressed=tiny.special.suppressed)
    out = generate(tiny, prompts_for(tiny, 1), rule, ProbeTable(()))[0]
    assert len(out.ids) == 4
    assert out.arrays["block"].tolist() == [0, 0, 1, 1]


def test_logit_kl_is_the_divergence_from_the_unpruned_run(tiny: LladaV, prompts_for: Any) -> None:
    from probe.compile import compile_recipe
    from probe.generate import generate
    from probe.recipe import parse_recipe

    header = "schema: 1\nname: kl\nprobes:\n"
    record = "- {at: {site: logits}, record: [logit_kl]}\n"
    late = EDITS["fastv_late_for_good"]
    rule = Rule(gen_length=8, block_length=8, steps=4, mask_id=tiny.special.mask, suppressed=tiny.special.suppressed)
    prompts = prompts_for(tiny, 1)
    plain: Any = {}
    pruned: Any = {}
    generate(tiny, prompts, rule, ProbeTable(()), collected=plain)
    table = compile_recipe(parse_recipe(header + late + record), tiny.facts)
    out = generate(tiny, prompts, rule, table, reference=plain, collected=pruned)[0].arrays["logit_kl"]
    assert np.nanmax(np.abs(out[:2])) == 0, "nothing was removed before half of the steps"
    for step in (2, 3):
        for slot in range(8):
            open_in_both = slot in plain[step][0] and slot in pruned[step][0]
            assert open_in_both == (not np.isnan(out[step, slot]))
            if open_in_both:
                p, q = (x[step][1][0, x[step][0].index(slot)].double().softmax(-1) for x in (plain, pruned))
                expected = (p * (p / q).log())[p > 0].sum()
                assert out[step, slot] == pytest.approx(float(expected), rel=1e-3, abs=1e-5)
    assert np.nanmax(out[2:]) > 0
