"""Rows beside the kernel equal the rows of the square map that eager attention forms."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface

from probe.attend import CHUNK, RowRequest, ask, attention_rows, eager_attention, forget


def tensors(heads: int, kv_heads: int, length: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(heads * 100 + kv_heads)
    return (
        torch.randn(batch, heads, length, 8, generator=g),
        torch.randn(batch, kv_heads, length, 8, generator=g),
        torch.randn(batch, kv_heads, length, 8, generator=g),
    )


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("mask_kind", ["none", "bool", "additive", "square"])
def test_rows_equal_eager_rows(heads: int, kv_heads: int, mask_kind: str) -> None:
    q, k, v = tensors(heads, kv_heads, 11)
    real = torch.ones(2, 1, 1, 11, dtype=torch.bool)
    real[1, ..., 8:] = False
    masks = {
        "none": None,
        "bool": real,
        "additive": torch.zeros(2, 1, 1, 11).masked_fill(~real, torch.finfo(torch.float32).min),
        "square": torch.ones(11, 11, dtype=torch.bool).tril()[None, None],
    }
    mask = masks[mask_kind]
    _, full = eager_attention(torch.nn.Identity(), q, k, v, mask)
    rows = torch.tensor([[0, 7, 3], [2, 2, 5]])
    got = attention_rows(q, k, rows, mask, 8**-0.5, "softmax")
    expected = torch.stack([full[b][:, rows[b]] for b in range(2)])
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
def test_head_mean_form_averages_logits_before_one_softmax(heads: int, kv_heads: int) -> None:
    q, k, _ = tensors(heads, kv_heads, 9)
    rows = torch.tensor([[1, 8], [0, 4]])
    logits = q @ k.repeat_interleave(heads // kv_heads, 1).transpose(2, 3) * 8**-0.5
    square = logits.mean(1).softmax(-1)
    expected = torch.stack([square[b, rows[b]] for b in range(2)])[:, None]
    torch.testing.assert_close(
        attention_rows(q, k, rows, None, 8**-0.5, "head_mean_logits"), expected, atol=1e-6, rtol=1e-5
    )


def test_requests_come_in_chunks_and_never_form_the_square() -> None:
    length = CHUNK * 2 + 5
    q, k, v = tensors(2, 2, length, batch=1)
    module = torch.nn.Identity()
    seen: list[tuple[int, tuple[int, ...]]] = []
    total = torch.zeros(1, 2, length)

    def receive(weights: torch.Tensor, first: int) -> None:
        nonlocal total
        seen.append((first, tuple(weights.shape)))
        total = total + weights.sum(2)

    ask(module, [RowRequest(torch.arange(length)[None], "softmax", receive)])
    out, _ = AttentionInterface()["probe"](module, q, k, v, None, scaling=8**-0.5, is_causal=False)
    forget(module)
    expected_out, full = eager_attention(module, q, k, v, None)
    torch.testing.assert_close(out, expected_out, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(total, full.sum(2), atol=1e-4, rtol=1e-4)
    assert [first for first, _ in seen] == [0, CHUNK, 2 * CHUNK]
    assert max(shape[2] for _, shape in seen) == CHUNK
    AttentionInterface()["probe"](module, q, k, v, None, scaling=8**-0.5, is_causal=False)
    assert len(seen) == 3, "a forgotten request is not answered again"
