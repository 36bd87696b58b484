"""FLOPs from executed shapes: two per multiply-add of matrix products and convolutions, as torch's counter has it.

Element-wise work (norms, softmax, rotary, activations) is not counted, there or here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DecoderDims:
    """Sizes of a Llama-like decoder that decide its cost."""

    width: int
    heads: int
    kv_heads: int
    head_size: int
    mlp: int
    layers: int
    vocabulary: int

    def at(self, layer: int) -> DecoderDims:
        """The sizes of one layer; decoders whose layers differ say so."""
        return self

    def attention(self, rows: int, keys: int) -> int:
        """One layer's attention block: q, k, v and output projections of `rows`, two products against `keys`."""
        projections = self.width * self.head_size * (2 * self.heads + 2 * self.kv_heads)
        return 2 * rows * projections + 4 * rows * keys * self.heads * self.head_size

    def mlp_block(self, rows: int) -> int:
        """One layer's gated MLP."""
        return 6 * rows * self.width * self.mlp

    def condition(self, rows: int, *, told: bool) -> int:
        """Preparing `rows` that show noise (`Backbone.condition`), with logits of an earlier pass if `told`."""
        return 0

    def head(self, rows: int) -> int:
        """The vocabulary projection of `rows`."""
        return 2 * rows * self.width * self.vocabulary

    def scored_rows(self, rows: int, keys: int, form: str) -> int:
        """Extra attention rows beside the kernel: one product per head (grouped heads add up first when averaged)."""
        heads = self.heads if form == "softmax" else self.kv_heads
        return 2 * rows * keys * heads * self.head_size

    def reweighted(self, rows: int, keys: int) -> int:
        """Attention rows computed a second time because what they attend to is reweighted."""
        return 4 * rows * keys * self.heads * self.head_size

    def averaged_rows(self, rows: int, keys: int, form: str) -> int:
        """Averaging those rows: one product with the rows' weights per head."""
        return 2 * rows * keys * (self.heads if form == "softmax" else 1)


def decoder_dims(config: Any, vocabulary: int) -> DecoderDims:
    """From a transformers Llama-like config."""
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return DecoderDims(
        width=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_size=head_size,
        mlp=config.intermediate_size,
        layers=config.num_hidden_layers,
        vocabulary=vocabulary,
    )


@dataclass(frozen=True)
class EncoderDims:
    """Sizes of a ViT encoder with an MLP projector.

    `lead` rows before a view's patches (a class token) are no patches; the projector takes `inner` numbers of each
    (0: the encoder's width).
    """

    patches: int
    patch: int
    width: int
    mlp: int
    layers: int
    out_width: int
    heads: int = 1
    lead: int = 0
    inner: int = 0

    def encode(self, views: int) -> int:
        """All views through patch embedding, layers and projector."""
        n, rows = self.patches, self.lead + self.patches
        return self.embed(views) + self.layers * self.layer(views, rows, rows) + self.project(views * n)

    def embed(self, views: int) -> int:
        """Patch embedding."""
        return 2 * views * self.patches * 3 * self.patch**2 * self.width

    def layer(self, views: int, rows: int, mlp_rows: int) -> int:
        """One layer: `rows` of every view attend to each other, `mlp_rows` of them go through the MLP."""
        attention = 2 * rows * 4 * self.width**2 + 4 * rows * rows * self.width
        return views * (attention + 4 * mlp_rows * self.width * self.mlp)

    def project(self, rows: int) -> int:
        """The projector on `rows` patches in all."""
        return 2 * rows * ((self.inner or self.width) * self.out_width + self.out_width**2)

    def looked_rows(self, rows: int, keys: int, form: str) -> int:
        """Attention rows of one view beside the kernel, and averaging them."""
        return 2 * rows * keys * self.width + 2 * rows * keys * (self.heads if form == "softmax" else 1)


def encoder_dims(config: Any, out_width: int) -> EncoderDims:
    """From a transformers SigLIP config whose `num_hidden_layers` are the layers in use."""
    return EncoderDims(
        patches=(config.image_size // config.patch_size) ** 2,
        patch=config.patch_size,
        width=config.hidden_size,
        mlp=config.intermediate_size,
        layers=config.num_hidden_layers,
        out_width=out_width,
        heads=config.num_attention_heads,
    )


def pairwise(tokens: int, width: int) -> int:
    """All cosine similarities of `tokens` vectors."""
    return 2 * tokens * tokens * width
