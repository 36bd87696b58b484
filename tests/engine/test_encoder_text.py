"""Scores against the question: SigLIP's text half beside a checkpoint, and TRIM with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn.functional import layer_norm
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.siglip.configuration_siglip import SiglipConfig, SiglipTextConfig
from transformers.models.siglip.modeling_siglip import SiglipModel, SiglipTextModel

from probe.backbones import facts_of, load
from probe.backbones.llada_v import LladaV
from probe.compile import compile_recipe
from probe.data import load as pictures
from probe.encoder import encode_with_probes
from probe.errors import ProbeError
from probe.recipe import load_recipe

PLACES = 8
TEXT = {"vocab_size": 114, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
QUESTION = "which colour is the circle and what is written below it"


@pytest.fixture(scope="module")
def text_model() -> SiglipTextModel:
    torch.manual_seed(3)
    config = SiglipTextConfig(**TEXT, max_position_embeddings=PLACES)
    model = SiglipTextModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module", params=["text alone", "both halves"])
def folder(request: Any, text_model: SiglipTextModel, tiny_folder: Path, tmp_path_factory: Any) -> Path:
    """The tiny checkpoint with a text tower, stored as a text model or as a whole image-text model."""
    folder = tmp_path_factory.mktemp("towers") / "tiny"
    shutil.copytree(tiny_folder, folder)
    inside = folder / "text_tower"
    inside.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_folder / name, inside)
    state = {k: v.clone().contiguous() for k, v in text_model.state_dict().items()}
    if request.param == "text alone":
        config = text_model.config.to_dict()
    else:
        vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
        text = TEXT | {"max_position_embeddings": PLACES}
        whole = SiglipModel(SiglipConfig(text_config=text, vision_config=vision | {"image_size": 32, "patch_size": 8}))
        config = whole.config.to_dict()
        state = {f"text_model.{k}": v for k, v in state.items()}
        state |= {f"vision_model.{k}": v.contiguous() for k, v in whole.vision_model.state_dict().items()}
        state |= {"logit_scale": torch.zeros(1), "logit_bias": torch.zeros(1)}
    (inside / "config.json").write_text(json.dumps(config))
    save_file(state, inside / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return next(pictures("world/mixed", 1)).images[0]


@torch.inference_mode()
def test_a_text_is_the_mean_of_its_pieces_pooled(folder: Path, text_model: SiglipTextModel) -> None:
    model = load(folder)
    assert isinstance(model, LladaV)
    assert model.facts.text_tower
    assert facts_of(folder).text_tower
    tokenizer = model.tokenizer
    assert tokenizer is not None
    ids = tokenizer.encode(QUESTION)
    assert len(ids) > PLACES
    pieces = [ids[i : i + PLACES] for i in range(0, len(ids), PLACES)]
    pieces[-1] += [tokenizer.pad] * (PLACES - len(pieces[-1]))  # type: ignore[list-item]
    pooled = torch.stack([text_model(input_ids=torch.tensor([p])).pooler_output[0] for p in pieces])
    torch.testing.assert_close(model.embed_text(QUESTION), pooled.mean(0))
    assert set(model.state_dict()) == set(load(folder).state_dict()), "it is no part of the model's own weights"


@torch.inference_mode()
def test_trim_is_trim_written_out(folder: Path, picture: Image.Image) -> None:
    """Post-normed patches against the question, negated; outliers by quartiles; the mean of the rest behind them."""
    model = load(folder)
    assert isinstance(model, LladaV)
    recipe = load_recipe("prune/trim", ["keep=0.25"])
    table = compile_recipe(recipe, model.facts)
    done = encode_with_probes(model, [picture], table, question=QUESTION).features
    left = done.survivors
    assert left is not None
    seen: list[torch.Tensor] = []
    handle = model.mm_projector.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model.encode_images([picture])
    handle.remove()
    norm, text = model.vision_tower.post_layernorm, model.embed_text(QUESTION)
    patches = model.facts.patches
    for v, x in enumerate(seen[0]):
        score = (-(layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps) @ text)).softmax(0)
        kept = score.topk(patches // 4).indices.sort().values
        assert (left.alive[v][:-1] - v * patches).tolist() == kept.tolist()
        gone = torch.tensor([i for i in range(patches) if i not in kept.tolist()])
        tokens = torch.cat([x[kept], x[gone].mean(0, keepdim=True)])
        torch.testing.assert_close(done.projected[v], model.mm_projector(tokens), atol=1e-5, rtol=1e-4)
        assert left.alive[v][-1] == 5 * patches + v, "a token of its own"
        assert (left.holder[v * patches + gone] == 5 * patches + v).all()
    prompt = model.assemble(QUESTION, done)
    assert prompt.n_visual == 5 * patches + 5
    assert prompt.n_original == model.assemble(QUESTION, model.encode_images([picture])).n_visual


def test_the_study_s_trim_loses_its_tiles_only_if_asked_to(folder: Path, picture: Image.Image) -> None:
    model = load(folder)
    patches = model.facts.patches
    counts = []
    for tiles in ("1.0", "0.0"):
        table = compile_recipe(load_recipe("study/study_trim", [f"tiles={tiles}"]), model.facts)
        left = encode_with_probes(model, [picture], table, question=QUESTION).features.survivors
        assert left is not None
        counts.append([a.shape[0] for a in left.alive])
    own = int(patches * 0.25) + 1
    assert counts == [[own] * 5, [own, 0, 0, 0, 0]]


def test_flops_include_the_text(folder: Path, picture: Image.Image) -> None:
    model = load(folder, attention="eager")
    table = compile_recipe(load_recipe("prune/trim"), model.facts)
    encode_with_probes(model, [picture], table, question=QUESTION)  # loads the text tower
    with FlopCounterMode(display=False) as counter:
        done = encode_with_probes(model, [picture], table, question=QUESTION)
    assert done.flops + done.probe_flops == counter.get_total_flops()
    assert done.probe_flops >= model.text_flops(QUESTION) > 0


def test_without_a_text_tower_trim_is_refused_with_the_reason(tiny: LladaV) -> None:
    for facts in (tiny.facts, facts_of("miniature"), facts_of("GSAI-ML/LLaDA-V")):
        with pytest.raises(ProbeError, match=r"trim.yaml:\d+:\d+: .*comes with no text tower.*`text_tower`"):
            compile_recipe(load_recipe("prune/trim"), facts)
    with pytest.raises(ProbeError, match="has no text tower"):
        tiny.embed_text("a")


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("no tokenizer", "tokenizer.json"),
        ("no weights", "has no weights"),
        ("wrong type", "model_type 'clip'"),
        ("wrong size", "do not fit the config"),
    ],
)
def test_a_broken_text_tower_says_what_is_wrong(what: str, said: str, folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    inside = copy / "text_tower"
    config = json.loads((inside / "config.json").read_text())
    if what == "no tokenizer":
        (inside / "tokenizer.json").unlink()
    elif what == "no weights":
        (inside / "model.safetensors").unlink()
    elif what == "wrong type":
        (inside / "config.json").write_text(json.dumps(config | {"model_type": "clip"}))
    else:
        (config.get("text_config") or config)["intermediate_size"] = 40
        (inside / "config.json").write_text(json.dumps(config))
    model = load(copy)
    with pytest.raises(ProbeError, match=said):
        model.embed_text(QUESTION)
