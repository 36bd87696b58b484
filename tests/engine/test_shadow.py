"""WINO's second look, against the whole sequence with a hand-made mask."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from interventions import EDITS
from test_every_cache import NOTHING

from probe.backbones.llada_v import LladaV
from probe.canvas import make_canvas
from probe.compile import ProbeTable, compile_recipe
from probe.decoding.caching import Caching
from probe.decoding.draw import draws
from probe.decoding.fast_cache import FastDual
from probe.decoding.wino import Wino
from probe.errors import ProbeError
from probe.loop import Rule, denoise
from probe.recipe import parse_recipe
from probe.tracer import Tracer


class Watched(Tracer):
    """Keeps what every pass was asked and what it gave."""

    def __call__(self, request: Any) -> Any:
        embeds = request.canvas.embeds.clone()
        result = super().__call__(request)
        self.seen.append((embeds, request, replace(result, logits=result.logits.clone())))
        return result


@torch.inference_mode()
def decode(model: LladaV, prompts: Any, probes: str = "", caching: Caching | None = None) -> Watched:
    rule = Rule(
        gen_length=8,
        block_length=4,
        steps=8,
        mask_id=model.special.mask,
        suppressed=(model.special.mask,),
        unmasking=Wino(accept=0.12, confirm=0.99),
        caching=caching or Caching(),
    )
    table = compile_recipe(parse_recipe(f"schema: 1\nname: t\nprobes:\n{probes}"), model.facts) if probes else None
    canvas = make_canvas(prompts, model.embed(torch.tensor(rule.mask_id)), rule.gen_length)
    tracer = Watched(model, table or ProbeTable(()), canvas, seeds=list(range(len(prompts))))
    tracer.seen = []
    tracer.steps = list(denoise(canvas, tracer, rule, model.embed, draws(0, list(range(len(prompts))))))
    return tracer


@torch.inference_mode()
def test_the_shadow_sees_all_but_its_own_slot_and_nobody_sees_it(tiny: LladaV, prompts_for: Any) -> None:
    (prompt,) = prompts_for(tiny, 1)
    p = prompt.embeds.shape[0]
    seen = decode(tiny, [prompt]).seen
    assert len(seen) >= 3
    for embeds, request, result in seen:
        first = request.window[0][0]
        n = embeds.shape[1]
        slots = list(range(first, first + 4))
        mask = tiny.embed(torch.tensor(tiny.special.mask)).expand(1, 4, -1)
        may = torch.ones(1, 1, n + 4, n + 4, dtype=torch.bool)
        may[:, :, :n, n:] = False
        for i, slot in enumerate(slots):
            may[:, :, n + i, slot] = False
        hidden = tiny.lm(
            inputs_embeds=torch.cat([embeds, mask], 1),
            position_ids=torch.tensor([[*range(n), *slots]]),
            attention_mask=may,
        ).last_hidden_state
        wanted = tiny.head(hidden[:, [*slots, *range(n, n + 4)]])
        torch.testing.assert_close(result.logits, wanted, atol=2e-4, rtol=1e-4)
        plain = tiny.lm(inputs_embeds=embeds, position_ids=torch.arange(n)[None], attention_mask=None)
        torch.testing.assert_close(
            result.logits[:, :4], tiny.head(plain.last_hidden_state[:, slots]), atol=2e-4, rtol=1e-4
        )
    assert p + 8 == n


@pytest.mark.parametrize("edit", EDITS)
def test_visual_tokens_can_leave_beside_a_shadow(edit: str, tiny: LladaV, prompts_for: Any) -> None:
    """Dropping equals masking, with the shadow there as without; positions counted anew keep it at its slots."""
    prompts = prompts_for(tiny, 1)
    dropped = decode(tiny, prompts, EDITS[edit])
    for _, request, result in dropped.seen:
        assert result.logits.shape[1] == request.rows.shape[1] + 4
    if "do: {drop" not in EDITS[edit] or "compact" in EDITS[edit]:
        return
    lasts = "generation" if "lasts: generation" in EDITS[edit] else "forward"
    masked = decode(tiny, prompts, EDITS[edit].split("  do:")[0] + f"  do: {{mask: {{lasts: {lasts}}}}}\n")
    for (_, _, a), (_, _, b) in zip(dropped.seen, masked.seen, strict=True):
        torch.testing.assert_close(a.logits, b.logits, atol=2e-4, rtol=1e-4)


def test_it_goes_with_no_cache_and_no_batch(tiny: LladaV, prompts_for: Any) -> None:
    with pytest.raises(ProbeError, match="shadow"):
        decode(tiny, prompts_for(tiny, 1), NOTHING, FastDual())
    with pytest.raises(ProbeError, match="one sample"):
        decode(tiny, prompts_for(tiny, 2))
