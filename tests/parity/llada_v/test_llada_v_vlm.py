"""The whole model on pictures: tower, projector, splice and language model against the original's tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from probe.backbones.anyres import Tiling
from probe.backbones.base import Features, Prompt
from probe.backbones.layout import Tiled
from probe.backbones.llada_v import LladaV
from probe.backbones.pixels import frame_views, tiled_views
from probe.backbones.sequence import lay_out
from probe.backbones.splice import Spliced, splice
from probe.site import Role

TOLERANCE = {"logits": 5e-4, "hidden_states": 5e-4, "hidden_rownorm": 5e-4, "pixel_values": 1e-6}
BATCH = ("attention_mask", "inputs_embeds", "logits_last4_valid")
Case = tuple[Path, dict[str, Any]]


def table(folder: Path) -> list[dict[str, Any]]:
    """The cases of one model's folder: a list of them, or a single one without a name."""
    for name in ("cases.json", "case.json"):
        if (folder / name).is_file():
            found = json.loads((folder / name).read_text(encoding="utf-8"))
            return list(found["cases"]) if "cases" in found else [found]
    return []


def folders(root: Path) -> Iterator[Path]:
    yield from sorted(p for p in root.glob("vlm_*") if (p / "tensors.safetensors").is_file())


def samples(root: Path) -> Iterator[tuple[str, Case]]:
    """Every single-prompt case: one picture, or the frames of a clip."""
    for folder in folders(root):
        for case in table(folder):
            if "image" in case or "frames" in case:
                yield f"{folder.name}-{case.get('name', 'image')}", (folder, case)


def named_samples(root: Path) -> Iterator[tuple[str, Any]]:
    """Every stored tensor that belongs to a named case."""
    for name, (folder, case) in samples(root):
        for key in sorted(tensors(folder)):
            owner, _, quantity = key.partition(".")
            if owner == case.get("name") and quantity != "input_ids":
                yield f"{name}-{quantity}", (folder, case, quantity)


def batches(root: Path) -> Iterator[tuple[str, Any]]:
    for folder in folders(root):
        described = [c for c in table(folder) if "image_sizes" in c]
        for key in sorted(tensors(folder)):
            owner, _, quantity = key.partition(".")
            if described and quantity == "input_attention_mask":
                sizes = next((c for c in described if owner in c.get("name", "")), described[0])["image_sizes"]
                for wanted in BATCH:
                    if f"{owner}.{wanted}" in tensors(folder):
                        yield f"{folder.name}-{owner}-{wanted}", (folder, sizes, owner, wanted)


def dense(root: Path) -> Iterator[tuple[str, Case]]:
    """Cases of which only samples and norms are stored, under names of their own."""
    for name, (folder, case) in samples(root):
        if "embeds_rownorm" in tensors(folder):
            yield name, (folder, case)


@cache
def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "tensors.safetensors")


def views_of(model: LladaV, folder: Path, case: dict[str, Any]) -> Tensor:
    assert model.geometry is not None
    if "frames" in case:
        return frame_views([Image.open(folder / f) for f in case["frames"]], model.geometry.tile)
    image = Image.open(folder / case["image"])
    return tiled_views(image, Tiling(model.geometry, *image.size))


def features_of(model: LladaV, folder: Path, case: dict[str, Any]) -> Features:
    if "frames" in case:
        return model.encode_video([Image.open(folder / f) for f in case["frames"]])
    return model.encode_images([Image.open(folder / case["image"])])


def ids_of(folder: Path, case: dict[str, Any]) -> list[int]:
    stored = tensors(folder)
    ids: list[int] = stored[f"{case['name']}.input_ids" if "name" in case else "input_ids"][0].tolist()
    return ids


@torch.no_grad()
def tower_states(model: LladaV, views: Tensor) -> Tensor:
    """Hidden states of the tower for the first view, `(layers + 1, patches, width)`: embeddings first."""
    seen: list[Tensor] = []
    first = model.encoder_layers[0].layer.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    handles = [x.layer.register_forward_hook(lambda m, a, out: seen.append(out)) for x in model.encoder_layers]
    try:
        model.vision_features(views[:1])
    finally:
        for handle in (first, *handles):
            handle.remove()
    return torch.cat(seen)


