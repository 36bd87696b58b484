"""Interventions at every site, for the identities to hold on."""

from __future__ import annotations

EDITS: dict[str, str] = {
    "fastv": """
- name: edit
  at: {site: layer.input, layer: 2}
  score: {attention: {layer: -1, queries: last}}
  select: {top_k: {keep: 0.25}}
  do: {drop: {lasts: forward}}
""",
    "fastv_late_for_good": """
- name: edit
  at: {site: layer.input, layer: 2, steps: {from: 50%}}
  score: {attention: {layer: -1, queries: masked}}
  select: {top_k: {keep: 0.25}}
  do: {drop: {lasts: generation}}
""",
    "between": """
- name: edit
  at: {site: layer.after_attention, layer: 1}
  score: {attention: {queries: all, form: head_mean_logits}}
  select: {top_k: {keep: 0.25}}
  do: {drop: {lasts: forward}}
""",
    "between_compact_for_good": """
- name: edit
  at: {site: layer.after_attention, layer: 1}
  score: {attention: {queries: question}}
  select: {top_k: {keep: 0.25}}
  do: {drop: {positions: compact, order: score, lasts: generation}}
""",
    "output": """
- name: edit
  at: {site: layer.output, layer: 0}
  score: {norm: {p: 1.0}}
  select: {top_k: {keep: 0.25}}
  do: {drop: {lasts: forward}}
""",
    "divprune": """
- name: edit
  at: {site: before_lm}
  score: {similarity: {space: embedding}}
  select: {greedy_diverse: {keep: 0.25}}
  do: {drop: {lasts: generation}}
""",
    "random": """
- name: edit
  at: {site: before_lm, steps: {from: 25%}}
  score: random
  select: {top_k: {keep: 0.25}}
  do: {drop: {lasts: forward}}
""",
    "progressive": """
- name: edit
  at: {site: final, steps: {at: [25%, 50%]}}
  score: {similarity: {stat: nearest, sign: -1}}
  select: {top_k: {keep: 0.25}}
  do: {drop: {lasts: generation}}
""",
    "two_layers": """
- name: edit
  at: {site: layer.input, layers: [1, 3]}
  score: {attention: {layer: -1, queries: answer}}
  select: {top_k: {keep: 0.25}}
  do: {drop: {lasts: forward}}
""",
    "withdraw": """
- name: edit
  at: {site: layer.input, layer: 50%}
  do: withdraw
""",
}

LAYER_EDITS = [name for name, text in EDITS.items() if "site: layer" in text]

RECORD = """
- name: attention
  at: {site: layer.attention, layers: all}
  record: [attention_mass, visual_importance]
- name: logits
  at: {site: logits}
  record: [entropy, margin]
"""
