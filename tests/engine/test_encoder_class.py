"""An encoder with a class token: CLIP in LLaVA-NeXT. Who looks, who stays, and ToMe's halves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoder_probes import EDITS, HEADER, RECORD, encode, plain
from PIL import Image
from tiny_autoregressive import write_llava_next
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode

from probe.backbones import facts_of, load
from probe.backbones.llava_next import LlavaNext
from probe.compile import compile_recipe
from probe.encoder import encode_with_probes
from probe.errors import ProbeError
from probe.recipe import load_recipe, parse_recipe
from probe.site import Fate

PATCHES = 16
CLS = """
- name: prune
  at: {site: encoder.output}
  score: {attention: {queries: cls}}
  select: {top_k: {keep: 5}}
  do: drop
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llava_next(tmp_path_factory.mktemp("next"))


@pytest.fixture(scope="module")
def model(folder: Path) -> LlavaNext:
    return load(folder)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.effect_noise((80, 60), 90).convert("RGB")


def inputs(model: LlavaNext, picture: Image.Image) -> Tensor:
    """What CLIP's first layer is given: `(view, 1 + patches, width)`."""
    seen: list[Tensor] = []
    handle = model.encoder_layers[0].layer.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model.encode_images([picture])
    handle.remove()
    return seen[0]


def test_facts_say_what_the_encoder_has(model: LlavaNext, folder: Path) -> None:
    assert model.facts.class_token
    assert model.facts.patches == facts_of(folder).patches == PATCHES


def test_untouched_is_bit_for_bit_and_counted_as_torch_does(folder: Path, picture: Image.Image) -> None:
    model = load(folder, attention="eager")
    watched = encode(model, [picture], RECORD)
    assert torch.equal(watched.features.projected, plain(model, picture).projected)
    assert watched.arrays["encoder_tokens"].tolist() == [[PATCHES] * len(watched.features.projected)] * 2
    everything = encode(model, [picture], CLS.replace("keep: 5", "keep: 1.0"))
    assert torch.equal(everything.features.projected, plain(model, picture).projected)
    for edit in (*EDITS.values(), CLS):
        text = edit.replace("keep: [0.75, 0.5]", "keep: [0.75, 0.5]").replace("r: 7", "r: 3")
        with FlopCounterMode(display=False) as counter:
            done = encode(model, [picture], text)
        assert done.flops + done.probe_flops == counter.get_total_flops()


@torch.inference_mode()
def test_the_class_token_looks(model: LlavaNext, picture: Image.Image) -> None:
    record = "- {at: {site: encoder.layer.attention, layers: all}, record: [{patch_importance: {queries: cls}}]}\n"
    done = encode(model, [picture], CLS + record)
    x, layers = inputs(model, picture), model.encoder_layers
    x = layers[0].layer(x, attention_mask=None)
    y, attention = layers[1].layer.layer_norm1(x), layers[1].attention
    heads = attention.num_heads
    q, k = (f(y).unflatten(-1, (heads, -1)).transpose(1, 2) for f in (attention.q_proj, attention.k_proj))
    received = (q[:, :, :1] @ k.transpose(2, 3) * attention.scale).softmax(-1)[:, :, 0].mean(1)[:, 1:]
    np.testing.assert_allclose(done.arrays["patch_importance"][-1].reshape(received.shape), received, atol=1e-6)
    left = done.features.survivors
    assert left is not None
    for v, alive in enumerate(left.alive):
        best = received[v].topk(5).indices.sort().values
        assert (alive - v * PATCHES).tolist() == best.tolist()
    prompt = model.assemble("what?", done.features)
    assert int((prompt.visual >= 0).sum()) == 5 * len(left.alive)


@torch.inference_mode()
def test_tome_counts_the_class_token_in_its_even_half(model: LlavaNext, picture: Image.Image) -> None:
    r = 3
    done = encode_with_probes(model, [picture], compile_recipe(load_recipe("prune/tome", [f"r={r}"]), model.facts))
    expected = []
    for row in inputs(model, picture):
        x, size = row, torch.ones(row.shape[0])
        for modules in model.encoder_layers:
            layer, attention = modules.layer, modules.attention
            y, heads = layer.layer_norm1(x), attention.num_heads
            q, k, v = (f(y).view(len(x), heads, -1) for f in (attention.q_proj, attention.k_proj, attention.v_proj))
            weights = (torch.einsum("qhc,khc->hqk", q, k) * attention.scale + size.log()).softmax(-1)
            x = x + attention.out_proj(torch.einsum("hqk,khc->qhc", weights, v).flatten(1))
            x, size = merged(x, size, normalize(k.mean(1), dim=-1), r)
            x = x + layer.mlp(layer.layer_norm2(x))
        expected.append(model.projector(x[1:]))
    torch.testing.assert_close(done.features.projected, torch.stack(expected), atol=1e-5, rtol=1e-4)
    left = done.features.survivors
    assert left is not None
    assert left.size[torch.cat(left.alive)].sum() == PATCHES * len(left.alive), "no patch went into the class token"


