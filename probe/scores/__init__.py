"""Scores: how much each visual token of one sample is worth. Pure functions; higher means keep.

A score returns `(n,)` float32, one number per alive visual token; or `(n, n)`, one per pair (`kind="pairwise"`); or
`(n, d)`, vectors that a selection compares tokens by (`kind="features"`). Its positional parameters name what it is
given, of one sample with n alive visual tokens (or of one view inside the image encoder):

- `n`, `original`: how many are alive; how many the sample (in the encoder: the view) began with
- `hidden (n, width)`: hidden states at the probe's site; `layer_input (n, width)`: as they entered the probe's layer;
  `embedding (n, width)`: as they entered the language model
- `keys (head, n, size)`: keys as the layer that `layer` names stores them: after rotary embedding, key-value heads
- `received (head, n)` float32: attention received in the layer that `layer` names, averaged over the rows that
  `queries` names, in the `form` asked for (1 head for `head_mean_logits`); `n_queries`: how many rows that is;
  `rotary_received (n,)`: the same average if all queries and keys were vectors of ones (`ones_attention`)
- `box (n, 4)`, `view (n,)`: what each token sees, as (x0, y0, x1, y1) fractions of its picture, NaN for newlines; which
  view it came from, 0 for the base view
- `group (n,)` int64: the group within which a score compares (`budget` sets it; otherwise all are 0)
- `text_hidden (t, width)`: hidden states, at the site, of the text behind the picture (question, end of the template)
- `image_features (n, p)`, `text_features (p,)`: tokens and question in the common space of an encoder's two towers
- `layer_index`: the probe's layer; `generator`: seeded per sample, probe and step

Scores with a parameter `layer` read the attention or keys of that layer, relative to the probe's own. A score with
matrix products of its own says what they cost: `@scores.register(flops=function)`, a function of (n, width), or of
one mapping of everything that it was given. `reads=function of the parameters` says which of its inputs it looks at.
"""

from __future__ import annotations

from probe.scores.attention import attention, heads_with_most, mass
from probe.scores.combine import Scorer, Vectors, combine
from probe.scores.learned import learned
from probe.scores.norm import norm
from probe.scores.position import center, random, thumbnail, uniform
from probe.scores.raters import raters, relevance
from probe.scores.rotary import ones_attention
from probe.scores.similarity import features, similarity
from probe.scores.text_image import text_image
from probe.scores.transport import transport

__all__ = [
    "Scorer",
    "Vectors",
    "attention",
    "center",
    "combine",
    "features",
    "heads_with_most",
    "learned",
    "mass",
    "norm",
    "ones_attention",
    "random",
    "raters",
    "relevance",
    "similarity",
    "text_image",
    "thumbnail",
    "transport",
    "uniform",
]
