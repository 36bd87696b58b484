"""Scores against brute force on small tensors."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from probe import scores
from probe.errors import ProbeError
from probe.scores.attention import TopHeads


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def chances(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# --- attention -------------------------------------------------------------------------------------------------------


def test_attention_reduces_heads_and_queries() -> None:
    rows = chances(3, 5, 7)  # (head, query, n)
    received = rows.mean(1)
    of = scores.attention
    torch.testing.assert_close(of(received), rows.mean((0, 1)))
    torch.testing.assert_close(of(received, heads="max"), rows.mean(1).amax(0))
    torch.testing.assert_close(of(received, heads="sum"), rows.mean(1).sum(0))
    torch.testing.assert_close(of(received, 5, reduce="sum"), rows.sum(1).mean(0))
    weight = chances(7, seed=1) + 0.1
    torch.testing.assert_close(of(received, None, weight, correct="rotary"), rows.mean((0, 1)) / weight)


@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 99))
def test_the_top_heads_are_those_with_most_attention(heads: int, n: int, seed: int) -> None:
    received = chances(heads, 4, seed=seed)
    best = sorted(range(heads), key=lambda h: -float(received[h].sum()))[:n]
    assert scores.heads_with_most(received, n).tolist() == best
    torch.testing.assert_close(scores.attention(received, heads=TopHeads(n)), received[best].mean(0))


def test_the_mass_is_what_all_visual_tokens_receive_together() -> None:
    received = torch.tensor([[0.1, 0.2, 0.3], [0.0, 0.1, float("nan")]])  # a token that came later received nothing
    torch.testing.assert_close(scores.mass(received), torch.full((3,), (0.6 + 0.1) / 2))


def test_ones_attention_is_attention_of_ones() -> None:
    """Rotated by complex multiplication, the other way to write rotary embeddings."""
    size, theta, positions = 8, 100.0, torch.arange(5)
    frequency = theta ** (-torch.arange(0, size, 2).double() / size)
    turned = torch.polar(torch.ones(5, size // 2).double(), positions[:, None] * frequency) * complex(1, 1)
    logits = (turned[:, None] * turned[None].conj()).real.sum(-1) * size**-0.5
    angle = torch.cat([positions[:, None] * frequency] * 2, -1).float()
    got = scores.ones_attention(angle.cos(), angle.sin(), angle.cos(), angle.sin())
    torch.testing.assert_close(got, logits.softmax(-1).float())


def test_raters_are_the_text_tokens_above_the_mean() -> None:
    v, t = noise(6, 4), noise(5, 4, seed=1)
    expected = torch.zeros(5)
    for i in range(6):
        weights = [math.exp(float(v[i] @ t[j])) for j in range(5)]
        expected += torch.tensor([w / sum(weights) / 6 for w in weights])
    torch.testing.assert_close(scores.relevance(v, t), expected)
    assert scores.raters(v, t).tolist() == [float(e) > float(expected.mean()) for e in expected]
    assert scores.raters(v, t, 0.0).all()
    assert not scores.raters(v, t[:1]).any(), "a single token is never above its own mean"


# --- similarity and norms --------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 7), st.integers(0, 99))
def test_similarity_by_brute_force(n: int, seed: int) -> None:
    x, group = noise(n, 3, seed=seed), torch.arange(n) % 2
    cos = [[float(torch.cosine_similarity(x[i], x[j], 0)) for j in range(n)] for i in range(n)]
    torch.testing.assert_close(scores.similarity(x), torch.tensor(cos), atol=1e-5, rtol=1e-4)
    others = [[cos[i][j] for j in range(n) if j != i and group[i] == group[j]] for i in range(n)]
    nearest = [max(o, default=-1.0) for o in others]
    mean = [sum(o) / max(len(o), 1) for o in others]
    variance = [sum((c - m) ** 2 for c in o) / max(len(o), 1) for o, m in zip(others, mean, strict=True)]
    for stat, expected in (("nearest", nearest), ("mean", mean), ("variance", variance)):
        got = scores.similarity(x, None, None, group, stat=stat)
        torch.testing.assert_close(got, torch.tensor(expected), atol=1e-5, rtol=1e-4)
        assert torch.equal(scores.similarity(x, None, None, group, stat=stat, sign=-1), -got)


def test_spaces() -> None:
    hidden, embedding, keys = noise(4, 6), noise(4, 6, seed=1), noise(2, 4, 3, seed=2)
    assert torch.equal(scores.features(hidden), hidden)
    assert torch.equal(scores.features(None, embedding, space="embedding"), embedding)
    assert torch.equal(scores.features(None, None, keys, space="keys"), keys.mean(0))
    full = torch.stack([torch.cat([keys[h, i] for h in range(2)]) for i in range(4)])
    assert torch.equal(scores.features(None, None, keys, space="keys", heads="full"), full)
    torch.testing.assert_close(scores.norm(None, keys, space="keys", p=1.0), keys.abs().sum((0, 2)))
    torch.testing.assert_close(scores.norm(hidden, sign=-1), -hidden.pow(2).sum(1).sqrt())


def test_text_image() -> None:
    x, t = noise(5, 4), noise(4, seed=1)
    dots = torch.tensor([sum(float(a * b) for a, b in zip(row, t, strict=True)) for row in x])
    torch.testing.assert_close(scores.text_image(x, t), dots)
    torch.testing.assert_close(scores.text_image(x, t, sign=-1, softmax=True), (-dots).softmax(0))
    torch.testing.assert_close(scores.text_image(x, t, metric="cosine"), torch.cosine_similarity(x, t[None], -1))


# --- position --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 300), st.data())
def test_uniform_spreads_any_number_evenly(n: int, data: st.DataObject) -> None:
    score = scores.uniform(n)
    assert score.unique().shape[0] == n
    k = data.draw(st.integers(1, n))
    kept = sorted(score.topk(k).indices.tolist())
    gaps = [b - a for a, b in zip([-1, *kept], [*kept, n], strict=False)]
    spread = 2 ** math.ceil(math.log2(n)) if n > 1 else 1
    assert max(gaps) <= 2 ** math.ceil(math.log2(spread / k) + 1) + 1


def test_uniform_is_a_stride_for_powers_of_two() -> None:
    assert sorted(scores.uniform(16).topk(4).indices.tolist()) == [0, 4, 8, 12]


def test_the_centre_scores_highest_and_newlines_are_unknown() -> None:
    box = torch.tensor([[0, 0, 0.5, 0.5], [0.4, 0.4, 0.6, 0.6], [torch.nan] * 4, [0.5, 0, 1, 0.5]])
    score = scores.center(box)
    assert score[1] == 0
    assert score[0] == pytest.approx(-(0.125**0.5))
    assert score[2].isnan()


def tile_boxes(side: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Boxes and views of a base view and its tiles."""
    edge = torch.arange(side) / side
    out, view = [], []
    for v, (r, c, m, k) in enumerate(
        [(0, 0, 1, 1), *((r, c, rows, columns) for r in range(rows) for c in range(columns))]
    ):
        y, x = torch.meshgrid((r + edge) / m, (c + edge) / k, indexing="ij")
        out.append(torch.stack([x, y, x + 1 / side / k, y + 1 / side / m], -1).flatten(0, 1))
        view += [v] * side**2
    return torch.cat(out), torch.tensor(view)


