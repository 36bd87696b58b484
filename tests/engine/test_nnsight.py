"""nnsight as oracle and as open door: traces of the eager model agree with what hooks record, and code composes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from interventions import EDITS, RECORD

from probe.backbones.llada_v import LladaV
from probe.canvas import make_canvas
from probe.probe_code import CODE_PROBES, CodeProbe, code_probe
from probe.site import SEGMENTS, Role

FORMS = """
- name: forms
  at: {site: layer.attention, layers: all}
  record:
    - attention_mass
    - {attention_mass: {form: head_mean_logits, as: mass_of_mean}}
    - {attention_mass: {heads: each, queries: question, as: mass_by_head}}
    - {visual_importance: {queries: last}}
- name: logits
  at: {site: logits}
  record: [entropy, margin]
"""


def by_role(weights: torch.Tensor, role: torch.Tensor) -> torch.Tensor:
    """`(..., key)` summed over each segment's keys, by a plain loop."""
    return torch.stack([weights[..., role == int(r)].sum(-1) for r in list(Role)[: len(SEGMENTS)]], -1)


@pytest.mark.parametrize("length", [8, 5])
@torch.inference_mode()
def test_every_signal_equals_an_nnsight_trace_of_the_eager_model(
    length: int, tiny: LladaV, tiny_eager: LladaV, prompts_for: Any, run_probes: Any
) -> None:
    from nnsight import NNsight

    prompt = prompts_for(tiny, 2)[1]
    recorded = run_probes(tiny, [prompt], FORMS, gen_length=length, block_length=length, steps=1)[0].arrays
    model = tiny_eager
    canvas = make_canvas([prompt], model.embed(torch.tensor(model.special.mask)), length)
    envoy = NNsight(model.lm)
    maps, queries, keys = [], [], []
    with envoy.trace(inputs_embeds=canvas.embeds, position_ids=canvas.layout.position, attention_mask=None):
        for i in range(model.facts.layers):
            queries.append(envoy.layers[i].self_attn.q_proj.output.save())
            keys.append(envoy.layers[i].self_attn.k_proj.output.save())
            maps.append(envoy.layers[i].self_attn.output[1].save())
        hidden = envoy.output.last_hidden_state.save()

    role = canvas.layout.role[0]
    answer, question = role == int(Role.ANSWER), role == int(Role.QUESTION)
    visual = canvas.layout.visual[0] >= 0
    cos, sin = model.rotary(canvas.embeds, canvas.layout.position)
    segments = list(dict.fromkeys(["answer", "question"]))
    for i, square in enumerate(maps):
        square = square[0].float()
        mass = by_role(square.mean(0)[answer].mean(0), role)
        np.testing.assert_allclose(recorded["attention_mass"][0, i, segments.index("answer")], mass, atol=1e-5)
        each = by_role(square[:, question].mean(1), role)
        np.testing.assert_allclose(recorded["mass_by_head"][0, i, :, segments.index("question")], each, atol=1e-5)
        np.testing.assert_allclose(recorded["visual_importance"][0, i], square.mean(0)[-1][visual], atol=1e-5)
        q, k = (
            rotated(x[0].view(-1, model.facts.heads, cos.shape[-1]).transpose(0, 1), cos[0], sin[0])
            for x in (queries[i], keys[i])
        )
        mean_logits = (q @ k.transpose(1, 2)).mean(0) * cos.shape[-1] ** -0.5
        mean_mass = by_role(mean_logits.softmax(-1)[answer].mean(0), role)
        np.testing.assert_allclose(recorded["mass_of_mean"][0, i, segments.index("answer")], mean_mass, atol=1e-5)

    logits = model.head(hidden)[0, answer]
    logits[:, list(model.special.suppressed)] = -torch.inf
    p = logits.double().softmax(-1)
    np.testing.assert_allclose(recorded["confidence"][0], p.max(-1).values, atol=1e-5)
    best = p.sort(-1, descending=True).values
    np.testing.assert_allclose(recorded["margin"][0], best[:, 0] - best[:, 1], atol=1e-5)
    np.testing.assert_allclose(recorded["entropy"][0], torch.special.entr(p).sum(-1), atol=1e-4)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding with the halves convention, written out."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def fires_at(*steps: int) -> Any:
    return lambda clock: clock.step in steps


