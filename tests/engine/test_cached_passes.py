"""Passes that compute some rows and read the others from the store, against what they must equal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from interventions import EDITS, RECORD

from probe.backbones.llada_v import LladaV
from probe.canvas import make_canvas
from probe.compile import ProbeTable, compile_recipe
from probe.decoding.caching import Crop, PrefixLM
from probe.decoding.draw import draws
from probe.errors import ProbeError
from probe.loop import Finished, Rule, denoise
from probe.recipe import parse_recipe
from probe.site import Fate
from probe.tracer import Tracer

HEADER = "schema: 1\nname: test\nprobes:\n"
NOTHING = "- {at: {site: logits}, record: [confidence]}\n"
# edits that a prefix cache can carry out: their rows stand in the prefill, or they look from the answer
PREFILLED = [n for n in EDITS if n != "progressive"]
# looks from the question when the prompt has long been computed: a prefix cache refuses it, Dimple's computes it anew
LATE = "sparsevlm_for_good"


@torch.inference_mode()
def steps_of(model: LladaV, prompts: Any, caching: Any, probes: str = "") -> tuple[list[Any], Any]:
    rule = Rule(
        gen_length=8,
        block_length=8,
        steps=4,
        mask_id=model.special.mask,
        suppressed=model.special.suppressed,
        caching=caching,
    )
    table = compile_recipe(parse_recipe(HEADER + probes), model.facts) if probes else ProbeTable(())
    canvas = make_canvas(prompts, model.embed(torch.tensor(rule.mask_id)), rule.gen_length)
    tracer = Tracer(model, table, canvas, seeds=list(range(len(prompts))))
    *steps, end = denoise(canvas, tracer, rule, model.embed, draws(0, list(range(len(prompts)))))
    assert isinstance(end, Finished)
    return steps, tracer


@torch.inference_mode()
def prefix_logits(model: LladaV, prompt: Any, tokens: Any) -> torch.Tensor:
    """Logits of the answer under the prefix-LM mask, every row computed."""
    answer = model.embed(torch.as_tensor(tokens))
    embeds = torch.cat([prompt.embeds, answer])[None]
    n, p = embeds.shape[1], prompt.embeds.shape[0]
    may = torch.ones(1, 1, n, n, dtype=torch.bool)
    may[:, :, :p, p:] = False
    hidden = model.lm(inputs_embeds=embeds, position_ids=torch.arange(n)[None], attention_mask=may).last_hidden_state
    return model.head(hidden[0, p:])


@pytest.mark.parametrize("batch", [1, 3])
def test_a_prefix_cache_is_the_prefix_mask(batch: int, tiny: LladaV, prompts_for: Any) -> None:
    prompts = prompts_for(tiny, batch)
    steps, _ = steps_of(tiny, prompts, PrefixLM())
    tokens = np.full((batch, 8), tiny.special.mask)
    for step in steps:
        if step.clock.phase == "prefill":
            assert step.slots == []
            continue
        for b, prompt in enumerate(prompts):
            wanted = prefix_logits(tiny, prompt, tokens[b])[step.slots]
            wanted[:, list(tiny.special.suppressed)] = -torch.inf
            torch.testing.assert_close(step.logits[b], wanted, atol=2e-4, rtol=1e-4)
        tokens = step.tokens


def test_the_first_cropped_pass_is_the_plain_one(tiny: LladaV, prompts_for: Any) -> None:
    prompts = prompts_for(tiny, 2)
    cropped, _ = steps_of(tiny, prompts, Crop())
    plain, _ = steps_of(tiny, prompts, Rule.__dataclass_fields__["caching"].default_factory())
    torch.testing.assert_close(cropped[0].logits, plain[0].logits, atol=0, rtol=0)
    assert not torch.equal(cropped[1].logits, plain[1].logits)


@torch.inference_mode()
def test_a_cropped_pass_reads_the_first_passs_keys(tiny: LladaV, prompts_for: Any) -> None:
    """The second pass, layer by layer by hand, with transformers' own cache."""
    from transformers import DynamicCache

    (prompt,) = prompts_for(tiny, 1)
    steps, _ = steps_of(tiny, [prompt], Crop())
    p = prompt.embeds.shape[0]
    mask = tiny.embed(torch.full((8,), tiny.special.mask))
    cache = DynamicCache()
    tiny.lm(
        inputs_embeds=torch.cat([prompt.embeds, mask])[None],
        position_ids=torch.arange(p + 8)[None],
        attention_mask=None,
        past_key_values=cache,
        use_cache=True,
    )
    cache.crop(-9)
    rows = torch.cat([prompt.embeds[-1:], tiny.embed(torch.as_tensor(steps[0].tokens[0]))])[None]
    hidden = tiny.lm(
        inputs_embeds=rows,
        position_ids=torch.arange(p - 1, p + 8)[None],
        attention_mask=torch.ones(1, 1, 9, p + 8, dtype=torch.bool),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state[0, 1:]
    wanted = tiny.head(hidden)[steps[1].slots]
    wanted[:, list(tiny.special.suppressed)] = -torch.inf
    torch.testing.assert_close(steps[1].logits[0], wanted, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("caching", [PrefixLM(), Crop()], ids=["prefix", "crop"])
@pytest.mark.parametrize("edit", ["none", *PREFILLED])
def test_identities_with_a_cache(caching: Any, edit: str, tiny: LladaV, prompts_for: Any, run_probes: Any) -> None:
    prompts = prompts_for(tiny, 3)
    text = NOTHING if edit == "none" else EDITS[edit]
    if edit == LATE and isinstance(caching, PrefixLM):
        with pytest.raises(ProbeError, match=r"step 2: probe `edit` .* `raters_answer` rows, but the cache `prefix`"):
            run_probes(tiny, prompts, text, caching=caching)
        return
    together = run_probes(tiny, prompts, text + RECORD, samples=[0, 1, 2], caching=caching)
    for i, prompt in enumerate(prompts):
        alone = run_probes(tiny, [prompt], text + RECORD, samples=[i], caching=caching)[0]
        bare = run_probes(tiny, [prompt], text, samples=[i], caching=caching)[0]
        assert together[i].ids == alone.ids == bare.ids
        np.testing.assert_array_equal(alone.arrays["confidence"], bare.arrays["confidence"])
        for name in ("confidence", "attention_mass", "visual_importance", "entropy"):
            np.testing.assert_allclose(together[i].arrays[name], alone.arrays[name], atol=5e-5, err_msg=name)
        for name in ("visual_kept", "visual_tokens", "commit_step"):
            np.testing.assert_array_equal(together[i].arrays[name], alone.arrays[name], err_msg=name)
        mass = alone.arrays["attention_mass"].sum(-1)
        np.testing.assert_allclose(mass[~np.isnan(mass)], 1, atol=1e-5)
        seen = ~np.isnan(alone.arrays["visual_importance"])
        rows = ~np.isnan(mass)[:, :, 0]
        alive = alone.arrays["visual_kept"] == int(Fate.KEPT)
        np.testing.assert_array_equal(seen[rows], alive[rows])


@pytest.mark.parametrize("caching", [PrefixLM(), Crop()], ids=["prefix", "crop"])
@pytest.mark.parametrize("edit", [n for n in PREFILLED if "keep: 0.25" in EDITS[n] and n != LATE])
def test_keeping_everything_is_no_probe(
    caching: Any, edit: str, tiny: LladaV, prompts_for: Any, run_probes: Any
) -> None:
    prompts = prompts_for(tiny, 1)
    kept = run_probes(tiny, prompts, EDITS[edit].replace("keep: 0.25", "keep: 1.0"), caching=caching)[0]
    plain = run_probes(tiny, prompts, NOTHING, caching=caching)[0]
    assert kept.ids == plain.ids
    np.testing.assert_array_equal(kept.arrays["confidence"], plain.arrays["confidence"])


@pytest.mark.parametrize("caching", [PrefixLM(), Crop()], ids=["prefix", "crop"])
@pytest.mark.parametrize("edit", [n for n in PREFILLED if "do: {drop" in EDITS[n] and "compact" not in EDITS[n]])
def test_masking_equals_dropping(caching: Any, edit: str, tiny: LladaV, prompts_for: Any, run_probes: Any) -> None:
    prompts = prompts_for(tiny, 2)
    lasts = "generation" if "lasts: generation" in EDITS[edit] else "forward"
    text = EDITS[edit].split("  do:")[0] + f"  do: {{mask: {{lasts: {lasts}}}}}\n"
    for dropped, masked in zip(
        run_probes(tiny, prompts, EDITS[edit], caching=caching),
        run_probes(tiny, prompts, text, caching=caching),
        strict=True,
    ):
        assert dropped.ids == masked.ids
        np.testing.assert_allclose(dropped.arrays["confidence"], masked.arrays["confidence"], atol=2e-5)
        kept = dropped.arrays["visual_kept"] == int(Fate.KEPT)
        np.testing.assert_array_equal(kept, masked.arrays["visual_kept"] == int(Fate.KEPT))


@pytest.mark.parametrize("caching", [PrefixLM(), Crop()], ids=["prefix", "crop"])
@pytest.mark.parametrize("edit", ["none", *PREFILLED])
def test_flops_with_a_cache_are_torchs(
    caching: Any, edit: str, tiny_eager: LladaV, prompts_for: Any, run_probes: Any
) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    if edit == LATE and isinstance(caching, PrefixLM):
        edit = "none"
    prompts = prompts_for(tiny_eager, 1)
    with FlopCounterMode(display=False) as counter:
        out = run_probes(tiny_eager, prompts, NOTHING if edit == "none" else EDITS[edit], caching=caching)[0]
    assert out.arrays["flops"].sum() == counter.get_total_flops()


STORED = """
- name: edit
  at: {site: prefix_cache, layer: -1, steps: {at: [50%]}}
  score: {similarity: {space: keys}}
  select: {greedy_diverse: {keep: 0.25, start: random}}
  do: {drop: {lasts: generation}}
"""


def test_dropping_from_the_store_is_dropping_columns(tiny: LladaV, prompts_for: Any, run_probes: Any) -> None:
    """The study's late DivPrune over cached keys: the same tokens leave every layer, from that step on."""
    prompts = prompts_for(tiny, 2)
    for out in run_probes(tiny, prompts, STORED + RECORD, caching=PrefixLM()):
        nominal, phase = out.arrays["nominal_step"], out.arrays["phase_of_pass"]
        fates, n = out.arrays["visual_kept"], out.arrays["visual_kept"].shape[-1]
        late = (nominal >= 2) & (phase == 2)
        assert (fates[~late] == int(Fate.KEPT)).all()
        assert ((fates[late] == int(Fate.KEPT)).sum(-1) == round(n / 4)).all()
        assert (fates[late] == fates[late][:1, :1]).all()
        seen = ~np.isnan(out.arrays["visual_importance"])
        np.testing.assert_array_equal(seen[late], fates[late] == int(Fate.KEPT))
    masked = STORED.replace("{drop: {lasts", "{mask: {lasts")
    for dropped, hidden in zip(
        run_probes(tiny, prompts, STORED, caching=PrefixLM()),
        run_probes(tiny, prompts, masked, caching=PrefixLM()),
        strict=True,
    ):
        assert dropped.ids == hidden.ids
        np.testing.assert_allclose(dropped.arrays["confidence"], hidden.arrays["confidence"], atol=2e-5)


@torch.inference_mode()
def test_answers_can_stand_where_the_cut_cache_ends(tiny: LladaV, prompts_for: Any) -> None:
    """`answer_positions: shrunk`, as in the release: answers move up by what was cut, stored keys do not."""
    (prompt,) = prompts_for(tiny, 1)
    shrunk = STORED.replace("lasts: generation", "lasts: generation, answer_positions: shrunk")
    moved, tracer = steps_of(tiny, [prompt], PrefixLM(), shrunk)
    kept, _ = steps_of(tiny, [prompt], PrefixLM(), STORED)
    late = next(i for i, s in enumerate(moved) if s.clock.step == 2)
    assert torch.equal(moved[late - 1].logits, kept[late - 1].logits)
    held = tracer.kit.store.layers[0].layout
    n, p = prompt.n_visual, prompt.embeds.shape[0]
    gone = n - round(n / 4)
    assert held.answer_start == (p - gone,)
    # by hand: the cut prompt's keys at their own positions, the answer from p - gone on
    alive = held.row[0, : p - gone].sort().values
    full = tiny.lm(inputs_embeds=prompt.embeds[None], position_ids=torch.arange(p)[None], attention_mask=None)
    assert full is not None
    from transformers import DynamicCache

    cache = DynamicCache()
    tiny.lm(
        inputs_embeds=prompt.embeds[None], position_ids=torch.arange(p)[None], attention_mask=None,
        past_key_values=cache, use_cache=True,
    )  # fmt: skip
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, alive], layer.values[:, :, alive]
    answer = tiny.embed(torch.as_tensor(moved[late - 1].tokens[0]))[None]
    for start, wanted in ((p - gone, moved[late]), (p, kept[late])):
        columns = DynamicCache()
        for i, layer in enumerate(cache.layers):
            columns.update(layer.keys.clone(), layer.values.clone(), i)
        hidden = tiny.lm(
            inputs_embeds=answer,
            position_ids=torch.arange(start, start + 8)[None],
            attention_mask=torch.ones(1, 1, 8, p - gone + 8, dtype=torch.bool),
            past_key_values=columns,
            use_cache=True,
        ).last_hidden_state[0]
        logits = tiny.head(hidden)[wanted.slots]
        logits[:, list(tiny.special.suppressed)] = -torch.inf
        torch.testing.assert_close(wanted.logits[0], logits, atol=2e-4, rtol=1e-4)


def test_heads_differ_in_what_they_see_after_evict(tiny: LladaV, prompts_for: Any, run_probes: Any) -> None:
    """Each head's attention falls on just as many visual keys as `keep` says, in the layers and passes behind."""
    prompts = prompts_for(tiny, 2)
    record = "- name: mass\n  at: {site: layer.attention, layers: all}\n  record: [{attention_mass: {heads: each}}]\n"
    text = EDITS["evict"].replace("keep: 0.25", "keep: 0")
    for caching in (PrefixLM(), None):
        more = {} if caching is None else {"caching": caching}
        for out in run_probes(tiny, prompts, text + record, **more):
            mass = out.arrays["attention_mass"][..., 0, :] if out.arrays["attention_mass"].ndim == 5 else None
            assert mass is not None
            visual = mass[..., 1] + mass[..., 2]  # (step, layer, head): visual tokens and newlines
            nominal = out.arrays["nominal_step"]
            assert np.nanmax(visual[nominal > 0][:, [1, 2]]) == 0
            assert np.nanmin(visual[nominal > 0][:, [0, 3]]) > 0
