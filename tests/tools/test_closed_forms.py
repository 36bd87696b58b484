"""The study's closed forms: against plain sums, against what is executed where both must agree, and in a forecast."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaModel

from probe.backbones import facts_of
from probe.backbones.sizes import dims_of
from probe.closed_forms import after_layer, decode, denoising, layer, prefill, pruned
from probe.compile import compile_recipe
from probe.cost import DecoderDims
from probe.forecast import Setting, forecast
from probe.recipe import load_recipe

SIZES = st.integers(1, 400)


@given(n=SIZES, outputs=SIZES, d=SIZES, m=SIZES, layers=st.integers(1, 40))
def test_decoding_is_the_sum_over_its_tokens(n: int, outputs: int, d: int, m: int, layers: int) -> None:
    one_by_one = sum(layers * (4 * d**2 + 2 * d * m + 2 * d * (n + i)) for i in range(outputs))
    assert decode(n, outputs, d, m, layers) == one_by_one


@given(active=st.lists(SIZES, max_size=9), d=SIZES, m=SIZES, layers=st.integers(1, 40))
def test_denoising_is_a_prefill_per_step(active: list[int], d: int, m: int, layers: int) -> None:
    assert denoising(active, d, m, layers) == sum(prefill(n, d, m, layers) for n in active)
    assert pruned([[n] * layers for n in active], d, m) == denoising(active, d, m, layers)
    assert pruned([after_layer(9, 9, layers // 2, layers)], d, m) == prefill(9, d, m, layers)


@given(n=SIZES, heads=st.integers(1, 8), size=st.integers(1, 64), third=SIZES)
def test_two_per_multiply_add_is_what_runs_without_grouped_heads(n: int, heads: int, size: int, third: int) -> None:
    """A gated MLP has three matrices of 2/3 of the width that the formula's two have."""
    d, m = heads * size, 3 * third
    dims = DecoderDims(width=d, heads=heads, kv_heads=heads, head_size=size, mlp=2 * third, layers=1, vocabulary=1)
    assert dims.attention(n, n) + dims.mlp_block(n) == 2 * layer(n, d, m)


@pytest.mark.parametrize("n", [7, 31])
def test_torch_counts_the_same_for_such_a_stack(n: int) -> None:
    d, m, layers = 48, 90, 3
    config = LlamaConfig(
        hidden_size=d, intermediate_size=2 * m // 3, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=11, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaModel(config).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(inputs_embeds=torch.randn(1, n, d), use_cache=False)
    assert counter.get_total_flops() == 2 * prefill(n, d, m, layers)


def test_a_step_of_llada_v_is_some_58_teraflop_and_the_form_says_less_than_half() -> None:
    """LLaDA-V at 3.7k positions: two per multiply-add and three matrices, against one and two."""
    facts = facts_of("GSAI-ML/LLaDA-V")
    dims = dims_of("GSAI-ML/LLaDA-V", facts.vocabulary)
    assert dims is not None
    executed = dims.layers * (dims.attention(3700, 3700) + dims.mlp_block(3700))
    assert executed == pytest.approx(58e12, rel=0.02)
    assert executed / prefill(3700, dims.width, dims.mlp, dims.layers) == pytest.approx(2.5, abs=0.1)


def test_a_forecast_has_the_closed_form_beside_what_will_be_executed() -> None:
    facts = facts_of("GSAI-ML/LLaDA-V")
    dims = dims_of("GSAI-ML/LLaDA-V", facts.vocabulary)
    assert dims is not None
    setting = Setting(visual=1000, steps=4, slots=16, text=40)
    found = forecast(compile_recipe(load_recipe("fastv", ["keep=0.25"]), facts), facts, setting, dims)
    n, kept, d, m, layers = 1056, 306, dims.width, dims.mlp, dims.layers

    def layer_by_hand(tokens: int) -> int:
        return 4 * tokens * d * d + 2 * tokens * tokens * d + 2 * tokens * d * m

    wanted = (2 * layer_by_hand(n) + (layers - 2) * layer_by_hand(kept)) / (layers * layer_by_hand(n))
    assert found.closed_form == pytest.approx(wanted)
    assert found.flops is not None
    assert abs(found.closed_form - found.flops) < 0.05


def test_with_a_cache_only_the_rows_that_are_computed_count() -> None:
    facts = facts_of("miniature")
    dims = dims_of("miniature", facts.vocabulary)
    assert dims is not None
    setting = Setting(visual=100, steps=3, slots=8, cache="prefix", text=20)
    found = forecast(compile_recipe(load_recipe("vtw", ["layer=3"]), facts), facts, setting, dims)

    def denoised(first: list[int]) -> int:
        return sum(layer(n, dims.width, dims.mlp) for n in first) + 2 * dims.layers * layer(8, dims.width, dims.mlp)

    rows = np.where(found.tokens[0] > 0, 128, 28).tolist()
    assert rows.count(28) == 3
    assert found.closed_form == pytest.approx(denoised(rows) / denoised([128] * dims.layers))