def test_code_runs_at_its_steps_only_and_sees_what_hooks_left(tiny: LladaV, prompts_for: Any, run_probes: Any) -> None:
    seen: list[tuple[int, int, int]] = []

    def lengths(model: Any, clock: Any) -> torch.Tensor:
        before, after = model.layers[1].output.shape[1], model.layers[2].output.shape[1]
        seen.append((clock.step, before, after))
        return model.layers[3].output.float().norm(dim=-1).mean().save()

    prompt = prompts_for(tiny, 1)
    code = CodeProbe("norm", lengths, fires_at(0, 2))
    out = run_probes(tiny, prompt, EDITS["fastv"] + RECORD, code_probes=[code])[0]
    plain = run_probes(tiny, prompt, EDITS["fastv"] + RECORD)[0]
    n, full = prompt[0].n_visual, prompt[0].embeds.shape[0] + 8
    assert seen == [(0, full, full - n + n // 4), (2, full, full - n + n // 4)]
    assert np.isnan(out.arrays["norm"]).tolist() == [False, True, False, True]
    for name in ("token", "confidence", "attention_mass", "visual_kept"):
        np.testing.assert_array_equal(out.arrays[name], plain.arrays[name], err_msg=name)


def test_code_intervenes_in_the_same_run(tiny: LladaV, prompts_for: Any, run_probes: Any) -> None:
    def silence(model: Any, clock: Any) -> None:
        model.layers[0].output[:] = 0

    prompt = prompts_for(tiny, 1)
    plain = run_probes(tiny, prompt, RECORD)[0]
    changed = run_probes(tiny, prompt, RECORD, code_probes=[CodeProbe("silence", silence, fires_at(1))])[0]
    np.testing.assert_array_equal(plain.arrays["confidence"][0], changed.arrays["confidence"][0])
    assert not np.array_equal(plain.arrays["confidence"][1], changed.arrays["confidence"][1], equal_nan=True)


@pytest.mark.parametrize("scale", [0.0, 1.5])
def test_code_is_told_which_rows_are_visual(scale: float, tiny: LladaV, prompts_for: Any, run_probes: Any) -> None:
    """Samples of several lengths, with guidance and without: visual rows alone are silenced, and those in order."""
    prompts, told = prompts_for(tiny, 2), []

    def silence(model: Any, clock: Any, rows: Any) -> torch.Tensor:
        told.append((rows.visual, rows.role))
        model.layers[0].output[rows.visual >= 0] = 0
        return (model.layers[0].output.abs().sum(-1) == 0).float().mean(1).save()

    out = run_probes(tiny, prompts, RECORD, cfg_scale=scale, code_probes=[CodeProbe("silence", silence, fires_at(1))])
    visual, role = told[0]
    assert visual.shape == role.shape
    assert visual.shape[0] == (4 if scale else 2)
    for b in range(visual.shape[0]):
        prompt = prompts[b % 2]
        seen = visual[b][visual[b] >= 0]
        assert seen.tolist() == list(range(prompt.n_visual))
        assert ((role[b] == int(Role.VISUAL)) | (role[b] == int(Role.NEWLINE))).eq(visual[b] >= 0).all()
    for b, prompt in enumerate(prompts):
        assert out[b].arrays["silence"][1] == pytest.approx(prompt.n_visual / visual.shape[1])


def test_two_code_probes_may_look_in_any_order(tiny: LladaV, prompts_for: Any, run_probes: Any) -> None:
    def late(model: Any, clock: Any) -> torch.Tensor:
        return model.layers[3].output.mean().save()

    def early(model: Any, clock: Any) -> torch.Tensor:
        return model.layers[0].output.mean().save()

    codes = [CodeProbe("late", late, fires_at(0)), CodeProbe("early", early, fires_at(0))]
    both = run_probes(tiny, prompts_for(tiny, 1), RECORD, code_probes=codes)[0].arrays
    for code in codes:
        alone = run_probes(tiny, prompts_for(tiny, 1), RECORD, code_probes=[code])[0].arrays
        np.testing.assert_array_equal(both[code.name], alone[code.name])


def test_the_decorator_registers_steps_as_a_recipe_spells_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from probe.site import Clock

    monkeypatch.setattr("probe.probe_code.CODE_PROBES", CODE_PROBES.copy())
    code_probe(steps={"from": "50%"}, name="mine")(lambda model, clock: None)
    from probe import probe_code

    clock = Clock(pass_index=0, step=1, block=0, step_in_block=1, nominal_steps=4, n_blocks=1)
    probe = probe_code.CODE_PROBES["mine"]
    assert [probe.fires(Clock(**{**clock.__dict__, "step": s})) for s in range(4)] == [False, False, True, True]


HIDDEN = """
- {name: output, at: {site: layer.output, layers: all}, record: [hidden_norm, hidden_similarity]}
- {name: input, at: {site: layer.input, layers: [0, 2]}, record: [{hidden_norm: {as: norm_in}}]}
- {name: between, at: {site: layer.after_attention, layer: 1}, record: [{hidden_norm: {as: norm_between}}]}
- {name: before, at: {site: before_lm}, record: [{hidden_norm: {as: norm_before}}]}
- {name: after, at: {site: final}, record: [{hidden_norm: {as: norm_after}}]}
"""


@torch.inference_mode()
def test_hidden_states_are_recorded_at_every_site(tiny: LladaV, prompts_for: Any, run_probes: Any) -> None:
    from nnsight import NNsight

    prompt = prompts_for(tiny, 1)[0]
    got = run_probes(tiny, [prompt], HIDDEN, gen_length=4, block_length=4, steps=1)[0].arrays
    canvas = make_canvas([prompt], tiny.embed(torch.tensor(tiny.special.mask)), 4)
    envoy = NNsight(tiny.lm)
    outputs = []
    with envoy.trace(inputs_embeds=canvas.embeds, position_ids=canvas.layout.position, attention_mask=None):
        for i in range(tiny.facts.layers):
            if i == 1:
                between = envoy.layers[1].post_attention_layernorm.input.save()
            outputs.append(envoy.layers[i].output.save())
        last = envoy.output.last_hidden_state.save()
    role = canvas.layout.role[0]

    def by_segment(x: torch.Tensor) -> list[float]:
        return [float(x[0][role == r].norm(dim=-1).mean()) for r in range(len(SEGMENTS))]

    def alike(x: torch.Tensor) -> list[float]:
        parts = [x[0][role == r] for r in range(len(SEGMENTS))]
        return [float(torch.cosine_similarity(p, p.mean(0, keepdim=True)).mean()) for p in parts]

    for i, output in enumerate(outputs):
        np.testing.assert_allclose(got["hidden_norm"][0, i], by_segment(output), rtol=1e-4)
        np.testing.assert_allclose(got["hidden_similarity"][0, i], alike(output), atol=1e-4)
    np.testing.assert_allclose(got["norm_in"][0, 0], by_segment(canvas.embeds), rtol=1e-4)
    np.testing.assert_allclose(got["norm_in"][0, 2], by_segment(outputs[1]), rtol=1e-4)
    assert np.isnan(got["norm_in"][0, [1, 3]]).all()
    np.testing.assert_allclose(got["norm_between"][0, 1], by_segment(between), rtol=1e-4)
    np.testing.assert_allclose(got["norm_before"][0], by_segment(canvas.embeds), rtol=1e-4)
    np.testing.assert_allclose(got["norm_after"][0], by_segment(last), rtol=1e-4)
