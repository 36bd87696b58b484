"""Probes inside and after the image encoder, and a short way to run them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from probe.backbones.base import Backbone, Features
from probe.compile import Vocabulary, compile_recipe
from probe.encoder import Encoded, encode_with_probes
from probe.recipe import parse_recipe

HEADER = "schema: 1\nname: test\nprobes:\n"

INSIDE = """
- name: inside
  at: {site: encoder.layer.after_attention, layers: all}
  score: {attention: {queries: all}}
  select: {top_k: {keep: [0.75, 0.5]}}
  do: drop
"""
OUTPUT = """
- name: output
  at: {site: encoder.output}
  score: {attention: {queries: all, layer: -1}}
  select: {top_k: {keep: 0.25}}
  do: drop
"""
PROJECTED = """
- name: projected
  at: {site: projector.output}
  score: {similarity: {stat: nearest, sign: -1}}
  select: {top_k: {keep: 0.25}}
  do: drop
"""
PICTURE = """
- name: picture
  at: {site: encoder.output, group: picture}
  score: {attention: {queries: visual}}
  select: {top_k: {keep: 0.25}}
  do: drop
"""
RAGGED = """
- name: ragged
  at: {site: encoder.layer.after_attention, layer: 0, group: picture}
  score: {norm: {}}
  select: {top_k: {keep: 0.4}}
  do: drop
"""
TOME = """
- name: tome
  at: {site: encoder.layer.after_attention, layers: all}
  score: {features: {space: keys}}
  select: {bipartite: {r: 7}}
  do: {merge: {mode: size_mean, carry_size: true, order: raster}}
"""
APPEND = """
- name: append
  at: {site: encoder.output}
  score: {norm: {}}
  select: {top_k: {keep: 0.25}}
  do: append
"""
TILES = "- {name: tiles, at: {site: projector.output, views: tiles}, do: withdraw}\n"
RANDOM = """
- name: random
  at: {site: encoder.output}
  score: random
  select: {top_k: {keep: 0.25}}
  do: drop
"""
EDITS = {
    "inside": INSIDE,
    "output": OUTPUT,
    "projected": PROJECTED,
    "picture": PICTURE,
    "ragged": RAGGED,
    "tome": TOME,
    "append": APPEND,
    "tiles": TILES,
    "random": RANDOM,
    "several": RAGGED + TOME + PICTURE + APPEND.replace("norm: {}", "norm: {p: 1.0}"),
}
RECORD = """
- name: looks
  at: {site: encoder.layer.attention, layers: all}
  record: [patch_importance, {patch_importance: {queries: visual, form: head_mean_logits, as: of_mean}}]
- name: sees
  at: {site: encoder.layer.after_attention, layers: all}
  record: [patch_norm, patch_similarity]
- {name: leaves, at: {site: encoder.output}, record: [{patch_norm: {as: norm_out}}]}
- {name: enters, at: {site: projector.output}, record: [{patch_norm: {as: norm_in}}]}
"""


def encode(
    backbone: Backbone, images: Sequence[Image.Image], probes: str, vocabulary: Vocabulary | None = None, **options: Any
) -> Encoded:
    """Pictures under probes written in YAML."""
    table = compile_recipe(parse_recipe(HEADER + probes), backbone.facts, vocabulary=vocabulary)
    return encode_with_probes(backbone, images, table, **options)


def plain(backbone: Backbone, image: Image.Image) -> Features:
    """A picture without any probe."""
    with torch.inference_mode():
        return backbone.encode_images([image])
