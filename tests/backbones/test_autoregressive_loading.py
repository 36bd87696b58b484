"""Published layouts of autoregressive baselines: names, sizes, and what is said when a folder does not fit."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_autoregressive import (
    CLIP,
    DECODER,
    FAMILIES,
    native_model,
    native_processor,
    old_llava_name,
    old_qwen_name,
    same_name,
    write_json,
    write_llava_next,
    write_qwen_vl,
)

from probe.backbones import autoregressive_config, facts_of, load, visual_count
from probe.backbones import llava_next_config as llava
from probe.backbones import qwen_vl_config as qwen
from probe.errors import ProbeError

ROOT = Path(__file__).resolve().parents[2]


def edit(path: Path, **changes: Any) -> None:
    """Change a JSON file's settings; None removes one."""
    value = json.loads(path.read_text(encoding="utf-8")) | changes
    write_json(path, {k: v for k, v in value.items() if v is not None})


def between_llava_name(name: str) -> str:
    """The name in transformers 4.52 to 4.57: the parts under `model`, the tower's own prefix still there."""
    return name.replace("model.vision_tower.", "model.vision_tower.vision_model.", 1)


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "llava-published": lambda folder: write_llava_next(folder, name=old_llava_name),
    "llava-4.52": lambda folder: write_llava_next(folder, name=between_llava_name),
    "llava-5": lambda folder: write_llava_next(folder, name=same_name),
    "qwen-published": lambda folder: write_qwen_vl(folder, name=old_qwen_name),
    "qwen-5": lambda folder: write_qwen_vl(folder, name=same_name),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_names_gives_the_same_model(layout: str, tmp_path: Path) -> None:
    folder = LAYOUTS[layout](tmp_path / "model")
    assert len(list(folder.glob("*.safetensors"))) == 2
    model, native = load(folder), native_model(folder)
    own, wanted = model.native.state_dict(), native.state_dict()
    assert own.keys() <= wanted.keys()
    left = {".".join(k.split(".")[2:5]) for k in wanted.keys() - own.keys()}
    assert left <= {"encoder.layers.2"}, "only layers that no feature comes from are gone"
    for name, value in own.items():
        assert value.equal(wanted[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_that_transformers_saved(family: str, tmp_path: Path) -> None:
    folder = FAMILIES[family](tmp_path / "model")
    native, processor = native_model(folder), native_processor(folder)
    native.save_pretrained(tmp_path / "saved")
    processor.tokenizer.save_pretrained(tmp_path / "saved")
    for name in ("chat_template.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            shutil.copy(folder / name, tmp_path / "saved")
    first, second = load(folder), load(tmp_path / "saved")
    assert [first.special, first.facts.width, first.defaults] == [second.special, second.facts.width, second.defaults]
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert one.equal(other)
    assert first.encode([], "Who?").ids.equal(second.encode([], "Who?").ids)


def test_a_tied_head(tmp_path: Path) -> None:
    model = load(write_qwen_vl(tmp_path / "tied", tie_word_embeddings=True))
    assert model.native.lm_head.weight is model.lm.embed_tokens.weight


def reweigh(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change one of a folder's weight files."""
    path = sorted(folder.glob("*.safetensors"))[0]
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    places = {k: v for k, v in index["weight_map"].items() if v != path.name} | dict.fromkeys(weights, path.name)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})


@pytest.mark.parametrize("family", ["llava-mistral", "qwen-vl"])
def test_weights_that_do_not_fit_are_one_error(family: str, tmp_path: Path) -> None:
    folder = FAMILIES[family](tmp_path / "model")

    shapes: list[str] = []

    def spoil(weights: dict[str, torch.Tensor]) -> None:
        norm = next(k for k in weights if k.endswith("layers.1.input_layernorm.weight"))
        product = next(k for k, v in weights.items() if "layers" in k and v.ndim == 2)
        rows, columns = weights[product].shape
        del weights[norm]
        weights["something.else"] = torch.zeros(2)
        weights[product] = weights[product][:-1].contiguous()
        shapes.append(f"[{rows - 1}, {columns}] instead of [{rows}, {columns}]")

    reweigh(folder, spoil)
    with pytest.raises(ProbeError) as caught:
        load(folder)
    said = str(caught.value)
    assert "1 missing" in said
    assert "layers.1.input_layernorm.weight" in said
    assert "1 unexpected: something.else" in said
    assert "1 of another shape" in said
    assert shapes[0] in said


def test_pickles_and_torn_files_are_not_read(tmp_path: Path) -> None:
    folder = write_qwen_vl(tmp_path / "model")
    torn = sorted(folder.glob("*.safetensors"))[1]
    torn.write_bytes(torn.read_bytes()[:-100])
    with pytest.raises(ProbeError, match="not a complete safetensors file"):
        load(folder)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ProbeError, match="pickles"):
        load(folder)


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "an unknown decoder": (lambda f: edit(f / "config.json", text_config={"model_type": "gpt2"}), "supported: llama"),
    "an unknown encoder": (
        lambda f: edit(f / "config.json", vision_config={**CLIP, "model_type": "siglip_vision_model"}),
        "supported: clip_vision_model",
    ),
    "a class token kept": (lambda f: edit(f / "config.json", vision_feature_select_strategy="full"), "default"),
    "a layer that is not there": (lambda f: edit(f / "config.json", vision_feature_layer=9), "states 0 to 3"),
    "sliding windows": (
        lambda f: edit(f / "config.json", text_config={"model_type": "mistral", **DECODER, "sliding_window": 64}),
        "sliding-window attention",
    ),
    "canvases that are no tiles": (lambda f: edit(f / "config.json", image_grid_pinpoints=[[28, 30]]), "multiple"),
    "canvases that are no pairs": (lambda f: edit(f / "config.json", image_grid_pinpoints=[28]), "pairs of height"),
    "canvases that disagree": (
        lambda f: edit(f / "preprocessor_config.json", image_grid_pinpoints=[[28, 28]]),
        "differs from the config's",
    ),
    "a size that is none": (
        lambda f: edit(f / "config.json", text_config={"model_type": "mistral", **DECODER, "hidden_size": "32"}),
        "hidden_size",
    ),
    "an end outside of the vocabulary": (
        lambda f: edit(f / "generation_config.json", eos_token_id=[2, 999]),
        "999 is outside of the 320 rows",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_not_supported_is_named(wrong: str, tmp_path: Path) -> None:
    spoil, hint = WRONG[wrong]
    folder = write_llava_next(tmp_path / "model")
    spoil(folder)
    with pytest.raises(ProbeError, match=None) as caught:
        load(folder)
    assert hint in str(caught.value)


def test_a_folder_without_template_or_tokenizer(tmp_path: Path) -> None:
    folder = write_llava_next(tmp_path / "model")
    (folder / "chat_template.json").unlink()
    with pytest.raises(ProbeError, match=r"no chat template.*chat_template\.jinja"):
        load(folder).encode([], "Who?")
    (folder / "chat_template.jinja").write_text("{{ broken", encoding="utf-8")
    with pytest.raises(ProbeError, match="cannot render"):
        load(folder).encode([], "Who?")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ProbeError, match="has no tokenizer"):
        load(folder).encode([], "Who?")


def test_a_template_that_writes_the_start_token_gets_no_second_one(tmp_path: Path) -> None:
    folder = write_llava_next(tmp_path / "model")
    plain = load(folder).encode([], "Who?").ids
    template = json.loads((folder / "chat_template.json").read_text(encoding="utf-8"))["chat_template"]
    write_json(folder / "chat_template.json", {"chat_template": "{{ bos_token }}" + template})
    assert load(folder).encode([], "Who?").ids.equal(plain)


def test_a_budget_of_pixels_may_be_given(tmp_path: Path) -> None:
    folder = write_qwen_vl(tmp_path / "model")
    assert load(folder).preprocessing.count(200, 200) == visual_count(folder, [(200, 200)]) == 64
    assert load(folder, max_pixels=1024).preprocessing.count(200, 200) == 16


@pytest.mark.parametrize("size", [(640, 480), (5, 9), (20, 4000), (4000, 30), (27, 27), (1000, 1000), (3000, 2000)])
def test_sizes_are_those_of_the_native_image_processor(size: tuple[int, int]) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    for low, high in ((3136, 12845056), (3136, 1003520), (50000, 112896)):
        height, width = smart_resize(size[1], size[0], 28, low, high)
        assert qwen.QwenPixels(low, high).size(*size) == (width, height)
    with pytest.raises(ProbeError, match="longer than 1:200"):
        qwen.QwenPixels().size(2, 500)


@pytest.mark.parametrize("size", [(336, 336), (640, 480), (500, 375), (1000, 300), (333, 1000), (850, 1100), (21, 21)])
def test_counts_of_the_published_models(size: tuple[int, int]) -> None:
    """Against transformers' processors, which count by themselves."""
    from transformers import LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = native_processor_tokenizer()
    processor = LlavaNextProcessor(
        LlavaNextImageProcessorPil(image_grid_pinpoints=llava.PINPOINTS), tokenizer, patch_size=14,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip
    wanted = processor._get_number_of_features(size[1], size[0], 336, 336) - 1
    for name in llava.PUBLISHED:
        assert visual_count(name, [size]) == wanted
        assert visual_count(name, [size, size]) == 2 * wanted
    patches = Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=12845056).get_number_of_image_patches(*size[::-1])
    assert visual_count("Qwen/Qwen2.5-VL-7B-Instruct", [size]) == patches // 4


def native_processor_tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<image>": 0, "?": 1}, "?")))


def test_known_counts() -> None:
    assert visual_count("llava-hf/llava-v1.6-mistral-7b-hf", [(672, 672)]) == 576 + 48 * 49 == 2928
    assert visual_count("Qwen/Qwen2.5-VL-7B-Instruct", [(640, 480)]) == 391
    assert visual_count("Qwen/Qwen2.5-VL-7B-Instruct", [(640, 480), (336, 336)]) == 391 + 144


MISTRAL = {
    "model_type": "mistral", "intermediate_size": 14336, "max_position_embeddings": 32768, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None, "vocab_size": 32064,
}  # fmt: skip
QWEN_7B = {
    **qwen.PUBLISHED["Qwen/Qwen2.5-VL-7B-Instruct"], "model_type": "qwen2_5_vl", "intermediate_size": 18944,
    "num_key_value_heads": 4, "max_position_embeddings": 128000, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "use_sliding_window": False,
    "vision_config": {"hidden_size": 1280, "out_hidden_size": 3584, "tokens_per_second": 2},
}  # fmt: skip


def test_published_names_and_sizes() -> None:
    """7.57 and 8.29 billion parameters, none of them allocated."""
    from transformers import (
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
    )

    with torch.device("meta"):
        mistral = LlavaNextForConditionalGeneration(LlavaNextConfig(text_config=MISTRAL))
        large = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(dict(QWEN_7B)))
    for native, billions, facts, name in (
        (mistral, 7.57, llava.published_facts("llava-hf/llava-v1.6-mistral-7b-hf"), old_llava_name),
        (large, 8.29, qwen.published_facts("Qwen/Qwen2.5-VL-7B-Instruct"), old_qwen_name),
    ):
        shapes = {name(k): tuple(v.shape) for k, v in native.state_dict().items()}
        assert round(sum(math.prod(s) for s in shapes.values()) / 1e9, 2) == billions
        text = native.config.get_text_config()
        told = (text.num_hidden_layers, text.num_attention_heads, text.hidden_size, text.vocab_size)
        assert told == (facts.layers, facts.heads, facts.width, facts.vocabulary)
    assert llava.published_facts("llava-hf/llava-v1.6-mistral-7b-hf").encoder_layers == 23
    assert qwen.published_facts("Qwen/Qwen2.5-VL-7B-Instruct").encoder_layers == large.config.vision_config.depth


