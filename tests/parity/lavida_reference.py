"""What the two LaViDa sets have in common: finding their cases, and running a model the way the original ran."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from probe.attend import RowRequest, ask, forget
from probe.backbones import load
from probe.backbones.anyres import Tiling
from probe.backbones.base import Features, Prompt
from probe.backbones.lavida import Lavida
from probe.backbones.layout import Tiled, pool
from probe.backbones.pixels import tiled_views
from probe.canvas import make_canvas
from probe.compile import ProbeTable
from probe.decoding.caching import PrefixLM
from probe.decoding.draw import Draw
from probe.loop import Finished, Rule, Step, denoise
from probe.site import Phase, Role
from probe.tracer import Tracer

TOLERANCE = {"logits": 2e-4, "hidden": 2e-4, "attention": 1e-5, "vision": 1e-4, "embeds": 1e-4, "keys": 2e-5}
KERNELS = ("sdpa", "eager")
LOGITS = ("shifted_logits_answer", "logits_answer")


@cache
def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@cache
def tensors(path: Path) -> dict[str, Tensor]:
    return load_file(path)


@cache
def model_of(folder: Path, kernel: str = "sdpa") -> Lavida:
    model = load(folder, attention=kernel, dtype=torch.float32)
    assert isinstance(model, Lavida)
    return model


class PrefixStore:
    """A cache by duck typing: it keeps what the first forward writes, then puts that before what others bring."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.written = False

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.written:
            self.kept[layer_idx] = key, value
            return key, value
        first, second = self.kept[layer_idx]
        return torch.cat([first, key], 2), torch.cat([second, value], 2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.kept[layer_idx][0].shape[2] if self.kept else 0


@torch.no_grad()
def forward(model: Lavida, embeds: Tensor, rows: Tensor | None = None, **arguments: Any) -> dict[str, Tensor]:
    """`logits`, `hidden_states (layer + 1, ...)` and `attentions (layer, ...)` of some rows (default: all).

    Attention rows come beside the kernel, as probes ask for them, so they hold for every kernel.
    """
    rows = torch.arange(embeds.shape[1]) if rows is None else rows
    hidden: list[Tensor] = [embeds]
    maps: list[list[Tensor]] = [[] for _ in model.layers]
    handles = [x.layer.register_forward_hook(lambda m, a, out: hidden.append(out)) for x in model.layers]
    for layer, chunks in zip(model.layers, maps, strict=True):
        ask(layer.attention, [RowRequest(rows[None], "softmax", lambda w, first, c=chunks: c.append(w))])
    try:
        last = model.lm(inputs_embeds=embeds, **arguments).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
        for layer in model.layers:
            forget(layer.attention)
    hidden[-1] = last  # the original shows the last layer after the final norm
    attentions = torch.stack([torch.cat(chunks, 2) for chunks in maps])
    return {"logits": model.head(last), "hidden_states": torch.stack(hidden), "attentions": attentions}


@torch.no_grad()
def prefill(model: Lavida, embeds: Tensor) -> tuple[Tensor, PrefixStore]:
    """Logits of a prefix alone, and its keys and values."""
    store = PrefixStore()
    logits = model.head(model.lm(inputs_embeds=embeds, past_key_values=store).last_hidden_state)
    store.written = True
    return logits, store


def rotate(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = keys.shape[-1] // 2
    turned = torch.cat([-keys[..., half:], keys[..., :half]], -1)
    return keys * cos[:, None] + turned * sin[:, None]


INPUTS = ("input_ids", "suffix.input_ids", "kept_index")
OF_THE_ORIGINAL = ("attention_mask_ignored.max_abs_diff",)
"""Quantities that say something of the original alone: what it does with a mask that ours is never given."""


def forward_cases(root: Path) -> Iterator[tuple[str, Any]]:
    """Every quantity of `forward.safetensors` under every kernel; a layer's number belongs to the quantity."""
    path = root / "forward.safetensors"
    for quantity in sorted({re.sub(r"\.\d+$", "", key) for key in tensors(path)}):
        if quantity not in (*INPUTS, *OF_THE_ORIGINAL):
            for kernel in KERNELS:
                yield f"{quantity}-{kernel}", (root, quantity, kernel)


def check_forward(case: tuple[Path, str, str]) -> tuple[Tensor, Tensor, str]:
    """What we get, what the original gave, and which tolerance applies."""
    root, quantity, kernel = case
    stored, model = tensors(root / "forward.safetensors"), model_of(root, kernel)
    want = stored.get(quantity)
    if want is None:
        numbered = [k for k in stored if re.fullmatch(re.escape(quantity) + r"\.\d+", k)]
        want = torch.stack([stored[f"{quantity}.{i}"] for i in range(len(numbered))])
    embeds = model.embed(stored["input_ids"])
    if quantity == "inputs_embeds":
        return embeds, want, "embeds"
    if quantity in ("logits", "hidden_states", "attentions"):
        kind = {"hidden_states": "hidden", "attentions": "attention"}.get(quantity, "logits")
        return forward(model, embeds)[quantity], want, kind
    if quantity.startswith("kept."):
        kept = stored["kept_index"]
        positions = kept if "original" in quantity else torch.arange(len(kept))
        return forward(model, embeds[:, kept], position_ids=positions[None])["logits"], want, "logits"
    length = stored["prefix.logits"].shape[1]
    logits, store = prefill(model, embeds[:, :length])
    if quantity == "prefix.logits":
        return logits, want, "logits"
    if quantity.startswith("prefix."):
        kept = torch.stack([store.kept[i][int("value" in quantity)] for i in range(len(store.kept))])
        if quantity == "prefix.key_before_rope":
            cos, sin = model.rotary(embeds, torch.arange(length)[None])
            want = torch.stack([rotate(key, cos, sin) for key in want])
        return kept, want, "keys"
    if quantity.startswith("suffix."):
        suffix = model.embed(stored["suffix.input_ids"])
        positions = length + torch.arange(suffix.shape[1])
        found = forward(model, suffix, position_ids=positions[None], past_key_values=store)
        name = quantity.removeprefix("suffix.")
        return found[name], want, "attention" if name == "attentions" else "logits"
    raise AssertionError(f"nothing is known of the quantity {quantity}")


def image_of(root: Path, told: dict[str, Any]) -> Image.Image:
    """A fixture's picture: stored small, every pixel enlarged."""
    blocks = tensors(root / "vision.safetensors")[f"{told['name']}.image_blocks_uint8"]
    side = told["block"]
    return Image.fromarray(blocks.repeat_interleave(side, 0).repeat_interleave(side, 1).numpy(), "RGB")


def images(root: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read_json(root / "generate_vision.json")["images"]
    return found


def image_cases(root: Path) -> Iterator[tuple[str, Any]]:
    for told in images(root):
        yield told["name"], (root, told)


def vision_cases(root: Path) -> Iterator[tuple[str, Any]]:
    """Every stored quantity of every picture."""
    stored = tensors(root / "vision.safetensors")
    for told in images(root):
        for key in sorted(stored):
            name, _, quantity = key.partition(".")
            inputs = ("image_blocks_uint8", "grid24", "input_ids", "query_rows")
            if name == told["name"] and quantity not in inputs:
                yield key.replace(".", "-"), (root, told, quantity)


@cache
def encoded(root: Path, name: str) -> tuple[Tensor, Features]:
    """The exact input that the original's tower met, and what our encoder makes of it."""
    told = next(t for t in images(root) if t["name"] == name)
    model, grid = model_of(root), tensors(root / "vision.safetensors")[f"{name}.grid24"]
    assert model.geometry is not None
    side = model.geometry.tile // grid.shape[-1]
    views = grid.repeat_interleave(side, 2).repeat_interleave(side, 3)
    tiling = Tiling(model.geometry, *told["size_wh"])
    assert views.shape[0] == tiling.views
    return views, Features(model.encode_views(views), (Tiled(tiling),))


@cache
def observed(root: Path, name: str, kernel: str) -> dict[str, Tensor]:
    model, stored = model_of(root, kernel), tensors(root / "vision.safetensors")
    ids, rows = stored[f"{name}.input_ids"][0].tolist(), stored[f"{name}.query_rows"]
    prompt = model_of(root).with_pictures(ids, encoded(root, name)[1])
    found = forward(model, prompt.embeds[None], rows)
    return {
        "inputs_embeds": prompt.embeds[None],
        "expanded_ids": prompt.ids[None],
        "logits_rows": found["logits"][0, rows],
        "last_hidden_rows": found["hidden_states"][-1][0, rows],
        "attention_rows": found["attentions"][:, 0],
    }


def check_vision(case: tuple[Path, dict[str, Any], str], kernel: str) -> tuple[Tensor, Tensor, float]:
    """What we get, what the original gave, and the tolerance."""
    root, told, quantity = case
    name = told["name"]
    model, want = model_of(root), tensors(root / "vision.safetensors")[f"{name}.{quantity}"]
    if quantity.startswith("pixel_values"):
        assert model.geometry is not None
        views = tiled_views(image_of(root, told), Tiling(model.geometry, *told["size_wh"]))
        found = {
            "pixel_values_sub16": lambda: views[:, :, ::16, ::16],
            "pixel_values_row200": lambda: views[:, :, 200],
            "pixel_values_mean_std": lambda: torch.stack([views.mean((2, 3)), views.std((2, 3))]),
        }
        assert quantity in found, f"nothing is known of the quantity {quantity}"
        return found[quantity](), want, 1e-5
    if quantity in ("tower_features_view0", "projected_view0", "pooled"):
        views, features = encoded(root, name)
        if quantity == "tower_features_view0":
            return model.vision_features(views[:1])[0], want, TOLERANCE["vision"]
        if quantity == "projected_view0":
            return features.projected[0], want, TOLERANCE["vision"]
        return pool(features.projected, model._geometry()), want, TOLERANCE["vision"]
    kinds = {
        "inputs_embeds": TOLERANCE["embeds"],
        "expanded_ids": 0.0,
        "logits_rows": TOLERANCE["logits"],
        "last_hidden_rows": TOLERANCE["hidden"],
        "attention_rows": TOLERANCE["attention"],
    }
    assert quantity in kinds, f"nothing is known of the quantity {quantity}"
    return observed(root, name, kernel)[quantity], want, kinds[quantity]


def check_roles(case: tuple[Path, dict[str, Any]]) -> None:
    """Where the picture's tokens stand in the sequence, and what every position is said to be."""
    root, told = case
    model, stored = model_of(root), tensors(root / "vision.safetensors")
    features = encoded(root, told["name"])[1]
    prompt = model.with_pictures(stored[f"{told['name']}.input_ids"][0].tolist(), features)
    count, before, after = told["visual_tokens"], told["prompt_tokens_before"], told["prompt_tokens_after"]
    tiling = Tiling(model._geometry(), *told["size_wh"])
    assert (tiling.views, tiling.count, prompt.n_visual) == (told["views"], count, count)
    assert prompt.ids.shape[0] == before + count + after
    assert (prompt.role[:before] == Role.SYSTEM).all()
    assert (prompt.role[before + count :] == Role.QUESTION).all()
    assert prompt.visual[before : before + count].tolist() == list(range(count))
    newline = (prompt.role == Role.NEWLINE)[before : before + count]
    assert int(newline.sum()) == tiling.shape[0]
    assert prompt.box.isnan().all(-1).equal(newline)
    assert prompt.embeds[before : before + count][newline].equal(model.image_newline.expand(tiling.shape[0], -1))
    assert int(prompt.view.max()) == told["views"] - 1


def check_weights(root: Path) -> None:
    """Every stored tensor is one of the model's own, under the published name, unchanged."""
    model, stored, config = model_of(root), load_file(root / "model.safetensors"), read_json(root / "config.json")
    own = {model.published_name(name, config): value for name, value in model.state_dict().items()}
    assert own.keys() == stored.keys()
    assert all(own[key].equal(value) for key, value in stored.items())


@torch.inference_mode()
def decode(model: Lavida, prompt: Prompt, rule: Rule, seed: int | None) -> tuple[list[Step], Finished]:
    """Every pass of one generation; noise comes from one generator, as it did from the original's."""
    canvas = make_canvas([prompt], model.embed(torch.tensor(rule.mask_id)), rule.gen_length)
    generator = torch.Generator()
    generator.manual_seed(seed or 0)
    tracer = Tracer(model, ProbeTable(()), canvas, seeds=[0])
    *steps, finished = denoise(canvas, tracer, rule, model.embed, [Draw(generator)])
    assert isinstance(finished, Finished)
    return steps, finished  # type: ignore[return-value]


def text_prompt(root: Path) -> Prompt:
    return model_of(root).without_pictures(read_json(root / "generate_text.json")["prompt_ids"][0], 0)


def picture_prompt(root: Path, name: str) -> Prompt:
    ids = tensors(root / "vision.safetensors")[f"{name}.input_ids"][0].tolist()
    return model_of(root).with_pictures(ids, encoded(root, name)[1])


def generations(root: Path) -> Iterator[tuple[str, Any]]:
    """Every sampler case, on text and on pictures: the prompt's picture (or none), and the case."""
    for case in read_json(root / "generate_text.json")["cases"]:
        yield case["name"], (root, None, case)
    for told in images(root):
        for case in told["cases"]:
            yield f"{told['name']}-{case['name']}", (root, told["name"], case)


def answers(want: dict[str, Any], length: int) -> tuple[list[list[int]], list[list[list[int]]]]:
    """The answer's tokens before the first step and after every one; the original may show the prompt before them."""
    initial = want.get("initial_answer_tokens", want.get("initial_tokens"))
    history = want.get("history_answer_tokens", want.get("history"))
    assert initial is not None and history is not None
    return [row[-length:] for row in initial], [[row[-length:] for row in rows] for rows in history]


def check_generation(root: Path, picture: str | None, case: dict[str, Any], rule: Rule) -> None:
    """Every step: what was masked before it, what it committed, the logits it decided from; and the answer."""
    want = case.get("expected", case)
    model = model_of(root)
    prompt = text_prompt(root) if picture is None else picture_prompt(root, picture)
    steps, finished = decode(model, prompt, rule, case.get("torch_seed"))
    before, history = answers(want, rule.gen_length)
    assert (steps[0].clock.phase is Phase.PREFILL) == isinstance(rule.caching, PrefixLM)
    if isinstance(rule.caching, PrefixLM):
        prefill = steps.pop(0)
        assert prefill.tokens.tolist() == before
        assert int(prefill.committed.sum()) == model.shift
    assert len(steps) == len(history) == want.get("nfe_steps", len(history))
    if "tokens_committed_per_step" in want:
        changed = [[old != new for old, new in zip(a[0], b[0], strict=True)] for a, b in pairwise([before, *history])]
        assert [sum(step) for step in changed] == want["tokens_committed_per_step"]
    stored = None
    if picture is None:
        logits = tensors(root / "generate_text_logits.safetensors")
        stored = next((logits[f"{case['name']}.{k}"] for k in LOGITS if f"{case['name']}.{k}" in logits), None)
    for i, (step, tokens) in enumerate(zip(steps, history, strict=True)):
        assert step.masked_before == [[s for s, t in enumerate(before[0]) if t == rule.mask_id]]
        assert step.tokens.tolist() == tokens
        if stored is not None:
            torch.testing.assert_close(step.logits, stored[i][:, step.slots], atol=TOLERANCE["logits"], rtol=1e-5)
        before = tokens
    assert finished.output == before == answers(want, rule.gen_length)[1][-1]