@pytest.fixture(scope="module")
def prompt_of(model_at: Any) -> Callable[..., Prompt]:
    @cache
    def once(folder: Path, which: int) -> Prompt:
        case = table(folder)[which]
        model = model_at(folder)
        return model.with_pictures(ids_of(folder, case), features_of(model, folder, case))

    return lambda folder, case: once(folder, table(folder).index(case))


@pytest.fixture(scope="module")
def observed(model_at: Any, observe: Any, prompt_of: Any) -> Callable[..., dict[str, Tensor]]:
    """One forward over a case's prompt followed by some mask embeddings, computed once."""

    @cache
    def once(folder: Path, which: int, masks: int, rows: int) -> dict[str, Tensor]:
        model, case = model_at(folder), table(folder)[which]
        tail = model.embed(torch.full((masks,), model.special.mask))
        embeds = torch.cat([prompt_of(folder, case).embeds, tail])[None]
        return dict(observe(model, {"inputs_embeds": embeds}, rows))

    return lambda folder, case, masks, rows: once(folder, table(folder).index(case), masks, rows)


@pytest.mark.cases("llada_v", samples)
def test_layout(case: Any, model_at: Any, prompt_of: Any) -> None:
    """Where visual tokens and newlines stand in the sequence, and what every position is said to be."""
    folder, sample = case
    model = model_at(folder)
    prompt = prompt_of(folder, sample)
    start, count = sample["visual_start"], sample["n_visual_tokens"]
    seen = prompt.visual >= 0
    assert prompt.n_visual == count
    assert prompt.visual[start : start + count].tolist() == list(range(count))
    assert int(seen.sum()) == count
    assert (prompt.role == Role.NEWLINE).nonzero().flatten().tolist() == sample["newline_positions_in_sequence"]
    assert (prompt.role[:start] == Role.SYSTEM).all()
    assert (prompt.role[start + count :] == Role.QUESTION).all()
    assert prompt.box.isnan().all(-1).equal((prompt.role == Role.NEWLINE)[seen])
    if "total_prompt_length" in sample:
        assert prompt.ids.shape[0] == sample["total_prompt_length"]
    if "grid_wh" in sample:
        tiling = Tiling(model.geometry, *sample["size_wh"])
        assert list(tiling.grid) == sample["grid_wh"]
        assert tiling.views == sample["tiles"]


@pytest.mark.cases("llada_v", samples)
def test_pixels(case: Any, model_at: Any, check_views: Any) -> None:
    folder, sample = case
    if "pixel" not in sample:
        pytest.skip("no pixel statistics")
    check_views(views_of(model_at(folder), folder, sample), sample["pixel"])


@pytest.mark.cases("llada_v", named_samples)
def test_tensors(case: Any, model_at: Any, prompt_of: Any, observed: Any, near: Any) -> None:
    folder, sample, quantity = case
    want, model = tensors(folder)[f"{sample['name']}.{quantity}"], model_at(folder)
    if quantity == "pixel_values":
        got = views_of(model, folder, sample).reshape(want.shape)
    elif quantity == "vision_hidden_states_tile0":
        got = tower_states(model, views_of(model, folder, sample))
    elif quantity == "vision_features":
        got = model.vision_features(views_of(model, folder, sample))
    elif quantity == "projected":
        got = features_of(model, folder, sample).projected
    elif quantity == "inputs_embeds":
        got = prompt_of(folder, sample).embeds[None]
    else:
        forward = observed(folder, sample, 0, 16)
        found = {
            "logits": lambda: forward["logits"][:, -want.shape[1] :],
            "hidden_states": lambda: forward["hidden_states"],
            "hidden_rownorm": lambda: forward["hidden_states"].norm(dim=-1),
            "attention_last_rows": lambda: forward["attentions"][..., -want.shape[-2] :, :],
        }
        assert quantity in found, f"nothing is known of the quantity {quantity}"
        got = found[quantity]()
    near(got, want, TOLERANCE.get(quantity, 1e-5))


