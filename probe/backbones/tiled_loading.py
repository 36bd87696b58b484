"""From a checkpoint's folder to a model of the LLaVA family (`tiled`): sizes, vocabulary, tensors, buffers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from probe.attend import KERNELS
from probe.backbones.base import SpecialIds
from probe.backbones.checkpoint import Checkpoint, Tensors, choose_dtype
from probe.backbones.placement import likely_device
from probe.backbones.siglip import siglip_config
from probe.backbones.tiled_config import vision_settings
from probe.backbones.tokens import Tokenizer, load_tokenizer
from probe.backbones.weights import Spread, take
from probe.errors import ProbeError

if TYPE_CHECKING:
    from probe.backbones.tiled import TiledBackbone

ATTENTION = "sdpa"
"""The attention kernel when none is asked for."""
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Model = TypeVar("Model", bound="TiledBackbone")


def load_tiled(
    cls: type[Model],
    checkpoint: Checkpoint,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    attention: str | None = None,
    encoder_attention: str | None = None,
    vocab: str = "tokenizer",
    special: SpecialIds | None = None,
    device_map: object = None,
    max_memory: Mapping[int | str, int | str] | None = None,
) -> Model:
    """Build on no device, then take every tensor from the checkpoint: none missing, none left over.

    `vocab="tokenizer"` cuts the embedding and the head to the tokenizer's length, as the published
    loaders do; `"full"` keeps every row. `special` replaces the ids that the checkpoint says. `device_map` spreads
    the model over devices within `max_memory` (`placement.place`), instead of putting all of it on `device`.
    """
    if vocab not in ("tokenizer", "full"):
        raise ProbeError(f"vocab={vocab!r}; known: tokenizer, full")
    config, vision = checkpoint.config, vision_settings(checkpoint)
    facts, tokenizer = cls.facts_of(checkpoint), load_tokenizer(checkpoint.folder)
    kernel = KERNELS.get(attention or ATTENTION, attention or ATTENTION)
    spread = None if device_map is None else Spread(device_map, max_memory)
    with checkpoint.tensors(str(device) if spread is None else "cpu") as weights:
        rows = stored_rows(cls, config, weights, tokenizer)
        if tokenizer is not None and len(tokenizer) > rows:
            what = f"the tokenizer has {len(tokenizer)} tokens, the model only {rows} rows"
            raise ProbeError(f"{checkpoint.folder}: {what}")
        kept = len(tokenizer) if tokenizer is not None and vocab == "tokenizer" else rows
        with torch.device("meta"):
            model = cls(
                cls.decoder_config(config, kept, kernel),
                siglip_config(vision, encoder_attention or kernel) if vision else None,
                facts=replace(facts, vocabulary=kept),
                special=cls.special_of(checkpoint, tokenizer, special, kept),
                geometry=cls.geometry_of(config, vision) if vision else None,
                projector_type=str(config.get("mm_projector_type", "linear")),
                newlines=str(config.get("mm_newline_position", "one_token")),
                max_length=config.get("tokenizer_model_max_length"),
                tokenizer=tokenizer,
                source=checkpoint.source,
                revision=checkpoint.fingerprint,
            )
        published = {name: cls.published_name(name, config) for name in model.state_dict()}
        if cls.tied(config) and published[HEAD] not in weights.shapes:
            published[HEAD] = published[EMBEDDING]
        embedding = published[EMBEDDING]
        stored = weights.read(embedding, 1).dtype if embedding in weights.shapes else torch.float32
        chosen = choose_dtype(dtype, stored, likely_device(device, device_map))
        cut = {EMBEDDING: rows, HEAD: rows} if kept != rows else {}
        finish = take(model, weights, published, chosen, checkpoint.folder, rows=cut, spread=spread)
    model.defaults = cls.defaults_of(checkpoint)
    model.checkpoint = checkpoint
    model.fill_buffers()
    finish()
    return model


def stored_rows(cls: type[Model], config: Mapping[str, Any], weights: Tensors, tokenizer: Tokenizer | None) -> int:
    """Rows of the stored vocabulary: the config's, or as many as a loader cut it to before it was saved."""
    told = int(config["vocab_size"])
    shape = weights.shapes.get(cls.published_name(EMBEDDING, config), (told,))
    cut = (config.get("embedding_size"), len(tokenizer) if tokenizer is not None else None)
    return shape[0] if shape[0] in cut else told
