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
    "pyramiddrop": """
- name: edit
  at: {site: layer.input, layer: 2}
  score: {attention: {queries: last_prompt, projected: true}}
  select: {top_k: {keep: 0.25}}
  do: {drop: {lasts: forward}}
""",
    "merge": """
- name: edit
  at: {site: layer.after_attention, layer: 1}
  score: {features: {space: keys}}
  select: {bipartite: {r: 9}}
  do: {merge: {carry_size: true, lasts: forward}}
""",
    "merge_for_good": """
- name: edit
  at: {site: layer.output, layer: 1, steps: first}
  score: {norm: {p: 1.0}}
  select: {top_k: {keep: 0.25}}
  do: {merge: {assign: kept, lasts: generation}}
""",
    "append": """
- name: edit
  at: {site: before_lm}
  score: {norm: {p: 1.0}}
  select: {top_k: {keep: 0.25}}
  do: {append: {lasts: generation}}
""",
    "sparsevlm": """
- name: edit
  at: {site: layer.output, layers: [1, 2]}
  score: {attention: {queries: raters}}
  select: {top_k: {keep: [0.5, 0.25]}}
  do: {recycle: {positions: keep}}
""",
    "sparsevlm_for_good": """
- name: edit
  at: {site: layer.output, layer: 1, steps: {from: 50%}}
  score: {attention: {queries: raters_answer, form: head_mean_logits}}
  select: {top_k: {keep: 0.25}}
  do: {recycle: {positions: compact, lasts: generation}}
""",
    "skip": """
- name: edit
  at: {site: layer.input, layers: [1, 2]}
  do: skip_layers
""",
    "skip_some": """
- name: edit
  at: {site: layer.input, layer: 2}
  score: {attention: {layer: -1, queries: answer}}
  select: {top_k: {keep: 0.25}}
  do: skip_layers
""",
    "skip_as_keys": """
- name: edit
  at: {site: layer.input, layers: [1, 2]}
  do: {skip_layers: {as_keys: true}}
""",
    "reweight": """
- name: edit
  at: {site: layer.attention, layers: all}
  do: {reweight_attention: {from: [answer], to: [visual], factor: 3.0}}
""",
    "evict": """
- name: edit
  at: {site: layer.attention, layers: [1, 2], steps: first}
  do: {evict: {keep: 0.25, queries: answer}}
""",
    "rotary": """
- name: edit
  at: {site: layer.output, layer: 2}
  score: {attention: {queries: question, heads: {top: 2}, correct: rotary}}
  select: {top_k: {keep: 0.25}}
  do: {drop: {lasts: forward}}
""",
    "cluster": """
- name: edit
  at: {site: layer.output, layer: 1}
  score: {features: {space: hidden}}
  select: {cluster: {keep: 0.25}}
  do: {merge: {lasts: forward}}
""",
    "spare": """
- name: edit
  at: {site: layer.after_attention, layer: 1}
  score: {features: {space: keys}}
  select: {bipartite: {keep: 0.4, rounds: until, spare: {attention: {queries: question}}, strength: 10.0}}
  do: {merge: {lasts: forward}}
""",
    "skip_by_mass": """
- name: edit
  at: {site: layer.input, layers: all}
  score: {mass: {queries: answer, projected: true}}
  select: {threshold: {value: 0.8}}
  do: skip_layers
""",
    "withdraw_by_mass": """
- name: edit
  at: {site: layer.output, layers: all}
  score: {mass: {queries: question}}
  select: {threshold: {value: 0.8}}
  do: {withdraw: {lasts: forward}}
""",
    "when_sure": """
- name: edit
  at: {site: layer.input, layer: 1, when: {signal: attention_mass, from: answer, to: visual, below: 0.99}}
  score: {attention: {layer: -1, queries: answer}}
  select: {top_k: {keep: 0.25}}
  do: {drop: {lasts: generation}}
""",
    "when_committed": """
- name: edit
  at: {site: before_lm, steps: {from: 40%, of: committed}}
  score: random
  select: {top_k: {keep: 0.25}}
  do: {drop: {lasts: generation}}
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
