"""Scores against the question with CLIP, where TRIM comes from: its text half beside a LLaVA-NeXT checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_autoregressive import CLIP, native_model, write_llava_next
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.clip.configuration_clip import CLIPConfig
from transformers.models.clip.modeling_clip import CLIPModel, CLIPTextModelWithProjection

from probe.backbones import facts_of, load
from probe.backbones.llava_next import LlavaNext
from probe.backbones.tiny.files import save_weights, write_byte_tokenizer, write_json
from probe.compile import compile_recipe
from probe.encoder import encode_with_probes
from probe.errors import ProbeError
from probe.recipe import load_recipe

PLACES, SHARED = 12, 20
QUESTION = "which colour is the circle?"
TEXT = {
    "vocab_size": 300, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": PLACES, "projection_dim": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llava_next(tmp_path_factory.mktemp("clip") / "next")


@pytest.fixture(scope="module")
def clip(folder: Path) -> CLIPModel:
    """A whole CLIP whose image half is the checkpoint's encoder, every layer of it."""
    torch.manual_seed(5)
    inside = folder / "text_tower"
    inside.mkdir()
    write_byte_tokenizer(inside, ("<pad>", "<x>", "<y>", "<s>", "</s>"), bos="<s>", eos="</s>", pad="<pad>")
    ids = {"bos_token_id": 3, "eos_token_id": 4, "pad_token_id": 0}
    config = CLIPConfig(text_config=TEXT | ids, vision_config=dict(CLIP), projection_dim=SHARED)
    model = CLIPModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.vision_model.load_state_dict(native_model(folder).model.vision_tower.state_dict())
    write_json(inside / "config.json", model.config.to_dict())
    save_weights(inside, {k: v.detach().clone() for k, v in model.state_dict().items()})
    return model


@pytest.fixture(scope="module")
def model(folder: Path, clip: CLIPModel) -> LlavaNext:
    return load(folder)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.effect_noise((80, 60), 90).convert("RGB")


def features_of_text(clip: CLIPModel, pieces: list[list[int]]) -> Tensor:
    """transformers' own features, piece by piece."""
    found = [clip.get_text_features(input_ids=torch.tensor([[3, *piece, 4]])) for piece in pieces]
    return torch.cat([f if isinstance(f, Tensor) else f.pooler_output for f in found])


@torch.inference_mode()
def test_a_text_is_transformers_own_feature(model: LlavaNext, clip: CLIPModel, folder: Path) -> None:
    assert model.facts.text_tower
    assert facts_of(folder).text_tower
    tokenizer = model._text_tower().tokenizer
    short = tokenizer.encode_bare("a red dot")
    assert len(short) <= PLACES - 2
    torch.testing.assert_close(model.embed_text("a red dot"), features_of_text(clip, [short])[0])
    ids, room = tokenizer.encode_bare(QUESTION), PLACES - 2
    pieces = [ids[i : i + room] for i in range(0, len(ids), room)]
    assert len(pieces) > 2
    torch.testing.assert_close(model.embed_text(QUESTION), features_of_text(clip, pieces).mean(0))
    torch.testing.assert_close(model.embed_text(""), features_of_text(clip, [[]])[0])


@torch.inference_mode()
def test_patches_are_transformers_own_features(model: LlavaNext, clip: CLIPModel, picture: Image.Image) -> None:
    """The states of CLIP's last layer but one through its final norm and its projection."""
    seen: list[Tensor] = []
    tower: Any = model.native.model.vision_tower
    handle = tower.embeddings.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model.encode_images([picture])
    handle.remove()
    states = clip.vision_model(seen[0], output_hidden_states=True).hidden_states[-2][:, 1:]
    expected = clip.visual_projection(clip.vision_model.post_layernorm(states))
    torch.testing.assert_close(model.text_space(model.vision_features(seen[0])), expected, atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_trim_is_trim_written_out(model: LlavaNext, clip: CLIPModel, picture: Image.Image) -> None:
    table = compile_recipe(load_recipe("prune/trim", ["keep=0.25"]), model.facts)
    done = encode_with_probes(model, [picture], table, question=QUESTION).features
    assert done.survivors is not None
    seen: list[Tensor] = []
    handle = model.projector.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model.encode_images([picture])
    handle.remove()
    n = model.facts.patches
    for v, x in enumerate(seen[0]):
        space = clip.visual_projection(clip.vision_model.post_layernorm(x))
        kept = (-(space @ model.embed_text(QUESTION))).softmax(0).topk(n // 4).indices.sort().values
        assert (done.survivors.alive[v][:-1] - v * n).tolist() == kept.tolist()
        gone = torch.tensor([i for i in range(n) if i not in kept.tolist()])
        tokens = torch.cat([x[kept], x[gone].mean(0, keepdim=True)])
        torch.testing.assert_close(done.projected[v], model.projector(tokens), atol=1e-5, rtol=1e-4)


def test_flops_include_the_text_and_the_projection(folder: Path, clip: CLIPModel, picture: Image.Image) -> None:
    model = load(folder, attention="eager")
    table = compile_recipe(load_recipe("prune/trim"), model.facts)
    encode_with_probes(model, [picture], table, question=QUESTION)  # loads the text tower
    with FlopCounterMode(display=False) as counter:
        done = encode_with_probes(model, [picture], table, question=QUESTION)
    assert done.flops + done.probe_flops == counter.get_total_flops()


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("no tokenizer", "tokenizer.json"),
        ("no projection of patches", "visual_projection|missing"),
        ("siglip", "model_type 'siglip'; a text tower of this encoder is a CLIP model"),
        ("several layers", "come from several layers of CLIP"),
    ],
)
def test_a_broken_text_tower_says_what_is_wrong(
    what: str, said: str, folder: Path, clip: CLIPModel, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    inside = copy / "text_tower"
    config = json.loads((inside / "config.json").read_text())
    if what == "no tokenizer":
        (inside / "tokenizer.json").unlink()
    elif what == "siglip":
        write_json(inside / "config.json", config | {"model_type": "siglip"})
    elif what == "several layers":
        own = json.loads((copy / "config.json").read_text())
        shutil.rmtree(copy)
        copy = write_llava_next(tmp_path / "several", vision_feature_layer=[-2, -3], text_config=own["text_config"])
        shutil.copytree(folder / "text_tower", copy / "text_tower")
    else:
        text = CLIPTextModelWithProjection(clip.config.text_config)
        for file in inside.glob("model*"):
            file.unlink()
        save_weights(inside, dict(text.state_dict()), shards=1)
        write_json(inside / "config.json", text.config.to_dict())
    with pytest.raises(ProbeError, match=said):
        load(copy).embed_text(QUESTION)
