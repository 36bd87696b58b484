"""The identities of the engine on autoregressive backbones, every token a step, with and without their cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interventions import EDITS, RECORD
from tiny_autoregressive import native_model, write_llava_next, write_qwen_vl

from probe.backbones import load
from probe.decoding.autoregressive import Autoregressive
from probe.decoding.caching import KeyValue
from probe.decoding.policy import Caching
from probe.site import SEGMENTS, Fate

DECODER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 4096,
}  # fmt: skip
WRITE = {
    "llava": lambda folder: write_llava_next(folder, text_config={"model_type": "llama", **DECODER}),
    "qwen": lambda folder: write_qwen_vl(folder, num_hidden_layers=4, seed=2),
}
CACHES: dict[str, Caching] = {"none": Caching(), "kv": KeyValue()}
STEPS = 5
NOTHING = "- {at: {site: logits}, record: [confidence]}\n"
# Probes that look from open slots or at hidden states of columns find nothing in a causal sequence or behind a cache.
EVERY_ROW = ["fastv", "between", "between_compact_for_good", "divprune", "random", "output", "withdraw"]
CACHED = ["fastv", "divprune", "withdraw"]
ON = [("none", e) for e in EVERY_ROW] + [("kv", e) for e in CACHED]


@pytest.fixture(scope="module", params=WRITE)
def causal(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(WRITE[request.param](tmp_path_factory.mktemp("causal") / request.param))


@pytest.fixture
def run(run_probes: Any) -> Any:
    """`run(model, prompts, probes, cache)`: 5 tokens, one per step."""

    def go(model: Any, prompts: list[Any], probes: str, cache: str, **more: Any) -> list[Any]:
        rule = {"gen_length": STEPS, "block_length": STEPS, "steps": STEPS, "unmasking": Autoregressive()}
        return run_probes(model, prompts, probes, caching=type(CACHES[cache])(), **rule, **more)

    return go


@pytest.mark.parametrize(("cache", "edit"), ON)
def test_identities(cache: str, edit: str, causal: Any, prompts_for: Any, run: Any) -> None:
    prompts = prompts_for(causal, 2)
    text = EDITS[edit]
    together = run(causal, prompts, text + RECORD, cache, samples=[0, 1])
    for i, prompt in enumerate(prompts):
        (alone,) = run(causal, [prompt], text + RECORD, cache, samples=[i])
        (bare,) = run(causal, [prompt], text, cache, samples=[i])
        assert together[i].ids == alone.ids == bare.ids, "neither recording nor the batch changes an answer"
        np.testing.assert_array_equal(alone.arrays["confidence"], bare.arrays["confidence"])
        for name in ("confidence", "attention_mass", "visual_importance", "entropy"):
            np.testing.assert_allclose(together[i].arrays[name], alone.arrays[name], atol=5e-5, err_msg=name)
        mass = alone.arrays["attention_mass"].sum(-1)
        assert not np.isnan(mass).all()
        np.testing.assert_allclose(mass[~np.isnan(mass)], 1, atol=1e-5)
        assert len(alone.arrays["nominal_step"]) == STEPS


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("edit", [edit for edit in CACHED if edit != "withdraw"])  # which keeps nothing
def test_keeping_everything_is_no_probe(cache: str, edit: str, causal: Any, prompts_for: Any, run: Any) -> None:
    prompts = prompts_for(causal, 1)
    (kept,) = run(causal, prompts, EDITS[edit].replace("keep: 0.25", "keep: 1.0"), cache)
    (plain,) = run(causal, prompts, NOTHING, cache)
    assert kept.ids == plain.ids
    np.testing.assert_array_equal(kept.arrays["confidence"], plain.arrays["confidence"])


@pytest.mark.parametrize(
    ("cache", "edit"), [(c, e) for c, e in ON if "do: {drop" in EDITS[e] and "compact" not in EDITS[e]]
)
def test_masking_equals_dropping(cache: str, edit: str, causal: Any, prompts_for: Any, run: Any) -> None:
    lasts = "generation" if "lasts: generation" in EDITS[edit] else "forward"
    masked = EDITS[edit].split("  do:")[0] + f"  do: {{mask: {{lasts: {lasts}}}}}\n"
    prompts = prompts_for(causal, 2)
    for a, b in zip(run(causal, prompts, EDITS[edit], cache), run(causal, prompts, masked, cache), strict=True):
        assert a.ids == b.ids
        np.testing.assert_allclose(a.arrays["confidence"], b.arrays["confidence"], atol=2e-5)
        alive = [x.arrays["visual_kept"] == int(Fate.KEPT) for x in (a, b)]
        np.testing.assert_array_equal(*alive)
        assert not alive[0].all()


@pytest.mark.parametrize("edit", ["none", "divprune"])
def test_the_cache_is_exact(edit: str, causal: Any, prompts_for: Any, run: Any) -> None:
    """A row is computed once, when its token is known, and never changes: as much as computing all rows again."""
    prompts = prompts_for(causal, 2)
    text = NOTHING if edit == "none" else EDITS[edit]
    for a, b in zip(run(causal, prompts, text, "none"), run(causal, prompts, text, "kv"), strict=True):
        assert a.ids == b.ids
        np.testing.assert_allclose(a.arrays["confidence"], b.arrays["confidence"], atol=2e-5)
        assert b.arrays["flops"][1:].sum() < a.arrays["flops"][1:].sum() / 10


@torch.no_grad()
@pytest.mark.parametrize("cache", CACHES)
def test_attention_mass_is_that_of_the_native_maps(cache: str, causal: Any, prompts_for: Any, run: Any) -> None:
    """The row that predicts a token, over the segments of what stands before it, by transformers' eager attention."""
    (prompt,) = prompts_for(causal, 1)
    record = "- {at: {site: layer.attention, layers: all}, record: [{attention_mass: {queries: predicting}}]}\n"
    (got,) = run(causal, [prompt], record, cache)
    native = native_model(Path(causal.source))
    ids = torch.tensor(got.ids[: STEPS - 1])
    n = prompt.ids.shape[0]
    count = torch.arange(n) if prompt.position is None else prompt.position
    more = int(count.max()) + 1 + torch.arange(STEPS - 1)
    position = torch.cat([count, more[:, None].expand(-1, 3) if count.ndim == 2 else more])
    out = native.model.language_model(
        inputs_embeds=torch.cat([prompt.embeds, causal.embed(ids)])[None],
        position_ids=causal.position_ids(position[None]),
        output_attentions=True,
    )
    role = torch.cat([prompt.role.long(), torch.full((STEPS - 1,), SEGMENTS.index("answer"))])
    for step in range(STEPS):
        for layer, maps in enumerate(out.attentions):
            row = maps[0, :, n - 1 + step].mean(0)
            wanted = torch.zeros(len(SEGMENTS)).index_add_(0, role, row)
            np.testing.assert_allclose(got.arrays["attention_mass"][step, layer].squeeze(0), wanted, atol=1e-5)