def test_settings_that_configs_leave_out_are_those_of_transformers() -> None:
    from transformers import CONFIG_MAPPING, LlavaNextConfig
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLVisionConfig

    for kind, sizes in autoregressive_config.DEFAULTS.items():
        config = Qwen2_5_VLTextConfig() if kind == qwen.DECODER else CONFIG_MAPPING[kind]()
        assert sizes == {key: getattr(config, key) for key in sizes}
    vision = LlavaNextConfig().vision_config
    assert {key: getattr(vision, key) for key in llava.CLIP_LARGE} == llava.CLIP_LARGE
    assert LlavaNextConfig().image_grid_pinpoints == llava.PINPOINTS
    assert {key: getattr(Qwen2_5_VLVisionConfig(), key) for key in qwen.VISION} == qwen.VISION


@pytest.mark.parametrize("family", ["llava-mistral", "qwen-vl"])
def test_facts_and_counts_need_no_torch(family: str, tmp_path: Path) -> None:
    folder = FAMILIES[family](tmp_path / "model")
    code = (
        "import sys; from probe.backbones import facts_of, visual_count; "
        f"print(facts_of({str(folder)!r}).layers, visual_count({str(folder)!r}, [(64, 48)])); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(facts_of(folder).layers), str(visual_count(folder, [(64, 48)]))]
