"""Operations: what becomes of the visual tokens that a selection did not keep. Pure functions.

An operation turns kept indices into a `Plan` (`probe.site`), which surgery carries out. Its positional parameters name
what it is given, of one sample with n alive visual tokens:

- `kept (k,)` int64: what the selection kept, best first; `into (n,)`, `part (k,)`: what else a `Choice` says, or None
- `hidden (n, width)`: hidden states at the probe's site; `size (n,)` float32: how many original tokens stand behind
  each
- `size` at the site `images`: (width, height) of a picture in pixels; the operation gives the size that it shall have
- `score (n,)` float32: the probe's score, where it gives one number per token
- `noise`: a function of m that gives `(m,)` uniform numbers in [0, 1), seeded per sample, probe and step

Options that they share:

- `positions: keep | compact`: survivors keep their rotary positions, or are renumbered 0..n-1.
- `order: raster | score | parts`: survivors stand as they stood; in the order of the selection (`unmerged_first` is
  another name for it: what `bipartite` says first is what it did not match); or part by part of a combination, each as
  it stood.
- `lasts: forward | generation`: the tokens are back at the next step (and the choice is made anew there), or gone for
  good.
- `answer_positions: original | shrunk`: with a prefix cache, the answer slots keep their positions, or move up by what
  was taken out of the cache (what the study's release does on LaViDa).
- `on_cache: refresh | columns`: when tokens leave for good while a cache is alive, the other rows are computed anew
  without them, or only their keys and values are taken out.
- `protect: [newline, cls]`: row separators, or the encoder's class token, always stay (and count as kept).
"""

from __future__ import annotations

from probe.operations.attention import evict, mask, reweight_attention, skip_layers
from probe.operations.merging import append, merge
from probe.operations.options import AnswerPositions, Lasts, OnCache, Ordering, Protect
from probe.operations.pictures import resize
from probe.operations.plans import sources, unmerge
from probe.operations.recycling import recycle
from probe.operations.removing import drop, withdraw

__all__ = [
    "AnswerPositions",
    "Lasts",
    "OnCache",
    "Ordering",
    "Protect",
    "append",
    "drop",
    "evict",
    "mask",
    "merge",
    "recycle",
    "resize",
    "reweight_attention",
    "skip_layers",
    "sources",
    "unmerge",
    "withdraw",
]
