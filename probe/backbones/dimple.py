"""Dimple (Yu et al., arXiv 2505.16990) on transformers' own Qwen2 and Qwen2.5-VL tower: only where it differs.

Pictures keep their shape, so their number of tokens follows their size. The tower's merged features pass one more
projector, take the places of a run of picture tokens, and stand at positions on three axes. Logits are shifted by one:
row p - 1 predicts slot p. `dimple_modules.pair_mask` makes the published mask of prompts that are padded on the left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, cast

import torch
from PIL import Image
from torch import Tensor, nn
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLVisionRotaryEmbedding,
)

from probe.attend import KERNELS
from probe.backbones import dimple_config as names
from probe.backbones import dimple_prompt as text
from probe.backbones import sequence
from probe.backbones.base import Backbone, Features, GenerationDefaults, LayerModules, Prompt, SpecialIds
from probe.backbones.checkpoint import Checkpoint, choose_dtype
from probe.backbones.dimple_modules import (
    DimpleQwen2,
    MultiAxisRotary,
    Projector,
    decoder_config,
    decoder_layers,
    encode_flops,
    tower_config,
    tower_layers,
)
from probe.backbones.dimple_pixels import patches_of
from probe.backbones.dimple_resize import Preprocessing
from probe.backbones.placement import likely_device
from probe.backbones.prompt import shared_prefix
from probe.backbones.splice import IMAGE
from probe.backbones.tokens import Tokenizer, load_tokenizer, within
from probe.backbones.weights import Spread, take
from probe.errors import ProbeError
from probe.site import ModelFacts

ATTENTION = "sdpa"
"""The attention kernel when none is asked for."""
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
IMAGE_PAD = "<|image_pad|>"
"""Stands in a rendered prompt where a picture goes."""


@dataclass(frozen=True)
class Pictures:
    """The pictures of a sample: their grids of visual tokens, and of patches `(pictures, 3)` int64, as the tower's."""

    grids: tuple[text.Grid, ...]
    patches: Tensor


