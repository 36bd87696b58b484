"""Tower, projector, positions, masks, language model and cache against the original's tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from dimple_examples import Frozen, batch_of, features_of, given, model_in, pictures, prompts_of, run
from safetensors.torch import load_file
from torch import Tensor

from probe.attend import RowRequest, ask, forget
from probe.backbones.dimple_modules import windows
from probe.backbones.dimple_pixels import patches_of
from probe.backbones.splice import IMAGE
from probe.site import Role

CORE, ATTENTION, VISION, PIXELS = 5e-4, 1e-5, 1e-5, 1e-6
INPUTS = {"input_ids", "attention_mask", "image_grid_thw", "query_rows", "full_input_ids", "full_attention_mask"}
INFORMATIONAL = {"eager_attention_vs_recorded_max_abs_diff"}


def examples(root: Path) -> Iterator[tuple[str, Any]]:
    for name in sorted({key.split(".")[0] for key in load_file(root / "forward.safetensors")}):
        yield name, (root, name)


def pictured(root: Path) -> Iterator[tuple[str, Any]]:
    stored = load_file(root / "forward.safetensors")
    yield from ((n, c) for n, c in examples(root) if f"{n}.image_grid_thw" in stored)


def quantities(root: Path) -> Iterator[tuple[str, Any]]:
    """Every expected tensor of every example."""
    for key in sorted(load_file(root / "forward.safetensors")):
        example, quantity = key.split(".", 1)
        given = quantity in INPUTS | INFORMATIONAL or quantity.startswith("image") or quantity.endswith(".input_ids")
        if not given or quantity == "image_grid_thw":
            yield key, (root, example, quantity)


@pytest.fixture(scope="module")
def forward() -> Callable[..., dict[str, Any]]:
    """One eager forward over prompt and masks, with hooks on the adapter's modules."""

    @cache
    def once(root: Path, example: str) -> dict[str, Any]:
        model, told = model_in(root), given(root, example)
        batch = batch_of(root, example, told["full_input_ids"][:, told["input_ids"].shape[1] :])
        hidden: list[Tensor] = []
        weights: list[Tensor] = []
        handles = [x.layer.register_forward_pre_hook(lambda m, args: hidden.append(args[0])) for x in model.layers]
        handles += [
            x.attention.register_forward_hook(lambda m, args, out: weights.append(out[1])) for x in model.layers
        ]
        try:
            last = run(model, batch)
        finally:
            for handle in handles:
                handle.remove()
        return {"batch": batch, "hidden": [*hidden, last], "weights": weights, "logits": model.head(last)}

    return once


@pytest.mark.cases("dimple", quantities)
@torch.no_grad()
def test_dimple_tensor(case: Any, forward: Any, near: Any) -> None:
    root, example, quantity = case
    told, model = given(root, example), model_in(root)
    want, (base, _, index) = told[quantity], quantity.partition(".")
    if quantity in ("image_grid_thw", "pixel_values", "pixel_values_every5th_row_first49"):
        pixels, grid = patches_of(pictures(root, example), model.preprocessing)
        if quantity == "image_grid_thw":
            assert grid.equal(want)
        else:
            near(pixels[::5, :49] if quantity.endswith("first49") else pixels, want, PIXELS)
    elif quantity in ("window_index", "cu_window_seqlens"):
        order, ends = windows(model.visual.config, told["image_grid_thw"])
        got = order if quantity == "window_index" else ends
        assert got.tolist() == (want if quantity == "window_index" else want.unique()).tolist()  # no empty windows
    elif quantity == "visual_features":
        near(model.vision_features(*patches_of(pictures(root, example), model.preprocessing)), want, VISION)
    elif quantity == "projected":
        near(features_of(root, example).projected[0], want, VISION)
    elif base == "cached":
        check_cached(root, example, index, near)
    elif quantity == "causal_logits":
        causal, batch = model_in(root, full_attn_mask=False), forward(root, example)["batch"]
        assert causal.causal and not model.causal
        padded = None if bool(batch.real.all()) else batch.real
        got = causal.head(run(causal, batch, mask=padded))
        near(got[:, -want.shape[1] :][batch.real[:, -want.shape[1] :]], want[batch.real[:, -want.shape[1] :]], CORE)
    else:
        seen = forward(root, example)
        position = seen["batch"].position
        got = {
            "position_ids": lambda: model.position_ids(position),
            "rope_deltas": lambda: position.amax((1, 2))[:, None] + 1 - position.shape[1],
            "logits": lambda: seen["logits"][:, -want.shape[1] :],
            "hidden_states": lambda: seen["hidden"][int(index)][:, -want.shape[1] :],
            "attentions": lambda: seen["weights"][int(index)],
            "attention_rows": lambda: torch.stack([w[:, :, told["query_rows"]] for w in seen["weights"]]),
        }
        assert base in got, f"nothing is known of the quantity {quantity}"
        near(got[base](), want, ATTENTION if base.startswith("attention") else CORE)


