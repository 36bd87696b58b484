"""The text half of an image-text model, for scores that compare patches with the question (TRIM).

Published checkpoints hold the image half alone. A folder `text_tower` inside the checkpoint's folder adds the other:
`config.json`, safetensors and `tokenizer.json` of the SigLIP, SigLIP 2 or CLIP model that the encoder came from (its
image half may lie there too; of it, only CLIP's projection is read).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModelWithProjection
from transformers.models.siglip.configuration_siglip import SiglipTextConfig
from transformers.models.siglip.modeling_siglip import SiglipTextModel

from probe.backbones.checkpoint import TEXT_TOWER, Checkpoint, Tensors, check_names
from probe.backbones.tokens import Tokenizer, load_tokenizer
from probe.errors import ProbeError

PREFIX = "text_model."
_SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "hidden_act", "layer_norm_eps",
)  # fmt: skip
_SIGLIP = (*_SHARED, "projection_size")
_CLIP = (*_SHARED, "projection_dim")
VISUAL = "visual_projection.weight"


class TextTower:
    """SigLIP's text model with its tokenizer."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, kernel: str) -> None:
        """Load the text half that lies in the folder `text_tower` of a checkpoint; `kernel` names its attention."""
        own = _own(checkpoint)
        self.tokenizer, self.pad = _tokenizer(own)
        with torch.device("meta"):
            self.model = SiglipTextModel(_config(own, SiglipTextConfig, _SIGLIP, "siglip", kernel))
        with own.tensors(str(device)) as weights:
            stored = {key: key.removeprefix(PREFIX) for key in weights.shapes}
            whole = any(key.startswith(PREFIX) for key in stored)  # beside its image half, the text half has a prefix
            stored = {key: name for key, name in stored.items() if key.startswith(PREFIX) or not whole}
            _fill(self.model, weights, stored, own, dtype)
        places = self.model.config.max_position_embeddings
        self.model.embeddings.position_ids = torch.arange(places, device=device)[None]

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
        pieces, n = self._pieces(text).shape
        return _flops(self.model.config, pieces, n, self.model.config.projection_size)


class ClipTextTower:
    """CLIP's text model with its tokenizer, and the projection that takes patches where it takes texts (TRIM).

    CLIP (Radford et al., ICML 2021, arXiv 2103.00020): the state at the end token, normed, through a projection.
    """

    def __init__(
        self, checkpoint: Checkpoint, patch_width: int, device: torch.device, dtype: torch.dtype, kernel: str
    ) -> None:
        """Load it from the folder `text_tower` of a checkpoint whose encoder's patches are `patch_width` wide."""
        own = _own(checkpoint)
        self.tokenizer, self.pad = _tokenizer(own)
        self.bos, self.eos = self.tokenizer.bos, self.tokenizer.eos
        if self.bos is None or self.eos is None:
            raise ProbeError(f"{own.folder}: CLIP's tokenizer needs a start and an end token")
        config = _config(own, CLIPTextConfig, _CLIP, "clip", kernel)
        with torch.device("meta"):
            self.model = CLIPTextModelWithProjection(config)
            self.visual = nn.Linear(patch_width, config.projection_dim, bias=False)
        with own.tensors(str(device)) as weights:
            names = {key: key for key in weights.shapes if key.startswith((PREFIX, "text_projection."))}
            _fill(self.model, weights, names, own, dtype)
            _fill(self.visual, weights, {k: "weight" for k in weights.shapes if k == VISUAL}, own, dtype)
        places = torch.arange(config.max_position_embeddings, device=device)[None]
        self.model.text_model.embeddings.position_ids = places

    @torch.no_grad()
    def __call__(self, text: str) -> Tensor:
        """A text as one vector `(d,)`: the mean of the projected end tokens of its pieces, not normalised.

        CLIP has 77 positions. A longer text is cut into pieces, each with a start and an end token of its own; whether
        TRIM cuts off what does not fit is not established.
        """
        ids, ends = self._pieces(text)
        states = self.model.text_model(input_ids=ids).last_hidden_state
        return cast(Tensor, self.model.text_projection(states[torch.arange(len(ends)), ends]).mean(0))

    @torch.no_grad()
    def project(self, patches: Tensor) -> Tensor:
        """Normed patches `(n, patch width)` in the space of texts, `(n, d)`."""
        return cast(Tensor, self.visual(patches))

    def _pieces(self, text: str) -> tuple[Tensor, list[int]]:
        """`(piece, row)` int64 ids, padded behind the end token, which no earlier row sees; and where those stand."""
        ids, room = self.tokenizer.encode_bare(text), self.model.config.max_position_embeddings - 2
        pieces = [[self.bos, *ids[i : i + room], self.eos] for i in range(0, max(len(ids), 1), room)]
        longest = max(map(len, pieces))
        padded = [[*piece, *[self.pad] * (longest - len(piece))] for piece in pieces]
        return torch.tensor(padded, device=self.model.device), [len(piece) - 1 for piece in pieces]

    def flops(self, text: str) -> int:
        """Executed FLOPs of one text: layers, and the projection of one position of every piece."""
        pieces, n = self._pieces(text)[0].shape
        return _flops(self.model.config, pieces, n, self.model.config.projection_dim)

    def project_flops(self, n: int) -> int:
        """Executed FLOPs of projecting n patches."""
        return 2 * n * self.visual.in_features * self.visual.out_features


