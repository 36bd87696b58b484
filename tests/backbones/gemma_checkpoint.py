"""Small random DiffusionGemma checkpoints as the native class writes them, and the native class as oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, DynamicCache

from probe.backbones import gemma_prompt as text
from probe.backbones.rows import Rows

SPECIAL = (
    "<pad>", "<eos>", "<bos>", "<unk>", "<mask>", text.START, text.END, text.PICTURE, "<|image>", "<image|>",
    text.THINK, "<|channel>", text.THOUGHT_OVER, "<|tool_response>",
)  # fmt: skip
IDS = {token: i for i, token in enumerate(SPECIAL)}
ENDS = [IDS["<eos>"], IDS[text.END], IDS["<|tool_response>"]]

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
    "layer_types": ["sliding_attention", "full_attention"] * 2,
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


def tiny_config(*, canvas: int = 5, vision: dict[str, Any] | None = None, **text_settings: Any) -> DiffusionGemmaConfig:
    """A configuration of every part, small enough for a test."""
    return DiffusionGemmaConfig(
        text_config={**TEXT, **text_settings},
        vision_config={**VISION, **(vision or {})},
        canvas_length=canvas,
        image_token_id=IDS[text.PICTURE],
        boi_token_id=IDS["<|image>"],
        eoi_token_id=IDS["<image|>"],
    )


@torch.no_grad()
def tiny_model(config: DiffusionGemmaConfig, seed: int = 0) -> DiffusionGemmaForBlockDiffusion:
    """The native class with random weights that nothing is lost in; encoder and decoder scalars differ."""
    model = DiffusionGemmaForBlockDiffusion(config).eval()
    generator = torch.Generator().manual_seed(seed)
    done: set[int] = set()
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.data_ptr() in done or name not in model.state_dict():
            continue
        done.add(value.data_ptr())
        noise = torch.randn(value.shape, generator=generator)
        around = "norm" in name or "scal" in name
        value.copy_(1 + 0.2 * noise if around else noise * (0.3 if value.ndim > 1 else 0.1))
    return model


def write_tokenizer(folder: Path, template: str | None = TEMPLATE, adds_bos: bool = False) -> None:
    """A tokenizer of bytes with Gemma's special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate([*SPECIAL, *letters])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIAL])
    if adds_bos:
        bos = [("<bos>", IDS["<bos>"])]
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=bos)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {f"{k}_token": f"<{k}>" for k in ("bos", "eos", "pad", "unk", "mask")}
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", **names, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind), encoding="utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def write_gemma(
    folder: Path,
    *,
    seed: int = 0,
    soft_tokens: int = 12,
    tokenizer: bool = True,
    template: str | None = TEMPLATE,
    shard: str = "5GB",
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """A checkpoint in the published layout: weights and config by `save_pretrained`, processor, tokenizer."""
    model = tiny_model(tiny_config(**config), seed).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    told = {
        "max_new_tokens": model.config.canvas_length,
        "max_denoising_steps": 6,
        "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
        "t_min": 0.4, "t_max": 0.8, "stability_threshold": 1, "confidence_threshold": 0.005,
        "eos_token_id": ENDS, "pad_token_id": 0,
    }  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps(told), encoding="utf-8")
    processor = {"image_processor": {"max_soft_tokens": soft_tokens, "patch_size": 2, "pooling_kernel_size": 3}}
    (folder / "processor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    if tokenizer:
        write_tokenizer(folder, template)
    return folder


def native(folder: Path, attention: str = "sdpa") -> DiffusionGemmaForBlockDiffusion:
    """The oracle: the native class reading the same folder."""
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(folder, dtype="auto", attn_implementation=attention)
    return model.eval()


def soft_types(ids: Tensor) -> Tensor:
    """`mm_token_type_ids` as the native processor makes them: 1 at soft tokens."""
    return (ids == IDS[text.PICTURE]).long()


class NativeRun:
    """The native encoder and decoder, called as `generate` calls them: one sample, masks with pictures."""

    def __init__(self, model: DiffusionGemmaForBlockDiffusion) -> None:
        self.model = model
        self.cache = DynamicCache(config=model.config.text_config)
        self.length = 0

    @torch.no_grad()
    def encode(self, ids: Tensor, **pictures: Any) -> Tensor:
        """Ids `(1, length)` into the cache; returns the encoder's last hidden states."""
        encoder = self.model.model.encoder
        position = torch.arange(self.length, self.length + ids.shape[1])[None]
        masks = encoder.create_masks_for_generate(
            config=self.model.config,
            inputs_embeds=torch.empty(*ids.shape, 0),
            attention_mask=torch.ones(1, self.length + ids.shape[1], dtype=torch.bool),
            past_key_values=self.cache,
            position_ids=position,
            mm_token_type_ids=soft_types(ids) if pictures else None,
        )
        self.length += ids.shape[1]
        call = {"attention_mask": masks, "past_key_values": self.cache, "position_ids": position}
        return encoder(input_ids=ids, **call, **pictures).last_hidden_state

    @torch.no_grad()
    def logits(self, canvas: Tensor, previous: Tensor | None = None) -> Tensor:
        """Logits of a canvas `(1, slot)` behind what was encoded."""
        position = torch.arange(self.length, self.length + canvas.shape[1])[None]
        given = {"decoder_input_ids": canvas, "decoder_position_ids": position}
        return self.model(past_key_values=self.cache, self_conditioning_logits=previous, **given).logits


class Store:
    """Keys and values of earlier rows, by layer; what a pass computes is kept only while `keeps`."""

    def __init__(self) -> None:
        self.held: dict[int, tuple[Tensor, Tensor]] = {}
        self.keeps = True

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        if layer in self.held:
            key, value = (torch.cat(pair, 2) for pair in zip(self.held[layer], (key, value), strict=True))
        if self.keeps:
            self.held[layer] = key, value
        return key, value

    def get_seq_length(self, *_: Any) -> int:
        return self.held[0][0].shape[2] if self.held else 0


def rows(closed: int, opened: int = 0, *, start: int = 0, picture: Tensor | None = None) -> Rows:
    """Rows of one sample from position `start`: closed ones, then open ones."""
    n = closed + opened
    group = torch.full((n,), -1)
    if picture is not None:
        group[: len(picture)] = picture
    return Rows(torch.arange(start, start + n)[None], group[None], (torch.arange(n) >= closed)[None])


def modules_with(model: nn.Module, kind: type) -> list[nn.Module]:
    """Every module of a class."""
    return [m for m in model.modules() if isinstance(m, kind)]
