"""Probes inside and after the image encoder: identities, brute force, torch and nnsight as the oracles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from encoder_probes import (
    APPEND,
    EDITS,
    INSIDE,
    OUTPUT,
    PICTURE,
    PROJECTED,
    RAGGED,
    RANDOM,
    RECORD,
    TILES,
    TOME,
    encode,
    plain,
)
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode

from probe.backbones import load
from probe.backbones.base import Features
from probe.backbones.llada_v import LladaV
from probe.data import load as pictures
from probe.site import Fate, Role

Between = Callable[[int, int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""`between(layer, view, x, keys (n, head, size), size)`: a view's tokens and their sizes, shortened."""


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """A picture that is cut into a base view and four tiles."""
    return next(pictures("world/mixed", 1)).images[0]


def same_features(a: Features, b: Features) -> None:
    assert torch.equal(a.projected, b.projected)
    assert a.layout == b.layout
    assert a.survivors is None
    assert b.survivors is None


# -- identities ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edit", ["inside", "output", "projected", "picture", "ragged", "append", "random"])
def test_keeping_everything_is_no_probe_bit_for_bit(edit: str, tiny: LladaV, picture: Image.Image) -> None:
    text = EDITS[edit]
    for keep in ("[0.75, 0.5]", "0.25", "0.4"):
        text = text.replace(f"keep: {keep}", "keep: 1.0")
    done = encode(tiny, [picture], text)
    same_features(done.features, plain(tiny, picture))
    whole, bare = (tiny.assemble("what?", f) for f in (done.features, plain(tiny, picture)))
    assert whole.fate is None
    assert torch.equal(whole.embeds, bare.embeds)
    assert torch.equal(whole.visual, bare.visual)
    assert done.flops == tiny.encode_flops(done.features)


def test_merging_nothing_is_no_probe_bit_for_bit(tiny: LladaV, picture: Image.Image) -> None:
    same_features(encode(tiny, [picture], TOME.replace("r: 7", "r: 0")).features, plain(tiny, picture))


def test_recording_changes_nothing_bit_for_bit(tiny: LladaV, picture: Image.Image) -> None:
    done = encode(tiny, [picture], RECORD)
    same_features(done.features, plain(tiny, picture))
    pruned, watched = (encode(tiny, [picture], text).features for text in (EDITS["several"], EDITS["several"] + RECORD))
    assert torch.equal(pruned.projected, watched.projected)
    left, seen = pruned.survivors, watched.survivors
    assert left is not None
    assert seen is not None
    assert torch.equal(left.holder, seen.holder)


@pytest.mark.parametrize("edit", EDITS)
def test_nothing_stays_on_the_modules(edit: str, tiny: LladaV, picture: Image.Image) -> None:
    encode(tiny, [picture], EDITS[edit] + RECORD)
    for module in tiny.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not [key for key in module.__dict__ if key.startswith("_probe")]


@pytest.mark.parametrize("edit", EDITS)
def test_a_sample_is_the_same_in_every_run(edit: str, tiny: LladaV, picture: Image.Image) -> None:
    first, again = (encode(tiny, [picture], EDITS[edit], seed=5).features for _ in range(2))
    assert torch.equal(first.projected, again.projected)
    other = encode(tiny, [picture], EDITS[edit], seed=6).features
    assert torch.equal(first.projected, other.projected) == (edit != "random")


# -- what is left, and where it stands -----------------------------------------------------------------------------


