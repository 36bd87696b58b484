"""Selections: scores of one sample's visual tokens in, indices of the kept ones out. Pure functions.

They return `(k,)` int64 indices into the n alive visual tokens, best first, or a `Choice` where they know more (what a
token was matched to, which part of a combination chose it). Positional parameters name what they are given, of the
tokens that they choose from (inside a combination: of those that are left):

- `score (n,)`, `similarity (n, n)`, `features (n, d)`, float32: what the probe's score gave, by its kind; a selection
  inside another part may have a `score` of its own besides
- `text_score (t,)`: the probe's score (of `hidden` or `keys`) of the text rows behind the picture, instead
- `count`: how many to keep, worked out from `keep` (and `round`), see `counts`
- `n`: how many there are to choose from; `alive`, `candidate (n,)`: how many visual tokens there are in all, and which
  of them these are; `budget`: the `keep` of the combination around, None outside of one
- `protected (n,)` bool: tokens that the operation's `protect` names. A selection that does not ask for it chooses from
  the others, and they are kept besides
- `hidden`, `embedding`, `text_hidden`, `view`, `box`, `generator`: as for scores; `row (n,)`, `text_row (t,)`: where
  these tokens stand in the sequence; `columns`: tokens per row of the view's grid
"""

from __future__ import annotations

from probe.selections.bipartite import bipartite, deduplicate, merges_per_layer
from probe.selections.clustering import Clusters, cluster, clusters
from probe.selections.combinations import Pick, budget, dilate, then, union, window
from probe.selections.counts import Count, Keep, OptionalKeep, Rounding, token_count
from probe.selections.diverse import greedy_diverse
from probe.selections.pivots import pivots
from probe.selections.plain import all_kept, none_kept, stride, threshold, top_k
from probe.selections.ranking import ranked

__all__ = [
    "Clusters",
    "Count",
    "Keep",
    "OptionalKeep",
    "Pick",
    "Rounding",
    "all_kept",
    "bipartite",
    "budget",
    "cluster",
    "clusters",
    "deduplicate",
    "dilate",
    "greedy_diverse",
    "merges_per_layer",
    "none_kept",
    "pivots",
    "ranked",
    "stride",
    "then",
    "threshold",
    "token_count",
    "top_k",
    "union",
    "window",
]
