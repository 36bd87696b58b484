"""Training parts: patch targets, packed groups, the visual layout, published names, and the whole command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from transformers import AutoTokenizer

from probe.zoo import tower as towers
from probe.zoo.engine import MixedTrainer, schedule
from probe.zoo.model import (
    VISUAL,
    Miniature,
    Packing,
    diffusion_loss,
    draw_masks,
    draw_seen,
    language_config,
    packed_attention,
)
from probe.zoo.train import Plan, Size, main
from probe.zoo.world import draw


def test_packed_attention_is_full_attention_under_a_group_mask() -> None:
    torch.manual_seed(0)
    prefix, groups, length = 5, 3, 4
    total = prefix + groups * length
    q, k, v = (torch.randn(2, 2, total, 8) for _ in range(3))
    group = torch.tensor([0] * prefix + [1 + i // length for i in range(groups * length)])
    allowed = (group[None] == 0) | (group[None] == group[:, None])
    scores = (q @ k.transpose(-1, -2) * 8**-0.5).masked_fill(~allowed, -torch.inf)
    expected = (scores.softmax(-1) @ v).transpose(1, 2)
    got, _ = packed_attention(nn.Module(), q, k, v, None, 8**-0.5, packing=Packing(prefix, groups))
    torch.testing.assert_close(got, expected)
    alone, _ = packed_attention(nn.Module(), q, k, v, None, 8**-0.5)
    torch.testing.assert_close(alone, ((q @ k.transpose(-1, -2) * 8**-0.5).softmax(-1) @ v).transpose(1, 2))


def test_a_group_sees_the_same_packed_and_alone() -> None:
    """Packing must not show a group anything of another one: its logits do not move when the others change."""
    torch.manual_seed(0)
    model = Miniature(language_config(20, hidden=16, layers=2, heads=2, mlp=32), 8)
    prefix = model.prefix(torch.randn(1, 5, 36, 8), torch.arange(3))
    groups = torch.randint(0, 20, (1, 3, 6))
    changed = groups.clone()
    changed[:, 1:] = (changed[:, 1:] + 1) % 20
    a, b = (model.logits(prefix, g, 2, packed=True) for g in (groups, changed))
    torch.testing.assert_close(a[:, 0], b[:, 0])
    assert not torch.allclose(a[:, 1], b[:, 1])


@pytest.mark.parametrize("packing", [None, Packing(5, 3), Packing(5, 3, causal=True)])
def test_what_is_not_seen_is_a_key_that_is_not_there(packing: Packing | None) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 5 + 3 * 4, 8) for _ in range(3))
    seen = torch.tensor([[True, False, True, True, False], [True] * 5])
    got, _ = packed_attention(nn.Module(), q, k, v, None, 8**-0.5, packing=packing, seen=seen)
    other = torch.where(F.pad(seen, (0, 12), value=True)[:, None, :, None], k, 7.0)
    moved, _ = packed_attention(nn.Module(), q, other, v, None, 8**-0.5, packing=packing, seen=seen)
    torch.testing.assert_close(moved, got)  # whatever the hidden keys hold
    everything, _ = packed_attention(nn.Module(), q, k, v, None, 8**-0.5, packing=packing)
    torch.testing.assert_close(got[1], everything[1])  # a picture of which all is seen
    assert not torch.allclose(got[0], everything[0])
    if packing is None:
        left = F.pad(seen, (0, 12), value=True)[0]
        scores = q[:1] @ k[:1, :, left].transpose(-1, -2) * 8**-0.5
        torch.testing.assert_close(got[:1], (scores.softmax(-1) @ v[:1, :, left]).transpose(1, 2))


@pytest.mark.parametrize("packed", [True, False])
def test_an_occluded_token_changes_nothing(packed: bool) -> None:
    """Logits do not depend on the embedding of a visual token that is not seen, through all layers."""
    torch.manual_seed(0)
    model = Miniature(language_config(20, hidden=16, layers=2, heads=2, mlp=32), 8)
    prefix, groups = model.prefix(torch.randn(1, 5, 36, 8), torch.arange(3)), torch.randint(0, 20, (1, 1, 6))
    seen = torch.ones(1, 3 + VISUAL, dtype=torch.bool)
    seen[0, 3 + 40 :: 3] = False
    other = torch.where(seen[..., None], prefix, torch.randn_like(prefix))
    a, b = (model.logits(p, groups, 2, packed=packed, seen=seen) for p in (prefix, other))
    torch.testing.assert_close(a, b)
    assert not torch.allclose(a, model.logits(prefix, groups, 2, packed=packed))


def test_occlusion_takes_its_share() -> None:
    seen = draw_seen(4000, 0.7, torch.Generator().manual_seed(0))
    lost = (~seen).float().mean(1)
    assert seen.shape == (4000, VISUAL)
    assert (lost > 0).float().mean().item() == pytest.approx(0.7, abs=0.03)
    assert lost[lost > 0].mean().item() == pytest.approx(0.4, abs=0.02)  # uniform up to four fifths
    assert lost.max().item() <= 0.8 + 1 / VISUAL
    each = (~seen).float().mean(0)
    assert (each - 0.28).abs().max().item() < 0.04  # no place is spared
    assert draw_seen(9, 0.0, torch.Generator()).all()


def test_visual_span_is_base_view_then_raster_rows_each_closed_by_a_newline() -> None:
    model = Miniature(language_config(20, hidden=8, layers=1, heads=2, mlp=16), 8)
    model.projector = nn.Identity()  # type: ignore[assignment]
    features = torch.zeros(1, 5, 36, 8)
    features[0, :, :, 0] = torch.arange(5)[:, None] * 100 + torch.arange(36)  # view * 100 + patch
    with torch.no_grad():
        model.newline.fill_(-1.0)
        span = model.visual(features)[0, :, 0]
    assert len(span) == VISUAL == 192
    assert span[:36].tolist() == list(range(36))
    rows = span[36:].view(12, 13)
    assert (rows[:, 12] == -1).all()
    assert rows[0, :12].tolist() == [100, 101, 102, 103, 104, 105, 200, 201, 202, 203, 204, 205]
    assert rows[7, 0] == 306  # second patch row of the lower left tile
    assert rows[11, 11] == 435  # last patch of the last tile


def test_tiles_of_a_picture_are_its_quarters() -> None:
    picture = draw("scene", 4)
    views = towers.views(picture.pixels)
    assert views.shape == (5, 48, 48, 3)
    assert np.array_equal(views[2], picture.pixels[:48, 48:])
    assert np.array_equal(views[3], picture.pixels[48:, :48])


@pytest.mark.parametrize("kind", ["scene", "codes"])
def test_every_item_owns_the_patch_under_its_middle(kind: str) -> None:
    for seed in range(10):
        picture = draw(kind, seed)
        labels = towers.targets(picture)
        for item in picture.items:
            x, y = (item.box[0] + item.box[2]) / 2, (item.box[1] + item.box[3]) / 2
            tile, px, py = 1 + 2 * (y >= 48) + (x >= 48), int(x % 48 // 8), int(y % 48 // 8)
            first, second, row, column = labels[tile, py * 6 + px]
            assert (first, second) == tuple(towers.VISUAL_WORDS[n] for n in (item.names[0], item.names[-1]))
            per_tile = (2, 2) if kind == "scene" else (3, 4)
            assert (row, column) == (item.row % per_tile[0], item.column % per_tile[1])


def test_masks_are_stratified_and_never_empty() -> None:
    t, masked = draw_masks(100, 48, torch.Generator().manual_seed(0))
    assert masked.any(1).all()
    counts = torch.histc(t, 10, 0.03, 1.0)
    assert counts.tolist() == [10] * 10
    assert abs(masked.float().mean().item() - t.mean().item()) < 0.03


def test_loss_is_the_weighted_mean_over_masked_positions() -> None:
    logits = torch.zeros(1, 4, 5)  # uniform: every position costs ln 5
    logits[0, 0, 1] = 100.0  # and position 0 costs nothing
    wanted = torch.tensor([[1, 2, 3, 4]])
    masked = torch.tensor([[True, True, False, True]])
    weight = torch.tensor([[1.0, 1.0, 1.0, 0.2]])
    loss, right = diffusion_loss(logits, wanted, masked, weight)
    assert loss.item() == pytest.approx(1.2 * math.log(5) / 2.2, abs=1e-5)
    assert right.tolist() == [0.5]  # of the two masked content positions


def test_small_updates_are_kept_by_the_masters() -> None:
    """A step of 1e-4 at weight 1 is lost in bfloat16 (spacing 2**-7); the float32 master adds many of them up."""
    layer = nn.Linear(1, 1, bias=True)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    trainer = MixedTrainer(layer.named_parameters(), lambda n, p: p.dim() == 2, muon=1e-4, adamw=1e-4, weight_decay=0.0)
    for _ in range(200):
        layer(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
        trainer.step(1.0)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight.item() < 1.0
    assert trainer.masters[1].item() == pytest.approx(layer.bias.item(), rel=0.01)


def test_schedule_rises_stays_and_falls() -> None:
    assert schedule(0.0, 0) == pytest.approx(0.01)
    assert schedule(0.3, 500) == 1.0
    assert schedule(0.8, 500) == pytest.approx(0.5)
    assert schedule(1.0, 500) == pytest.approx(0.02)


def test_the_end_trains_whole_sequences() -> None:
    assert Plan.at(10, 0.5, Size()).packed
    late = Plan.at(10, 0.9, Size())
    assert not late.packed
    assert late.groups == 1


def _published_keys(layers: int, tower_layers: int) -> set[str]:
    keys = {"lm_head.weight", "model.embed_tokens.weight", "model.image_newline", "model.norm.weight"}
    keys |= {f"model.mm_projector.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")}
    parts = ["input_layernorm", "post_attention_layernorm"]
    parts += [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    keys |= {f"model.layers.{i}.{p}.weight" for i in range(layers) for p in parts}
    root = "model.vision_tower.vision_tower.vision_model."
    keys |= {
        f"{root}{p}" for p in ("embeddings.position_embedding.weight", "post_layernorm.weight", "post_layernorm.bias")
    }
    keys |= {f"{root}embeddings.patch_embedding.{p}" for p in ("weight", "bias")}
    parts = ["layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"] + [
        f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")
    ]
    keys |= {
        f"{root}encoder.layers.{i}.{p}.{q}" for i in range(tower_layers) for p in parts for q in ("weight", "bias")
    }
    return keys


def test_the_command_trains_writes_a_published_folder_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model"
    main(["--out", str(out), "--smoke", "--steps", "60", "--evaluate", "2"])
    lines = (tmp_path / "model.training" / "log.jsonl").read_text().splitlines()
    with safe_open(out / "model.safetensors", "pt") as file:
        assert set(file.keys()) == _published_keys(layers=2, tower_layers=1)
        first = file.get_tensor("lm_head.weight")
        assert first.dtype == torch.float16
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "llava_llada"
    assert [96, 96] in config["image_grid_pinpoints"]
    vision = json.loads((out / "vision_config.json").read_text())
    assert vision["num_hidden_layers"] == 2  # one more than is stored
    assert len(AutoTokenizer.from_pretrained(out)) == config["vocab_size"]
    assert "world/describe" in capsys.readouterr().out

    main(["--out", str(out), "--smoke", "--steps", "120", "--evaluate", "2"])
    assert "taken up at step 60" in capsys.readouterr().out
    more = (tmp_path / "model.training" / "log.jsonl").read_text().splitlines()
    assert more[: len(lines)] == lines
    losses = [json.loads(line)["loss"] for line in more]
    assert losses[-1] < losses[0] - 0.5
    with safe_open(out / "model.safetensors", "pt") as file:
        assert not torch.equal(file.get_tensor("lm_head.weight"), first)