@pytest.mark.parametrize(("side", "rows", "columns"), [(4, 2, 2), (3, 1, 2), (4, 3, 2)])
def test_the_thumbnail_is_resized_to_the_tiles(side: int, rows: int, columns: int) -> None:
    box, view = tile_boxes(side, rows, columns)
    base = chances(side, side)
    received = torch.cat([base.flatten(), torch.zeros(rows * columns * side**2)])[None]
    score = scores.thumbnail(received, box, view)
    size = (rows * side, columns * side)
    whole = torch.nn.functional.interpolate(base[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    tiles = whole.reshape(rows, side, columns, side).transpose(1, 2).flatten()
    torch.testing.assert_close(score[side**2 :], tiles, atol=1e-5, rtol=1e-5)
    assert torch.equal(score[: side**2], base.flatten())
    area = scores.thumbnail(received, box, view, mode="area")[side**2 :]
    assert float(area.sum()) == pytest.approx(float(base.sum()), rel=1e-5)
    if side % rows == 0 and side % columns == 0:
        parts = base.reshape(rows, side // rows, columns, side // columns).sum((1, 3)).flatten()
        torch.testing.assert_close(area.reshape(rows * columns, -1).sum(1), parts, atol=1e-5, rtol=1e-5)


# --- combine, transport, learned -------------------------------------------------------------------------------------


def test_combine_weighs_and_normalises_within_groups() -> None:
    a, b, group = chances(6), chances(6, seed=1), torch.tensor([0, 0, 1, 1, 1, 0])
    of = (lambda: a, lambda: b)
    torch.testing.assert_close(scores.combine(group, of=of, weights=(2.0, -1.0)), 2 * a - b)
    got = scores.combine(group, of=of, normalise=("l2", "mean"))
    for g in (0, 1):
        m = group == g
        torch.testing.assert_close(got[m], a[m] / a[m].norm() + b[m] / b[m].mean())
    with pytest.raises(ProbeError, match="2 scores, but 1 weights"):
        scores.combine(group, of=of, weights=(1.0,))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.floats(0, 5), st.integers(0, 99))
def test_transport_moves_all_mass(n: int, relax: float, seed: int) -> None:
    x, y, box = noise(n, 4, seed=seed), noise(n, 4, seed=seed + 1), chances(n, 4, seed=seed)
    score = scores.transport(x, y, box, relax=relax, iterations=200)
    assert (score >= 0).all()
    assert float(score.sum()) == pytest.approx(1, abs=1e-3)


def test_transport_prefers_what_the_output_resembles_and_is_uniform_when_held() -> None:
    x = torch.eye(4)
    y = torch.stack([x[0], x[0], x[0], x[1]])
    here = torch.tensor([[0.5, 0.5, 0.5, 0.5]]).expand(4, 4)
    score = scores.transport(x, y, here, relax=0.0)
    assert score.argmax() == 0
    assert score[0] > score[1] > score[2]
    held = scores.transport(x, y, here, relax=1e4, iterations=500)
    torch.testing.assert_close(held, torch.full((4,), 0.25), atol=1e-2, rtol=0)


def routers(path: Path, width: int, hidden: int = 3, layers: int = 2) -> Path:
    tensors = {}
    for layer in range(layers):
        tensors[f"{layer}.0.weight"] = noise(hidden, 2 * width, seed=layer)
        tensors[f"{layer}.0.bias"] = noise(hidden, seed=layer + 10)
        tensors[f"{layer}.2.weight"] = noise(2, hidden, seed=layer + 20)
        tensors[f"{layer}.2.bias"] = noise(2, seed=layer + 30)
    save_file(tensors, path)
    return path


def test_the_router_is_a_small_network(tmp_path: Path) -> None:
    text = noise(5, 4, seed=7)
    file = str(routers(tmp_path / "routers.safetensors", 4))
    for layer in (0, 1):
        net = torch.nn.Sequential(torch.nn.Linear(8, 3), torch.nn.GELU(), torch.nn.Linear(3, 2))
        from safetensors.torch import load_file

        net.load_state_dict({k[2:]: v for k, v in load_file(file).items() if k.startswith(f"{layer}.")})
        logit = net(torch.cat([text.mean(0), text[-1]]))
        score = scores.learned(6, text, layer, file=file)
        torch.testing.assert_close(score, (logit[0] - logit[1]).expand(6))


def test_a_router_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    file = str(routers(tmp_path / "other.safetensors", 4))
    with pytest.raises(ProbeError, match=r"no tensor `7.0.weight`"):
        scores.learned(2, noise(3, 4), 7, file=file)
    with pytest.raises(ProbeError, match=r"`0.0.weight` has the shape \(3, 8\), but \(3, 12\) would fit"):
        scores.learned(2, noise(3, 6), 0, file=file)
    with pytest.raises(ProbeError, match="no safetensors file"):
        scores.learned(2, noise(3, 4), 0, file=str(tmp_path / "absent"))
    with pytest.raises(ProbeError, match="there is none"):
        scores.learned(2, noise(0, 4), 0, file=file)