def _own(checkpoint: Checkpoint) -> Checkpoint:
    return Checkpoint(checkpoint.folder / TEXT_TOWER, f"{checkpoint.source}/{TEXT_TOWER}")


def _tokenizer(own: Checkpoint) -> tuple[Tokenizer, int]:
    tokenizer = load_tokenizer(own.folder)
    if tokenizer is None or tokenizer.pad is None:
        raise ProbeError(f"{own.folder} needs the text model's tokenizer.json, with a padding token")
    return tokenizer, tokenizer.pad


def _fill(model: nn.Module, weights: Tensors, stored: Mapping[str, str], own: Checkpoint, dtype: torch.dtype) -> None:
    """Give a model on no device its weights: `stored` says which tensor of the files is which of its own."""
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: weights.shapes[key] for key, name in stored.items()}
    check_names(expected, {n: s for n, s in found.items() if "position_ids" not in n}, own.folder)
    values = {name: weights.read(key).to(dtype) for key, name in stored.items() if name in expected}
    model.load_state_dict(values, assign=True)
    model.eval().requires_grad_(False)


def _flops(config: Any, pieces: int, n: int, out: int) -> int:
    layer = 8 * n * config.hidden_size**2 + 4 * n * n * config.hidden_size
    layer += 4 * n * config.hidden_size * config.intermediate_size
    return int(pieces * (config.num_hidden_layers * layer + 2 * config.hidden_size * out))


def _config(own: Checkpoint, of: Any, fields: Collection[str], kind: str, kernel: str) -> Any:
    """The text model's settings, from its own config or from that of both halves."""
    told: dict[str, Any] = own.config.get("text_config") or own.config
    found = str(own.config.get("model_type"))
    name = {"siglip": "a SigLIP or SigLIP 2", "clip": "a CLIP"}[kind]
    if not found.startswith(kind):
        raise ProbeError(f"{own.folder}: model_type {found!r}; a text tower of this encoder is {name} model")
    known = {k: told[k] for k in fields if k in told}
    if "projection_dim" in fields and "projection_dim" in own.config:
        known["projection_dim"] = own.config["projection_dim"]  # of a whole CLIP, whose halves' own is not in use
    try:
        return of(**known, attn_implementation=kernel)
    except (TypeError, ValueError, StrictDataclassError) as error:
        words = "SigLIP" if kind == "siglip" else "CLIP"
        raise ProbeError(f"{own.folder}: config.json does not describe a {words} text model: {error}") from error