@pytest.fixture(scope="module")
def batch_of(model_at: Any) -> Callable[..., Spliced]:
    """A padded batch: row i holds a picture of the i-th size, made of the first row's picture's views."""

    @cache
    def once(folder: Path, sizes: tuple[tuple[int, int], ...], owner: str) -> Spliced:
        model, stored = model_at(folder), tensors(folder)
        pictures = [c for c in table(folder) if "image" in c]
        source = next((c for c in pictures if tuple(c["size_wh"]) == sizes[0]), pictures[0])
        views, features = views_of(model, folder, source), []
        for size in sizes:
            layout = Tiled(Tiling(model.geometry, *size))
            features += lay_out([layout], model.encode_views(views[: layout.views]), model.image_newline)
        side = "left" if owner.endswith("left") else "right"
        ids, mask = stored[f"{owner}.input_ids"], stored[f"{owner}.input_attention_mask"]
        return splice(ids, mask, features, model.embed, side=side, limit=model.max_length)

    return lambda folder, sizes, owner: once(folder, tuple(map(tuple, sizes)), owner)


@pytest.mark.cases("llada_v", batches, optional=True)
@torch.no_grad()
def test_batch(case: Any, model_at: Any, batch_of: Any, near: Any) -> None:
    folder, sizes, owner, quantity = case
    model, want = model_at(folder), tensors(folder)[f"{owner}.{quantity}"]
    batch = batch_of(folder, sizes, owner)
    if quantity == "attention_mask":
        assert batch.mask.equal(want.bool())
    elif quantity == "inputs_embeds":
        near(batch.embeds, want, 1e-5)
    else:
        logits = model.head(model.lm(inputs_embeds=batch.embeds, attention_mask=batch.mask).last_hidden_state)
        rows = [row[real][-want.shape[1] :] for row, real in zip(logits, batch.mask, strict=True)]
        near(torch.stack(rows), want, 5e-4)


@pytest.mark.cases("llada_v", dense, optional=True)
def test_prompt_of_a_large_case(case: Any, model_at: Any, prompt_of: Any, near: Any) -> None:
    folder, sample = case
    stored, embeds = tensors(folder), prompt_of(folder, sample).embeds
    near(embeds.norm(dim=-1), stored["embeds_rownorm"], 1e-4)
    near(embeds.sum(-1), stored["embeds_rowsum"], 1e-4)
    near(embeds[stored["sample_positions"]], stored["embeds_at_samples"], 1e-5)


@pytest.mark.cases("llada_v", dense, optional=True)
def test_tower_of_a_large_case(case: Any, model_at: Any, near: Any) -> None:
    folder, sample = case
    stored, model = tensors(folder), model_at(folder)
    features = model.vision_features(views_of(model, folder, sample))
    near(features.norm(dim=-1), stored["vision_features_rownorm"], 1e-4)
    rows = stored.get("vision_features_tile0_first_last")
    if rows is not None:
        near(features[0, 0], rows[0], 1e-5)
        near(features[0, -1], rows[-1], 1e-5)
        apart = (rows[:, None] - features[0]).abs().amax(-1).amin(1)  # the others are patches of the same view
        assert (apart < 1e-5).all()


@pytest.mark.cases("llada_v", dense, optional=True)
def test_first_step_of_a_large_case(case: Any, observed: Any, prompt_of: Any, near: Any) -> None:
    """The prompt followed by mask embeddings, through the language model."""
    folder, sample = case
    masks, stored = sample["generate_args"]["gen_length"], tensors(folder)
    forward = observed(folder, sample, masks, masks)
    hidden, rows = forward["hidden_states"][:, 0], forward["attentions"][:, 0]
    seen = torch.zeros(hidden.shape[1], dtype=torch.bool)
    seen[sample["visual_start"] : sample["visual_start"] + sample["n_visual_tokens"]] = True
    found = {
        "hidden_rownorm": (hidden.norm(dim=-1), 5e-4),
        "hidden_at_gen": (hidden[:, -masks:], 5e-4),
        "logits_at_gen": (forward["logits"][0, -masks:], 5e-4),
        "attn_gen_rows_head_mean": (rows.mean(1), 1e-5),
        "attn_gen_rows_visual_mass": (rows[..., seen].sum(-1), 1e-5),
    }
    compared = [name for name in found if f"step0.{name}" in stored]
    assert compared
    for name in compared:
        near(found[name][0], stored[f"step0.{name}"], found[name][1])