@pytest.mark.parametrize("edit", EDITS)
def test_every_patch_has_one_fate_and_survivors_stand_in_the_prompt(
    edit: str, tiny: LladaV, picture: Image.Image
) -> None:
    done = encode(tiny, [picture], EDITS[edit])
    left = done.features.survivors
    assert left is not None
    prompt = tiny.assemble("what is there?", done.features)
    patches = tiny.facts.patches * len(left.alive)
    assert prompt.fate is not None
    assert prompt.n_visual == prompt.fate.shape[0] >= patches
    assert bool(((prompt.fate >= Fate.KEPT) & (prompt.fate <= Fate.MASKED)).all())
    there = prompt.visual >= 0
    index = torch.cat(left.alive)
    assert torch.equal(prompt.visual[there], index)
    assert set(index.tolist()) == set((prompt.fate == int(Fate.KEPT)).nonzero()[:, 0].tolist())
    rows = torch.cat([done.features.projected[v, : a.shape[0]] for v, a in enumerate(left.alive)])
    assert torch.equal(prompt.embeds[there], rows)
    assert torch.equal(prompt.role == int(Role.VISUAL), there)
    assert bool((prompt.role[: int(there.nonzero()[0])] == int(Role.SYSTEM)).all())
    unpruned = tiny.assemble("what is there?", plain(tiny, picture))
    assert torch.equal(prompt.embeds[~there], unpruned.embeds[unpruned.visual < 0]), "the text is as it was"
    assert prompt.n_original == unpruned.n_original == unpruned.n_visual
    tokens = done.arrays["encoder_tokens"]
    assert tokens.shape == (tiny.facts.encoder_layers, len(left.alive))
    assert (tokens[0] == tiny.facts.patches).all()
    assert done.arrays["patch_box"].shape == (patches, 4)
    assert (prompt.box[:, 2:] >= prompt.box[:, :2]).all()
    assert prompt.view[:patches].tolist() == done.arrays["patch_view"].tolist()


@pytest.mark.parametrize("size", [(96, 96), (96, 48), (200, 70), (31, 240)])
def test_unpruned_patches_see_what_the_tokens_of_the_layout_see(size: tuple[int, int], tiny: LladaV) -> None:
    """Wherever tiles are neither trimmed nor shrunk, the joined map shows the tiles' patches one to one."""
    image = Image.new("RGB", size)
    views, features = tiny.views([image]), plain(tiny, image)
    tiling = features.layout[0].tiling  # type: ignore[index]
    side = tiling.geometry.side
    cells = features.layout[0].cells()  # type: ignore[index]
    torch.testing.assert_close(cells.box[: side * side], views.box[0])
    assert views.base == (True, *[False] * (len(views.base) - 1))
    if tiling.trim == (0, 0) and not tiling.shrunk:
        rows, columns = tiling.shape
        grid = cells.box[side * side :].view(rows, columns + 1, 4)[:, :-1]
        across, down = tiling.grid
        tiles = views.box[1:].view(down, across, side, side, 4).transpose(1, 2).reshape(rows, columns, 4)
        torch.testing.assert_close(grid, tiles)
        torch.testing.assert_close(cells.box[views.token[1:]], views.box[1:])
    whole = torch.cat([views.box[1:, :, :2].amin((0, 1)), views.box[1:, :, 2:].amax((0, 1))])
    assert torch.equal(whole, torch.tensor([0.0, 0.0, 1.0, 1.0]))


@pytest.mark.parametrize("text", [PROJECTED, PROJECTED.replace("keep: 0.25", "keep: 1"), TILES])
def test_dropping_behind_the_projector_is_dropping_before_the_language_model(
    text: str, tiny: LladaV, picture: Image.Image
) -> None:
    """With positions kept, every row of the pruned prompt is the row of the unpruned one at its position."""
    done = encode(tiny, [picture], text).features
    pruned, whole = tiny.assemble("what is it?", done), tiny.assemble("what is it?", plain(tiny, picture))
    assert pruned.position is not None
    at = pruned.position
    torch.testing.assert_close(pruned.embeds, whole.embeds[at])
    assert torch.equal(pruned.role, whole.role[at])
    assert torch.equal(pruned.ids, whole.ids[at])
    seen = whole.visual[at]
    torch.testing.assert_close(pruned.box[pruned.visual[seen >= 0]], whole.box[seen[seen >= 0]])
    gone = set(range(whole.embeds.shape[0])) - set(at.tolist())
    assert gone <= set((whole.visual >= 0).nonzero()[:, 0].tolist()), "only visual tokens and newlines are missing"
    assert int(at.max()) == whole.embeds.shape[0] - 1, "the answer begins where it would"


