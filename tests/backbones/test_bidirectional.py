"""The bidirectional decoders under every kernel, with masks and with a cache that is nothing of transformers'."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config

import probe.attend  # noqa: F401 - registers the kernels `probe` and `probe_eager`
from probe.backbones.bidirectional import BidirectionalLlama, BidirectionalQwen2
from probe.errors import ProbeError

KERNELS = ("sdpa", "eager", "probe", "probe_eager")
SIZES = {
    "vocab_size": 40, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": False,
}  # fmt: skip


class Store:
    """A prefix cache by duck typing: fixed keys and values first, then the caller's."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.frozen = False

    def update(self, key, value, layer_idx, *args, **kwargs):
        if not self.frozen:
            self.layers[layer_idx] = key, value
            return key, value
        before = self.layers[layer_idx]
        return torch.cat([before[0], key], 2), torch.cat([before[1], value], 2)

    def get_seq_length(self, layer_idx=0):
        return self.layers[layer_idx][0].shape[2] if layer_idx in self.layers else 0


@pytest.fixture(params=[BidirectionalLlama, BidirectionalQwen2], ids=["llama", "qwen2"])
def build(request):
    def make(kernel):
        torch.manual_seed(0)
        config = LlamaConfig if request.param is BidirectionalLlama else Qwen2Config
        model = request.param(config(**SIZES, attn_implementation=kernel)).eval().requires_grad_(False)
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn(weight.shape) * 0.3 + (1 if "norm" in name else 0))
        return model

    return make


def run(model, embeds, **arguments):
    return model(inputs_embeds=embeds, **arguments).last_hidden_state


def near(got, want):
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_position_sees_every_other(build, kernel):
    model, embeds = build(kernel), torch.randn(1, 9, 24)
    before = run(model, embeds)
    embeds[:, -1] += 1
    assert (before - run(model, embeds)).abs().amax(-1).min() > 1e-5


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_and_masks_agree(build, kernel):
    """A hidden key is a key that is not there, however the mask is spelled; a causal one is transformers' own."""
    model, embeds = build(kernel), torch.randn(2, 9, 24)
    keep = torch.tensor([[1] * 9, [1] * 5 + [0] * 4]).bool()
    want = [run(model, embeds[:1])[0], run(model, embeds[1:, :5])[0]]
    added = torch.where(keep, 0.0, torch.finfo(torch.float32).min)[:, None, None].expand(2, 1, 9, 9)
    square = keep[:, None, None, :].expand(2, 1, 9, 9)
    for mask in (keep, keep.long(), square, square.expand(2, 4, 9, 9), square.long(), added):
        got = run(model, embeds, attention_mask=mask)
        near(got[0], want[0])
        near(got[1, :5], want[1])
    parent = type(model).__mro__[2](type(model.config)(**SIZES, attn_implementation="eager")).eval()
    parent.load_state_dict(model.state_dict())
    causal = torch.ones(9, 9).tril().bool().expand(2, 1, 9, 9)
    near(run(model, embeds, attention_mask=causal), run(parent, embeds).detach())


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_prefix_cache_is_a_mask(build, kernel):
    """Prefix rows that see only the prefix, then the rest on top of their keys: one pass under that mask."""
    model, embeds, cut = build(kernel), torch.randn(2, 11, 24), 6
    allowed = torch.ones(11, 11).bool()
    allowed[:cut, cut:] = False
    want = run(model, embeds, attention_mask=allowed.expand(2, 1, 11, 11))
    store = Store()
    near(run(model, embeds[:, :cut], past_key_values=store), want[:, :cut])
    store.frozen = True
    positions = torch.arange(cut, 11)[None]
    for more in ({}, {"position_ids": positions}, {"attention_mask": torch.ones(2, 11).bool()}):
        near(run(model, embeds[:, cut:], past_key_values=store, **more), want[:, cut:])
    assert store.get_seq_length() == cut

    hidden = torch.ones(2, 1, 5, 11).bool()
    hidden[..., 3] = False
    allowed = allowed.clone()
    allowed[cut:, 3] = False
    want = run(model, embeds, attention_mask=allowed.expand(2, 1, 11, 11))[:, cut:]
    for mask in (hidden, hidden[:, 0, 0]):
        near(run(model, embeds[:, cut:], past_key_values=store, attention_mask=mask), want)


def test_positions_with_gaps_and_outputs(build):
    model, embeds = build("eager"), torch.randn(1, 5, 24)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    near(model(input_ids=ids).last_hidden_state, run(model, model.embed_tokens(ids)))
    shifted = run(model, embeds, position_ids=torch.arange(5)[None] + 7)
    near(shifted, run(model, embeds))  # rotary attention sees differences alone
    apart = run(model, embeds, position_ids=torch.tensor([[0, 1, 5, 6, 30]]))
    assert (apart - shifted).abs().max() > 1e-4
    out = model(inputs_embeds=embeds, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 4 and len(out.attentions) == 3
    assert out.hidden_states[0].equal(embeds) and out.hidden_states[-1].equal(out.last_hidden_state)
    with pytest.raises(ProbeError, match="either"):
        model()


def test_sliding_windows_are_refused():
    config = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    with pytest.raises(ProbeError, match="sliding"):
        BidirectionalQwen2(config)