def check_cached(root: Path, example: str, quantity: str, near: Any) -> None:
    """A second pass over the last prompt token and the answer, on keys that a pass over masks left behind."""
    told, model = given(root, example), model_in(root)
    ids, length = told["cached.input_ids"], told["input_ids"].shape[1]
    batch = batch_of(root, example, ids[:, 1:])
    if quantity == "position_ids":
        assert model.position_ids(batch.position[:, length - 1 :]).equal(told["cached.position_ids"])
        return
    if quantity == "exact_recompute_logits":
        got = model.head(run(model, batch))[:, length - 1 :]
    else:
        frozen = Frozen()
        run(model, batch_of(root, example, told["full_input_ids"][:, length:]), cache=frozen)
        frozen.length = length - 1
        got = model.head(run(model, batch, first=length - 1, cache=frozen))
    near(got, told[f"cached.{quantity}"], CORE)


@pytest.mark.cases("dimple", examples)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dimple_kernels_and_requested_rows(case: Any, attention: str, forward: Any, near: Any) -> None:
    """Every kernel gives the same hidden states, and the rows that are asked for beside it."""
    root, example = case
    want, model = forward(root, example), model_in(root, attention)
    batch = want["batch"]
    rows = torch.arange(batch.embeds.shape[1]).expand(batch.embeds.shape[0], -1)
    got: list[list[Tensor]] = [[] for _ in model.layers]
    for layer, found in zip(model.layers, got, strict=True):
        ask(layer.attention, [RowRequest(rows, "softmax", lambda weights, first, found=found: found.append(weights))])
    try:
        last = run(model, batch)
    finally:
        for layer in model.layers:
            forget(layer.attention)
    near(last, want["hidden"][-1], CORE)
    for found, weights in zip(got, want["weights"], strict=True):
        near(torch.cat(found, 2), weights, ATTENTION)


@pytest.mark.cases("dimple", examples)
def test_dimple_masking_keys_is_the_published_mask_at_real_positions(case: Any, forward: Any, near: Any) -> None:
    root, example = case
    want, model = forward(root, example), model_in(root)
    batch = want["batch"]
    near(run(model, batch, mask=batch.real)[batch.real], want["hidden"][-1][batch.real], CORE)


@pytest.mark.cases("dimple", examples)
def test_dimple_batch_is_each_sample_alone(case: Any, forward: Any, near: Any) -> None:
    """Padded on the right, as here, or on the left, as published: each sample has its own result."""
    root, example = case
    want, model = forward(root, example), model_in(root)
    batch = want["batch"]
    width = batch.embeds.shape[1]
    extra = width - batch.prompt_length
    own = [torch.cat([b[r], b[~r]]) for b, r in zip(batch.embeds, batch.real, strict=True)]
    at = [torch.cat([p[r], p[~r]]) for p, r in zip(batch.position, batch.real, strict=True)]
    keep = torch.arange(width) < batch.real.sum(1)[:, None]
    got = model.lm(
        inputs_embeds=torch.stack(own), position_ids=model.position_ids(torch.stack(at)), attention_mask=keep
    ).last_hidden_state
    for b, prompt in enumerate(batch.prompts):
        length = prompt.ids.shape[0] + extra
        near(got[b, :length], want["hidden"][-1][b, width - length :], CORE)


@pytest.mark.cases("dimple", examples)
def test_dimple_rotary_is_what_the_layers_take(case: Any, forward: Any) -> None:
    root, example = case
    model, batch = model_in(root), forward(root, example)["batch"]
    seen: list[Any] = []
    handle = model.layers[0].layer.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["position_embeddings"]), with_kwargs=True
    )
    run(model, batch)
    handle.remove()
    for got, want in zip(model.rotary(batch.embeds, batch.position), seen[0], strict=True):
        assert got.equal(want)
        assert got.shape == (*batch.embeds.shape[:2], model.layers[0].attention.head_dim)


@pytest.mark.cases("dimple", pictured)
def test_dimple_roles_and_boxes(
    case: Any,
) -> None:
    root, example = case
    sizes = [image.size for image in pictures(root, example)]
    rule = model_in(root).preprocessing
    found = [p for p in prompts_of(root, example) if p.n_visual]
    assert sum(p.n_visual for p in found) == sum(rule.count(*size) for size in sizes)
    for prompt in found:
        seen = prompt.visual >= 0
        assert prompt.visual[seen].tolist() == list(range(prompt.n_visual))
        assert (prompt.ids[seen] == IMAGE).all() and (prompt.ids[~seen] >= 0).all()
        assert (prompt.role[seen] == Role.VISUAL).all()
        first = int(seen.nonzero()[0])
        assert (prompt.role[:first] == Role.SYSTEM).all()
        assert (prompt.role[first:][~seen[first:]] == Role.QUESTION).all()
        for picture in prompt.picture.unique():
            own = prompt.picture == picture
            rows, columns = rule.grid(*sizes[int(picture)])
            box, position = prompt.box[own].view(rows, columns, 4), prompt.position[seen][own].view(rows, columns, 3)
            area = (box[..., 2] - box[..., 0]) * (box[..., 3] - box[..., 1])
            torch.testing.assert_close(area.sum(), torch.tensor(1.0))
            assert (position - position[0, 0]).tolist() == [[[0, r, c] for c in range(columns)] for r in range(rows)]
            assert (box[0, :, 1] == 0).all() and (box[-1, :, 3] == 1).all()
            assert box[0, :-1, 2].equal(box[0, 1:, 0]) and box[:-1, 0, 3].equal(box[1:, 0, 1])