def merged(x: Tensor, size: Tensor, unit: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """One merge as ToMe has it: the class token is row 0 of the even half and joins nobody; unmerged tokens first."""
    even, odd = list(range(0, len(x), 2)), list(range(1, len(x), 2))
    best = {a: max(odd, key=lambda b, a=a: float(unit[a] @ unit[b])) for a in even[1:]}
    heavy = sorted(best, key=lambda a: -float(unit[a] @ unit[best[a]]))[:r]
    order = [a for a in even if a not in heavy] + odd
    groups = [[b, *(a for a in heavy if best[a] == b)] for b in order]
    sizes = torch.stack([size[g].sum() for g in groups])
    return torch.stack([(x[g] * size[g, None]).sum(0) / size[g].sum() for g in groups]), sizes


def test_protecting_the_class_token_goes_view_by_view(model: LlavaNext, picture: Image.Image) -> None:
    text = EDITS["ragged"].replace("do: drop", "do: {drop: {protect: [cls]}}")
    with pytest.raises(ProbeError, match=r"at.group: every view has a class token of its own"):
        encode(model, [picture], text)
    one = encode(model, [picture], text.replace(", group: picture", "")).features.survivors
    assert one is not None
    assert {a.shape[0] for a in one.alive} == {int(0.4 * (PATCHES + 1)) - 1}, "it counts as kept"


@pytest.mark.parametrize("name", ["fastervlm", "visionzip", "prumerge", "vispruner", "holov", "globalcom2"])
def test_recipes_run_with_the_class_token_as_published(name: str, model: LlavaNext, picture: Image.Image) -> None:
    table = compile_recipe(load_recipe(f"prune/{name}", ["queries=cls"]), model.facts)
    features = encode_with_probes(model, [picture], table).features
    assert features.survivors is not None
    prompt = model.assemble("what?", features)
    assert prompt.fate is not None
    assert int((prompt.visual >= 0).sum()) == int((prompt.fate == int(Fate.KEPT)).sum()) > 0
    assert torch.isfinite(prompt.embeds).all()


def test_features_of_several_layers_are_shortened_behind_them_only(tmp_path: Path, picture: Image.Image) -> None:
    model = load(write_llava_next(tmp_path / "several", vision_feature_layer=[-2, -3]))
    assert isinstance(model, LlavaNext)
    with pytest.raises(ProbeError, match="features come from several layers"):
        encode(model, [picture], EDITS["tome"])
    with FlopCounterMode(display=False) as counter:
        done = encode(load(tmp_path / "several", attention="eager"), [picture], CLS)
    assert done.flops + done.probe_flops == counter.get_total_flops()


def test_a_clip_has_one_view_per_frame(tiny: Any) -> None:
    frames = [Image.effect_noise((60, 40), 80).convert("RGB") for _ in range(3)]
    text = HEADER + CLS.replace("cls", "all").replace("keep: 5", "keep: 0.25")
    done = encode_with_probes(tiny, frames, compile_recipe(parse_recipe(text), tiny.facts), clip=True)
    left = done.features.survivors
    assert left is not None
    assert left.views.place == (0, 0, 0)
    assert left.views.picture.tolist() == [0, 1, 2]
    prompt, whole = (tiny.assemble("what?", f) for f in (done.features, tiny.encode_video(frames)))
    assert prompt.position is not None
    assert prompt.n_original == whole.n_visual
    assert torch.equal(whole.ids[prompt.position], prompt.ids)
    seen = prompt.visual >= 0
    assert torch.equal(whole.picture[whole.visual[prompt.position[seen]]], prompt.picture[prompt.visual[seen]])
    with pytest.raises(ProbeError, match="does not say how pictures are cut"):
        replace_clip = load_clipless(tiny)
        encode_with_probes(replace_clip, frames, compile_recipe(parse_recipe(text), tiny.facts), clip=True)


def load_clipless(tiny: Any) -> Any:
    """A backbone whose adapter does not say how clips are cut."""
    from probe.backbones.base import Backbone

    class Clipless(type(tiny)):  # type: ignore[misc]
        def views(self, images: Any, *, clip: bool = False) -> Any:
            return Backbone.views(self, images, clip=clip)

    other = Clipless.__new__(Clipless)
    other.__dict__.update(tiny.__dict__)
    return other
