"""Small random LLaVA-NeXT and Qwen2.5-VL checkpoints on disk in the layouts that they are published in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

MISTRAL_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
    "{{ ' [/INST]' }}{% endif %}{% endfor %}"
)
QWEN_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAVA_TOKENS = ("<unk>", "<s>", "</s>", "<image>", "<pad>")
QWEN_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 2, "image_size": 28, "patch_size": 7, "projection_dim": 8,
}  # fmt: skip
DECODER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 4096,
}  # fmt: skip
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]


def write_tokenizer(folder: Path, special: tuple[str, ...], *, bos: str | None, eos: str, pad: str) -> None:
    """A tokenizer of bytes that knows `special` tokens; it adds `bos` by itself where there is one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate([*special, *letters])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, special.index(bos))]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos, "pad_token": pad}
    write_json(folder / "tokenizer_config.json", {**said, "clean_up_tokenization_spaces": False})


def write_json(path: Path, value: Any) -> None:
    """JSON, as checkpoints hold it."""
    path.write_text(json.dumps(value), encoding="utf-8")


def random_weights(native: Any, seed: int) -> dict[str, torch.Tensor]:
    """Weights of a native class under the names that it has itself, drawn so that layers matter."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(value.shape, generator=generator) * 0.15 + ("norm" in name and name.endswith("weight"))
        for name, value in native.state_dict().items()
    }


def old_llava_name(name: str) -> str:
    """The name that LLaVA-NeXT's tensors are published under, from the one that they have in transformers 5."""
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    name = name.removeprefix("model.")
    if name.startswith("language_model."):
        return name.replace("language_model.", "language_model.model.", 1)
    return name.replace("vision_tower.", "vision_tower.vision_model.", 1)


def old_qwen_name(name: str) -> str:
    """The name that Qwen2.5-VL's tensors are published under: a flat `model` beside `visual`."""
    return name.replace("model.language_model.", "model.", 1).replace("model.visual.", "visual.", 1)


def same_name(name: str) -> str:
    """The name in transformers 5 itself."""
    return name


def save_sharded(folder: Path, weights: dict[str, torch.Tensor], shards: int = 2) -> None:
    """Weights as several safetensors files with an index, as large checkpoints come."""
    names = sorted(weights)
    places = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {n: weights[n].contiguous() for n in names[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})


def write_llava_next(
    folder: Path,
    *,
    decoder: str = "mistral",
    seed: int = 0,
    name: Callable[[str], str] = old_llava_name,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """A random LLaVA-NeXT in the layout of `llava-hf/llava-v1.6-*`."""
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    folder.mkdir(parents=True, exist_ok=True)
    text = {"model_type": decoder, **DECODER} | ({"sliding_window": None} if decoder == "mistral" else {})
    settings = {
        "architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next", "image_token_index": 3,
        "text_config": text, "vision_config": CLIP, "image_grid_pinpoints": PINPOINTS, "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default", "projector_hidden_act": "gelu", "tie_word_embeddings": False,
    } | config  # fmt: skip
    write_json(folder / "config.json", settings)
    with torch.device("meta"):
        native = LlavaNextForConditionalGeneration(LlavaNextConfig.from_dict(dict(settings)))
    save_sharded(folder, {name(n): v.to(dtype) for n, v in random_weights(native, seed).items()})
    write_tokenizer(folder, LLAVA_TOKENS, bos="<s>", eos="</s>", pad="<pad>")
    write_json(folder / "chat_template.json", {"chat_template": MISTRAL_TEMPLATE})
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 4})
    side = settings["vision_config"]["image_size"]
    write_json(
        folder / "preprocessor_config.json",
        {
            "size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side},
            "image_grid_pinpoints": settings["image_grid_pinpoints"],
        },
    )  # fmt: skip
    return folder


QWEN_TOWER = {
    "depth": 4, "hidden_size": 32, "intermediate_size": 24, "num_heads": 4, "out_hidden_size": 32, "patch_size": 4,
    "fullatt_block_indexes": [1, 3], "window_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
    "tokens_per_second": 2,
}  # fmt: skip


def write_qwen_vl(
    folder: Path,
    *,
    seed: int = 0,
    name: Callable[[str], str] = old_qwen_name,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """A random Qwen2.5-VL in the layout of `Qwen/Qwen2.5-VL-7B-Instruct`, the decoder's settings flat."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", **DECODER,
        "rope_theta": 1e4, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}, "rms_norm_eps": 1e-6,
        "use_sliding_window": False, "sliding_window": 4096, "bos_token_id": 0, "eos_token_id": 2,
        "tie_word_embeddings": False, "vision_config": QWEN_TOWER, "vision_start_token_id": 3,
        "vision_end_token_id": 4, "image_token_id": 6, "video_token_id": 7,
    } | config  # fmt: skip
    write_json(folder / "config.json", settings)
    with torch.device("meta"):
        native = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(json.loads(json.dumps(settings))))
    weights = {name(n): v.to(dtype) for n, v in random_weights(native, seed).items()}
    if settings["tie_word_embeddings"]:
        del weights["lm_head.weight"]
    save_sharded(folder, weights)
    write_tokenizer(folder, QWEN_TOKENS, bos=None, eos="<|im_end|>", pad="<|endoftext|>")
    said = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    write_json(folder / "tokenizer_config.json", {**said, "chat_template": QWEN_TEMPLATE})
    write_json(folder / "generation_config.json", {"eos_token_id": [2, 0], "pad_token_id": 0, "do_sample": False})
    pixels = {"min_pixels": 256, "max_pixels": 4096, "patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    write_json(folder / "preprocessor_config.json", pixels)
    return folder


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "llava-mistral": lambda folder: write_llava_next(folder, decoder="mistral"),
    "llava-llama": lambda folder: write_llava_next(folder, decoder="llama", seed=1, vision_feature_layer=[-3, -1]),
    "llava-qwen2": lambda folder: write_llava_next(folder, decoder="qwen2", seed=2),
    "qwen-vl": lambda folder: write_qwen_vl(folder, seed=3),
}
"""One small checkpoint of every kind of decoder that is supported."""


def native_class(folder: Path) -> Any:
    """transformers' own class for a checkpoint."""
    import transformers

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return getattr(transformers, config["architectures"][0])


def native_model(folder: Path, attention: str = "eager") -> Any:
    """The oracle: the same weights in transformers' own class, as transformers loads them."""
    return native_class(folder).from_pretrained(folder, local_files_only=True, attn_implementation=attention).eval()


def native_processor(folder: Path) -> Any:
    """The oracle of prompts: transformers' own processor, with its image processor that needs no torchvision."""
    from transformers import LlavaNextProcessor, PreTrainedTokenizerFast, Qwen2_5_VLProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    class WithoutVideo(Qwen2_5_VLProcessor):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor":  # which would need torchvision
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    pixels = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    if config["model_type"] == "qwen2_5_vl":
        return WithoutVideo(Qwen2VLImageProcessorPil(**pixels), tokenizer, None, chat_template=QWEN_TEMPLATE)
    return LlavaNextProcessor(
        LlavaNextImageProcessorPil(**pixels), tokenizer, patch_size=config["vision_config"]["patch_size"],
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=MISTRAL_TEMPLATE,
    )  # fmt: skip


def native_inputs(processor: Any, images: list[Any], question: str) -> dict[str, torch.Tensor]:
    """What transformers' processor makes of pictures and a question."""
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return dict(processor(text=text, images=images or None, return_tensors="pt"))
