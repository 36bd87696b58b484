"""The text half of an image-text model, for scores that compare patches with the question (TRIM).

Published checkpoints of dMLLMs hold the image half alone. A folder `text_tower` inside the checkpoint's folder adds the
other: `config.json`, safetensors and `tokenizer.json` of the SigLIP or SigLIP 2 model that the encoder came from (its
image half may lie there too; it is not read).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers.models.siglip.configuration_siglip import SiglipTextConfig
from transformers.models.siglip.modeling_siglip import SiglipTextModel

from probe.backbones.checkpoint import TEXT_TOWER, Checkpoint, check_names
from probe.backbones.tokens import load_tokenizer
from probe.errors import ProbeError

PREFIX = "text_model."
_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "hidden_act", "layer_norm_eps", "projection_size",
)  # fmt: skip


class TextTower:
    """SigLIP's text model with its tokenizer."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, kernel: str) -> None:
        """Load the text half that lies in the folder `text_tower` of a checkpoint; `kernel` names its attention."""
        own = Checkpoint(checkpoint.folder / TEXT_TOWER, f"{checkpoint.source}/{TEXT_TOWER}")
        tokenizer = load_tokenizer(own.folder)
        if tokenizer is None or tokenizer.pad is None:
            raise ProbeError(f"{own.folder} needs the text model's tokenizer.json, with a padding token")
        self.tokenizer, self.pad = tokenizer, tokenizer.pad
        with torch.device("meta"):
            self.model = SiglipTextModel(_config(own, kernel))
        expected = {name: tuple(value.shape) for name, value in self.model.state_dict().items()}
        with own.tensors(str(device)) as weights:
            stored = {key: key.removeprefix(PREFIX) for key in weights.shapes}
            whole = any(key.startswith(PREFIX) for key in stored)  # beside its image half, the text half has a prefix
            stored = {key: name for key, name in stored.items() if key.startswith(PREFIX) or not whole}
            found = {name: weights.shapes[key] for key, name in stored.items()}
            check_names(expected, {n: s for n, s in found.items() if "position_ids" not in n}, own.folder)
            values = {name: weights.read(key).to(dtype) for key, name in stored.items() if name in expected}
        self.model.load_state_dict(values, assign=True)
        places = self.model.config.max_position_embeddings
        self.model.embeddings.position_ids = torch.arange(places, device=device)[None]
        self.model.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, text: str) -> Tensor:
        """A text as one vector `(d,)`: the mean of the pooled outputs of its pieces.

        As SigLIP was trained, every piece fills all positions (64), the last one with padding, and padding is seen.
        """
        return cast(Tensor, self.model(input_ids=self._pieces(text)).pooler_output.mean(0))

    def _pieces(self, text: str) -> Tensor:
        """`(piece, places)` int64: ids, the last piece filled up with padding."""
        places = self.model.config.max_position_embeddings
        ids = self.tokenizer.encode(text) or [self.pad]
        ids += [self.pad] * (-len(ids) % places)
        return torch.tensor(ids, device=self.model.device).view(-1, places)

    def flops(self, text: str) -> int:
        """Executed FLOPs of one text: layers, and the head on one position of every piece."""
        config = self.model.config
        pieces, n = self._pieces(text).shape
        layer = 8 * n * config.hidden_size**2 + 4 * n * n * config.hidden_size
        layer += 4 * n * config.hidden_size * config.intermediate_size
        return int(pieces * (config.num_hidden_layers * layer + 2 * config.hidden_size * config.projection_size))


def _config(own: Checkpoint, kernel: str) -> SiglipTextConfig:
    """The text model's settings, from its own config or from that of both halves."""
    told: dict[str, Any] = own.config.get("text_config", own.config)
    kind = str(own.config.get("model_type"))
    if not kind.startswith("siglip"):
        raise ProbeError(f"{own.folder}: model_type {kind!r}; a text tower is a SigLIP or SigLIP 2 model")
    try:
        config = SiglipTextConfig(**{k: told[k] for k in _FIELDS if k in told}, attn_implementation=kernel)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise ProbeError(f"{own.folder}: config.json does not describe a SigLIP text model: {error}") from error
    return config
