"""transformers' own classes as oracle of small random LLaVA-NeXT and Qwen2.5-VL checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from probe.backbones.tiny.autoregressive import (
    CLIP,
    DECODER,
    MISTRAL_TEMPLATE,
    QWEN_TEMPLATE,
    old_llava_name,
    old_qwen_name,
    same_name,
    write_llava_next,
    write_qwen_vl,
)
from probe.backbones.tiny.files import write_json

__all__ = [
    "CLIP", "DECODER", "FAMILIES", "native_class", "native_inputs", "native_model", "native_processor",
    "old_llava_name", "old_qwen_name", "same_name", "write_json", "write_llava_next", "write_qwen_vl",
]  # fmt: skip

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
