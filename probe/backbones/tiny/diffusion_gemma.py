"""A small random DiffusionGemma checkpoint, written by transformers' own class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from probe.backbones import gemma_prompt as text
from probe.backbones.diffusion_gemma_modules import settings as gemma
from probe.backbones.tiny.files import write_byte_tokenizer, write_json

SPECIAL = (
    "<pad>", "<eos>", "<bos>", "<unk>", "<mask>", text.START, text.END, text.PICTURE, "<|image>", "<image|>",
    text.THINK, "<|channel>", text.THOUGHT_OVER, "<|tool_response>",
)  # fmt: skip
IDS = {token: i for i, token in enumerate(SPECIAL)}
ENDS = [IDS["<eos>"], IDS[text.END], IDS["<|tool_response>"]]
KINDS = ["sliding_attention", "full_attention"]

TEXT: dict[str, Any] = {
    "model_type": "diffusion_gemma_text",
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "top_k_experts": 2,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
    "sliding_window": 7,
    "layer_types": KINDS * 2,
    "use_bidirectional_attention": "vision",
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
VISION: dict[str, Any] = {
    "model_type": "gemma4_vision",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "patch_size": 2,
    "pooling_kernel_size": 3,
    "position_embedding_size": 256,
    "standardize": True,
}
TEMPLATE = (
    "{{ bos_token }}{% if enable_thinking %}<|turn>system\n<|think|><turn|>\n{% endif %}"
    "{% for m in messages %}<|turn>{{ m['role'] }}\n{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<|image|>\n{% else %}{{ p['text'] | trim }}{% endif %}{% endfor %}"
    "<turn|>\n{% endfor %}{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)


def tiny_config(*, canvas: int = 5, vision: dict[str, Any] | None = None, **text_settings: Any) -> Any:
    """A configuration of every part, small enough for a test."""
    return gemma.DiffusionGemmaConfig(
        text_config={**TEXT, **text_settings},
        vision_config={**VISION, **(vision or {})},
        canvas_length=canvas,
        image_token_id=IDS[text.PICTURE],
        boi_token_id=IDS["<|image>"],
        eoi_token_id=IDS["<image|>"],
    )


@torch.no_grad()
def tiny_model(config: Any, seed: int = 0) -> Any:
    """The native class with random weights that nothing is lost in; encoder and decoder scalars differ."""
    from transformers import DiffusionGemmaForBlockDiffusion

    model = DiffusionGemmaForBlockDiffusion(config).eval()
    generator = torch.Generator().manual_seed(seed)
    spread = 0.3 * (32 / config.text_config.hidden_size) ** 0.5
    done: set[int] = set()
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.data_ptr() in done or name not in model.state_dict():
            continue
        done.add(value.data_ptr())
        noise = torch.randn(value.shape, generator=generator)
        around = "norm" in name or "scal" in name
        value.copy_(1 + 0.2 * noise if around else noise * (spread if value.ndim > 1 else 0.1))
    return model


def write_gemma(
    folder: Path,
    *,
    layers: int = 4,
    width: int = 32,
    seed: int = 0,
    soft_tokens: int = 12,
    tokenizer: bool = True,
    template: str | None = TEMPLATE,
    shard: str = "5GB",
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """A checkpoint in the published layout: weights and config by `save_pretrained`, processor, tokenizer."""
    kinds = (KINDS * layers)[: layers - 1] + KINDS[-1:]  # natively the last layer sees everything
    heads = {"head_dim": width // 4, "global_head_dim": width // 2}
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "layer_types": kinds, **heads}
    model = tiny_model(tiny_config(**{**sizes, **config}), seed).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    told = {
        "max_new_tokens": model.config.canvas_length,
        "max_denoising_steps": 6,
        "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
        "t_min": 0.4, "t_max": 0.8, "stability_threshold": 1, "confidence_threshold": 0.005,
        "eos_token_id": ENDS, "pad_token_id": 0,
    }  # fmt: skip
    write_json(folder / "generation_config.json", told)
    processor = {"image_processor": {"max_soft_tokens": soft_tokens, "patch_size": 2, "pooling_kernel_size": 3}}
    write_json(folder / "processor_config.json", processor)
    if tokenizer:
        write_gemma_tokenizer(folder, template)
    return folder


def write_gemma_tokenizer(folder: Path, template: str | None = TEMPLATE, adds_bos: bool = False) -> None:
    """A tokenizer of bytes with Gemma's special tokens."""
    more: dict[str, Any] = {"unk_token": "<unk>", "mask_token": "<mask>"}
    write_byte_tokenizer(folder, SPECIAL, bos="<bos>", eos="<eos>", pad="<pad>", adds_bos=adds_bos, **more)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
