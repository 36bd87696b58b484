"""A backbone of the published shape without its weights."""

from __future__ import annotations

import pytest
import torch

from probe.backbones import facts_of
from probe.backbones import random_weights as module
from probe.backbones.random_weights import SHAPES, random_weights
from probe.errors import ProbeError

SMALL = {
    "GSAI-ML/LLaDA-V": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4},
    "jacklishufan/lavida-dream-v1.0-instruct": {
        "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2
    },
    "jacklishufan/lavida-llada-v1.0-instruct": {"d_model": 64, "mlp_hidden_size": 96, "n_heads": 4, "n_kv_heads": 4},
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_the_loading_code_takes_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, shapes_of, field = SHAPES[name]
    monkeypatch.setitem(module.SHAPES, name, (config | SMALL[name], shapes_of, field))
    model = random_weights(name, layers=2, dtype="float32")
    published = facts_of(name)
    assert (model.facts.layers, model.facts.width) == (2, 64)
    assert (model.facts.vocabulary, model.facts.encoder_layers) == (published.vocabulary, published.encoder_layers)
    assert not any(p.is_meta for p in model.parameters())
    assert all(torch.equal(v, torch.ones_like(v)) for n, v in model.state_dict().items() if n.endswith("norm.weight"))
    hidden = torch.randn(3, 64)
    assert model.head(hidden).shape == (3, published.vocabulary)
    again = random_weights(name, layers=2, dtype="float32")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    other = random_weights(name, layers=2, dtype="float32", seed=1)
    assert not torch.equal(model.lm.layers[0].mlp.up_proj.weight, other.lm.layers[0].mlp.up_proj.weight)


def test_what_is_not_known_is_said() -> None:
    with pytest.raises(ProbeError, match="LLaDA-V"):
        random_weights("GSAI-ML/LLaDA-W")
    with pytest.raises(ProbeError, match="1 to 32"):
        random_weights("GSAI-ML/LLaDA-V", layers=33)
    with pytest.raises(ProbeError, match="bfloat16"):
        random_weights("GSAI-ML/LLaDA-V", dtype="auto")