def test_positions_are_numbered_anew_where_a_probe_says_so(tiny: LladaV, picture: Image.Image) -> None:
    kept, compact = PROJECTED, PROJECTED.replace("do: drop", "do: {drop: {positions: compact}}")
    first = tiny.assemble("what?", encode(tiny, [picture], compact).features)
    assert first.position is None
    mixed = tiny.assemble("what?", encode(tiny, [picture], compact.replace("projected", "x") + kept).features)
    assert mixed.position is None
    again = tiny.assemble("what?", encode(tiny, [picture], kept).features)
    assert torch.equal(again.embeds, first.embeds), "the same tokens, in the same order"
    added = tiny.assemble("what?", encode(tiny, [picture], APPEND).features)
    left = encode(tiny, [picture], APPEND).features.survivors
    assert left is not None
    assert added.position is not None
    text = added.visual < 0
    unpruned = tiny.assemble("what?", plain(tiny, picture))
    assert torch.equal(added.position[text], (unpruned.visual < 0).nonzero()[:, 0])
    fresh = added.visual >= 5 * tiny.facts.patches
    start = int((unpruned.visual >= 0).nonzero()[0])
    assert torch.equal(added.position[fresh] - start, left.views.token[:, -1])


def test_several_pictures_are_one_view_each(tiny: LladaV, picture: Image.Image) -> None:
    images = [picture, picture.resize((60, 40)), picture.rotate(90)]
    done = encode(tiny, images, OUTPUT)
    left, patches = done.features.survivors, tiny.facts.patches
    assert left is not None
    assert left.views.base == (True, True, True)
    assert left.views.place == (0, 1, 2)
    prompt = tiny.assemble("compare", done.features)
    assert prompt.picture[::patches].tolist() == [0, 1, 2]
    assert torch.equal(prompt.visual[prompt.visual >= 0], torch.cat(left.alive)), "one after the other"
    whole = tiny.assemble("compare", tiny.encode_images(images))
    assert prompt.position is not None
    assert torch.equal(whole.ids[prompt.position], prompt.ids)
    assert torch.equal(whole.picture[whole.visual[prompt.position]], prompt.picture[prompt.visual])
    together = encode(tiny, images, PICTURE).features.survivors
    assert together is not None
    assert [a.shape[0] for a in together.alive] == [patches // 4] * 3, "a picture of one view is decided by itself"


def test_views_and_groups_say_who_is_decided_on(tiny: LladaV, picture: Image.Image) -> None:
    patches = tiny.facts.patches

    def counts(text: str) -> list[int]:
        left = encode(tiny, [picture], text).features.survivors
        assert left is not None
        return [a.shape[0] for a in left.alive]

    quarter = patches // 4
    assert counts(OUTPUT) == [quarter] * 5
    assert counts(OUTPUT.replace("encoder.output", "encoder.output, views: base")) == [quarter] + [patches] * 4
    assert counts(OUTPUT.replace("encoder.output", "encoder.output, views: tiles")) == [patches] + [quarter] * 4
    assert counts(TILES) == [patches, 0, 0, 0, 0]
    together = counts(PICTURE)
    assert sum(together) == quarter * 5
    assert len(set(together)) > 1, "a picture's budget is not shared out evenly"
    assert counts(TILES + OUTPUT.replace("encoder", "projector")) == [quarter, 0, 0, 0, 0]


# -- against other ways to compute the same ------------------------------------------------------------------------


def test_dropping_behind_the_encoder_is_a_gather(tiny: LladaV, picture: Image.Image) -> None:
    full = plain(tiny, picture).projected
    for text in (OUTPUT, PROJECTED, PICTURE, RANDOM):
        done = encode(tiny, [picture], text).features
        left = done.survivors
        assert left is not None
        for v, alive in enumerate(left.alive):
            own = alive - v * tiny.facts.patches
            assert (own.diff() > 0).all(), "raster order"
            torch.testing.assert_close(done.projected[v, : own.shape[0]], full[v, own])


def tower_by_hand(
    backbone: LladaV,
    image: Image.Image,
    between: Callable[[int, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
) -> Tensor:
    """The tower written out in plain products, view by view: `between(layer, view, x, keys, size)` shortens a view.

    `keys (n, heads, size)`; returns the projected features of all views, which must be of one length.
    """
    tower, out = backbone.vision_tower, []
    heads = tower.config.num_attention_heads
    for v, x in enumerate(tower.embeddings(pixels(backbone, image))):
        size = torch.ones(x.shape[0])
        for i, layer in enumerate(tower.encoder.layers):
            y, attention = layer.layer_norm1(x), layer.self_attn
            q, k, w = (f(y).view(x.shape[0], heads, -1) for f in (attention.q_proj, attention.k_proj, attention.v_proj))
            logits = torch.einsum("qhc,khc->hqk", q, k) * q.shape[-1] ** -0.5 + size.log()
            mixed = torch.einsum("hqk,khc->qhc", logits.softmax(-1), w).flatten(1)
            x = x + attention.out_proj(mixed)
            x, size = between(i, v, x, k, size)
            x = x + layer.mlp(layer.layer_norm2(x))
        out.append(backbone.mm_projector(x))
    return torch.stack(out)


def pixels(backbone: LladaV, image: Image.Image) -> Tensor:
    """What the tower is given for a picture."""
    seen: list[Tensor] = []
    handle = backbone.vision_tower.embeddings.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    backbone.encode_images([image])
    handle.remove()
    return seen[0]


@torch.inference_mode()
def test_tome_is_tome_written_out(tiny: LladaV, picture: Image.Image) -> None:
    """Parity matching on mean keys, size-weighted means, sizes carried into attention (Bolya et al., ICLR 2023)."""
    r = 7

    def merged(layer: int, view: int, x: Tensor, keys: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        unit = normalize(keys.mean(1), dim=-1)
        into = {int(i): int(i) for i in range(x.shape[0])}
        even, odd = range(0, x.shape[0], 2), range(1, x.shape[0], 2)
        edges = [(*max((float(unit[a] @ unit[b]), -b) for b in odd), a) for a in even]
        for _, minus_b, a in sorted(edges, key=lambda e: (-e[0], e[2]))[: min(r, x.shape[0] // 2)]:
            into[a] = -minus_b
        kept = sorted(set(into.values()))
        groups = [[i for i, b in into.items() if b == k] for k in kept]
        sizes = torch.stack([size[g].sum() for g in groups])
        means = torch.stack([(x[g] * size[g, None]).sum(0) / size[g].sum() for g in groups])
        return means, sizes

    done = encode(tiny, [picture], TOME)
    expected = tower_by_hand(tiny, picture, merged)
    torch.testing.assert_close(done.features.projected, expected, atol=1e-5, rtol=1e-4)
    left = done.features.survivors
    assert left is not None
    patches = tiny.facts.patches
    assert [a.shape[0] for a in left.alive] == [patches - 2 * r] * 5
    assert torch.equal(left.size[torch.cat(left.alive)].sum(), torch.tensor(5.0 * patches))
    assert done.arrays["encoder_tokens"].tolist() == [[patches] * 5, [patches - r] * 5]


@torch.inference_mode()
def test_dropping_inside_the_encoder_is_a_shorter_encoder(tiny: LladaV, picture: Image.Image) -> None:
    left = encode(tiny, [picture], RAGGED).features
    assert left.survivors is not None
    alive = [a - v * tiny.facts.patches for v, a in enumerate(left.survivors.alive)]

    def gathered(layer: int, view: int, x: Tensor, keys: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        keep = alive[view] if layer == 0 else torch.arange(x.shape[0])
        return x[keep], size[keep]

    for v, own in enumerate(alive):
        kept = alive
        alive = [own] * 5  # every view cut alike, so that they stack; only this one is compared
        expected = tower_by_hand(tiny, picture, gathered)[v]
        alive = kept
        torch.testing.assert_close(left.projected[v, : own.shape[0]], expected, atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_recorded_attention_is_that_of_an_nnsight_trace_of_the_eager_tower(
    tiny: LladaV, tiny_eager: LladaV, picture: Image.Image
) -> None:
    from nnsight import NNsight

    done = encode(tiny, [picture], RECORD)
    envoy = NNsight(tiny_eager.vision_tower.encoder)
    maps, queries, keys, outputs = [], [], [], []
    with envoy.trace(inputs_embeds=tiny_eager.vision_tower.embeddings(pixels(tiny_eager, picture))):
        for i in range(tiny.facts.encoder_layers):
            queries.append(envoy.layers[i].self_attn.q_proj.output.save())
            keys.append(envoy.layers[i].self_attn.k_proj.output.save())
            maps.append(envoy.layers[i].self_attn.output[1].save())
            outputs.append(envoy.layers[i].layer_norm2.input.save())
        last = envoy.output.last_hidden_state.save()
    heads = tiny.vision_tower.config.num_attention_heads
    for i, square in enumerate(maps):
        received = square.mean(1).mean(1).flatten()
        np.testing.assert_allclose(done.arrays["patch_importance"][i], received, atol=1e-6)
        scale = (queries[i].shape[-1] // heads) ** -0.5 / heads
        mean = (queries[i] @ keys[i].transpose(1, 2) * scale).softmax(-1).mean(1).flatten()
        np.testing.assert_allclose(done.arrays["of_mean"][i], mean, atol=1e-6)
        x = outputs[i]
        np.testing.assert_allclose(done.arrays["patch_norm"][i], x.norm(dim=-1).flatten(), rtol=1e-5)
        pairs = normalize(x, dim=-1) @ normalize(x, dim=-1).transpose(1, 2)
        pairs.diagonal(dim1=1, dim2=2).fill_(-2)
        np.testing.assert_allclose(done.arrays["patch_similarity"][i], pairs.amax(-1).flatten(), atol=1e-5)
    np.testing.assert_allclose(done.arrays["norm_out"], last.norm(dim=-1).flatten(), rtol=1e-5)


def test_attention_of_shortened_views_is_averaged_over_what_is_left(tiny: LladaV, picture: Image.Image) -> None:
    done = encode(tiny, [picture], RAGGED + RECORD)
    first, second = done.arrays["patch_importance"].reshape(2, 5, -1)
    np.testing.assert_allclose(first.sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(np.nansum(second, -1), 1, atol=1e-5)
    left = done.features.survivors
    assert left is not None
    alive = np.zeros(second.size, bool)
    alive[torch.cat(left.alive).numpy()] = True
    np.testing.assert_array_equal(~np.isnan(second.ravel()), alive)
    assert not np.isnan(first).any()


@pytest.mark.parametrize("edit", ["none", *EDITS])
def test_flops_equal_torchs_counter(edit: str, tiny_eager: LladaV, picture: Image.Image) -> None:
    text = RECORD.split("- name: sees")[0] if edit == "none" else EDITS[edit]
    with FlopCounterMode(display=False) as counter:
        done = encode(tiny_eager, [picture], text)
    assert done.flops + done.probe_flops == counter.get_total_flops()
    if edit == "none":
        assert done.flops == tiny_eager.encode_flops(done.features)


def test_a_shorter_encoder_costs_less(tiny: LladaV, picture: Image.Image) -> None:
    full = tiny.encode_flops(plain(tiny, picture))
    costs = [encode(tiny, [picture], TOME.replace("r: 7", f"r: {r}")).flops for r in (1, 4, 8)]
    assert full > costs[0] > costs[1] > costs[2]


@pytest.mark.parametrize("edit", ["inside", "ragged", "tome", "several"])
def test_the_kernel_does_not_matter(edit: str, tiny: LladaV, tiny_eager: LladaV, picture: Image.Image) -> None:
    fast, slow = (encode(model, [picture], EDITS[edit]).features for model in (tiny, tiny_eager))
    assert fast.survivors is not None
    assert slow.survivors is not None
    torch.testing.assert_close(fast.projected, slow.projected, atol=1e-4, rtol=1e-4)
    assert torch.equal(fast.survivors.holder, slow.survivors.holder)


def test_no_square_attention_map_is_formed(tiny: LladaV, picture: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    from probe import attend

    monkeypatch.setattr(attend, "CHUNK", 4)
    patches, heads = tiny.facts.patches, tiny.vision_tower.config.num_attention_heads

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.shape == (5, heads, patches, patches):
                raise AssertionError(f"{func} made a square map")
            return result

    with Watch():
        encode(tiny, [picture], INSIDE + RECORD.split("- name: sees")[0])


# -- the embedded miniature ----------------------------------------------------------------------------------------


def test_the_miniature_reads_what_tome_left_of_a_picture() -> None:
    """A sanity limit: with few merges the trained miniature still answers; what is merged is accounted for."""
    model = load("miniature", dtype="float32")
    assert isinstance(model, LladaV)
    sample = next(pictures("world/mixed", 1))
    done = encode(model, sample.images, TOME.replace("r: 7", "r: 2"))
    prompt = model.assemble(sample.question, done.features)
    assert prompt.fate is not None
    counts = prompt.fate.bincount(minlength=6).tolist()
    merges = 2 * model.facts.encoder_layers * 5
    assert counts[Fate.MERGED] == merges
    assert counts[Fate.KEPT] == model.facts.patches * 5 - merges