class Dimple(Backbone):
    """Dimple behind the adapter contract. Parameters carry their published names."""

    shift = 1
    ids_batch_axis = 1
    defaults = GenerationDefaults(
        gen_length=64,
        block_length=64,
        steps=64,
        unmask={"dimple": {"algorithm": "maskgit_plus", "threshold": 0.95, "top_k": 50}},
        cache={"crop": {}},
    )

    def __init__(
        self,
        qwen2: Qwen2Config,
        tower: Qwen2_5_VLVisionConfig,
        *,
        facts: ModelFacts,
        special: SpecialIds,
        preprocessing: Preprocessing,
        sections: Sequence[int],
        image: int,
        causal: bool = False,
        interleave: bool = False,
        tokenizer: Tokenizer | None = None,
        source: str = "",
        revision: str = "",
    ) -> None:
        super().__init__()
        self.facts, self.special, self.source, self.revision = facts, special, source, revision
        self.preprocessing, self.image, self.causal, self.interleave = preprocessing, image, causal, interleave
        self.tokenizer = tokenizer
        self.model = DimpleQwen2(qwen2, sections, causal=causal)
        self.lm_head = nn.Linear(qwen2.hidden_size, qwen2.vocab_size, bias=False)
        self.visual = Qwen2_5_VisionTransformerPretrainedModel(tower)
        self.img_projector = Projector(tower.out_hidden_size, qwen2.hidden_size, qwen2.hidden_act)
        self._layers, self._encoder_layers = decoder_layers(self.model), tower_layers(self.visual)
        self.eval().requires_grad_(False)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        *,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "auto",
        attention: str | None = None,
        encoder_attention: str | None = None,
        special: SpecialIds | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        pixels: str = "processor",
        interleave: bool = False,
        full_attn_mask: bool | None = None,
        device_map: object = None,
        max_memory: Mapping[int | str, int | str] | None = None,
    ) -> Self:
        """Build on no device, then take every tensor from the checkpoint: none missing, none left over.

        `min_pixels`, `max_pixels` replace the checkpoint's pixel budget (training used 3136 to 112896);
        `pixels="evaluation"` adds the published evaluation's JPEG and resizing. `interleave` puts pictures where the
        question names them (`<image 1>`). `full_attn_mask=False` makes the model causal; None takes the config's word.
        `device_map` and `max_memory` spread the model over devices (`placement.place`).
        """
        settings, vision = names.text_settings(checkpoint.config), names.vision_settings(checkpoint.config)
        facts, tokenizer = names.facts_of(checkpoint), load_tokenizer(checkpoint.folder)
        kind = attention or ATTENTION
        kind = KERNELS.get(kind, kind)
        of_tower = encoder_attention or kind
        whole = settings["full_attn_mask"] if full_attn_mask is None else full_attn_mask
        with torch.device("meta"):
            model = cls(
                decoder_config(settings, kind),
                tower_config(vision, KERNELS.get(of_tower, of_tower)),
                facts=facts,
                special=special_of(tokenizer, special, settings, checkpoint.source),
                preprocessing=names.preprocessing(
                    checkpoint, min_pixels=min_pixels, max_pixels=max_pixels, pixels=pixels
                ),
                sections=settings["mrope_section"],
                image=settings["image_token_id"],
                causal=not whole,
                interleave=interleave,
                tokenizer=tokenizer,
                source=checkpoint.source,
                revision=checkpoint.fingerprint,
            )
        spread = None if device_map is None else Spread(device_map, max_memory)
        with checkpoint.tensors(str(device) if spread is None else "cpu") as weights:
            stored = weights.read(EMBEDDING, 1).dtype if EMBEDDING in weights.shapes else torch.float32
            published = {name: name for name in model.state_dict()}
            if settings["tie_word_embeddings"] and HEAD not in weights.shapes:
                published[HEAD] = EMBEDDING
            chosen = choose_dtype(dtype, stored, likely_device(device, device_map))
            finish = take(model, weights, published, chosen, checkpoint.folder, spread=spread)
        # what no checkpoint holds: tables that are computed
        model.model.rotary_emb = MultiAxisRotary(model.model.config, model.model.sections).to(model.device)
        model.visual.rotary_pos_emb = Qwen2_5_VLVisionRotaryEmbedding(model.visual.config).to(model.device)
        finish()
        return model

    @property
    def device(self) -> torch.device:
        """Where the weights are, or the sequence is looked after."""
        return self.home or self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of weights and activations."""
        return self.lm_head.weight.dtype

    @property
    def lm(self) -> DimpleQwen2:
        """The decoder without its head."""
        return self.model

    @property
    def layers(self) -> Sequence[LayerModules]:
        """The decoder's layers, first to last."""
        return self._layers

    @property
    def final_norm(self) -> nn.Module:
        """The norm after the last layer."""
        return cast(nn.Module, self.model.norm)

    @property
    def encoder_layers(self) -> Sequence[LayerModules]:
        """The tower's blocks, whose rows are patches in window order (`dimple_modules.windows`)."""
        return self._encoder_layers

    def position_ids(self, position: Tensor) -> Tensor:
        """`(batch, length, 3)`, or `(batch, length)` for the same on every axis, to `(3, batch, length)`."""
        return position.expand(3, -1, -1) if position.ndim == 2 else position.movedim(-1, 0)

    def rotary(self, hidden: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """`(cos, sin)`, each `(batch, length, head size)`, at `position (batch, length[, 3])`, angles in float32."""
        cos, sin = self.model.rotary_emb(hidden, self.position_ids(position))
        return cos, sin

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings `(..., width)`."""
        return cast(Tensor, self.model.embed_tokens(ids)).to(self.device)

    def head(self, hidden: Tensor) -> Tensor:
        """Final-normed rows to float32 logits; the product itself is in the model's type."""
        return cast(Tensor, self.lm_head(hidden)).float().to(self.device)

    @torch.no_grad()
    def vision_features(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        """Patches and their grids (`patches_of`) to merged features `(tokens, tower's outer width)`, row by row."""
        done = self.visual(pixel_values.to(self.device, self.dtype), grid_thw=grid_thw.to(self.device))
        return cast(Tensor, done.pooler_output)

    def encode_images(self, images: Sequence[Image.Image]) -> Features:
        """All pictures in one pass of the tower: `projected (1, tokens, width)`, one picture after the other."""
        if not images:
            raise ProbeError("no picture to encode; leave the features out for a question without pictures")
        return self.project(*patches_of(images, self.preprocessing))

    @torch.no_grad()
    def project(self, pixel_values: Tensor, grid_thw: Tensor) -> Features:
        """Patches and their grids, as of `patches_of`, to embeddings of visual tokens."""
        projected = self.img_projector(self.vision_features(pixel_values, grid_thw))[None].to(self.device)
        merge = self.preprocessing.merge
        grids = tuple(text.Grid(int(h) // merge, int(w) // merge) for _, h, w in grid_thw)
        return Features(projected, Pictures(grids, grid_thw.cpu()))

    def encode_video(self, frames: Sequence[Image.Image]) -> Features:
        """Refused: the published model has no videos."""
        raise ProbeError(f"{self.source} takes no video; give its frames as pictures")

    def encode_flops(self, features: Features) -> float:
        """Tower with its windows, merger and projector, for the pictures as they were sized."""
        return encode_flops(self.visual.config, cast(Pictures, features.layout).patches, self.facts.width)

    @torch.no_grad()
    def assemble(self, question: str, features: Features | None, *, think: bool = False) -> Prompt:
        """The tokenizer's chat template with pictures first (or where they are named), then the question."""
        if think:
            raise ProbeError(f"{self.source} has no thinking switch; leave `think` out")
        tokenizer = self._tokenizer()
        grids = cast(Pictures, features.layout).grids if features else ()
        chat, order = text.user_turn(question, len(grids), interleave=self.interleave)
        rendered = tokenizer.render(chat)
        ids = text.mark_places(tokenizer.encode(rendered), self.image, len(order))
        if features is not None and order:
            return self.with_pictures(ids, features, order)
        said = chat[0]["content"][-1]["text"] if chat[0]["content"] else ""
        before = tokenizer.encode(rendered[: rendered.rfind(said)])
        return self.without_pictures(ids, shared_prefix(before, ids))

    @torch.no_grad()
    def with_pictures(self, ids: Sequence[int], features: Features, order: Sequence[int] | None = None) -> Prompt:
        """A sequence from ids in which `splice.IMAGE` stands for each of the pictures `order` (None: all of them)."""
        grids = cast(Pictures, features.layout).grids
        order = range(len(grids)) if order is None else order
        if list(ids).count(IMAGE) != len(order):
            raise ProbeError(f"{list(ids).count(IMAGE)} places for {len(order)} pictures")
        each = features.projected[0].split([grid.count for grid in grids])
        position = text.positions(ids, [grids[i] for i in order]).to(self.device)
        cells = text.cells_of(grids, order)
        return sequence.with_pictures(ids, [each[i] for i in order], cells, self.embed, position)

    @torch.no_grad()
    def without_pictures(self, ids: Sequence[int], system: int) -> Prompt:
        """A sequence of text alone, the first `system` positions of which belong to the template."""
        prompt = sequence.text_alone(ids, system, self.embed, self.device)
        return replace(prompt, position=text.positions(ids, ()).to(self.device))

    def tokenize(self, text: str) -> list[int]:
        """Ids of a bare string; the tokenizer's own special tokens are recognised, none are added."""
        return self._tokenizer().encode_bare(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The answer without special tokens, and nothing else cut: the published evaluation does no more."""
        return self._tokenizer().decode(ids)

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            files = "vocab.json, merges.txt (or tokenizer.json) and tokenizer_config.json"
            raise ProbeError(f"{self.source} has no tokenizer: put {files} beside its weights")
        return self.tokenizer


def special_of(
    tokenizer: Tokenizer | None, given: SpecialIds | None, settings: Mapping[str, Any], source: str
) -> SpecialIds:
    """The config's mask and the tokenizer's end of a turn (else the config's); nothing is suppressed."""
    rows, image = settings["vocab_size"], settings["image_token_id"]
    if tokenizer is not None and len(tokenizer) > rows:
        raise ProbeError(f"{source}: the tokenizer has {len(tokenizer)} tokens, the model only {rows} rows")
    if tokenizer is not None and tokenizer.id_of(IMAGE_PAD) != image:
        there = f"{IMAGE_PAD} is {tokenizer.id_of(IMAGE_PAD)} in the tokenizer"
        raise ProbeError(f"{source}: {there}, `image_token_id` of config.json is {image}")
    if given is None:
        ends = (tokenizer.eos if tokenizer else None, settings.get("eos_token_id"), settings["pad_token_id"])
        end = next(i for i in ends if i is not None)
        given = SpecialIds(mask=settings["mask_token_id"], eos=end, stop=end, suppressed=())
    return within(given, rows, source)
