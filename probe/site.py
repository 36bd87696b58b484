"""The vocabulary: roles of positions, the clock, the sites where a probe attaches, and the plan of an edit.

Read this file first. It imports nothing else of the package; everything else speaks in its terms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch


class Role(IntEnum):
    """What a position of the sequence is. Stored as int8; the values are written into traces."""

    SYSTEM = 0  # everything of the template before the first visual token
    VISUAL = 1  # an image feature
    NEWLINE = 2  # a learned row separator inside the visual span
    QUESTION = 3  # the user's text and the rest of the template
    ANSWER = 4  # a generated slot, masked or filled
    PAD = 5  # filler of a batch; never a key


SEGMENTS: tuple[str, ...] = ("system", "visual", "newline", "question", "answer")
"""Names of the key segments of `attention_mass`, indexed by `Role` (padding has none)."""


QuerySet = Literal[
    "answer",
    "masked",
    "filled",
    "predicting",
    "last",
    "last_prompt",
    "question",
    "system",
    "visual",
    "all",
    "raters",
    "raters_answer",
    "cls",
]
"""Which rows of the sequence look: all answer slots, those still masked, those filled, the rows whose logits predict
the masked slots (where logits are shifted, each the row before its slot), the last row of the sequence, the last row
before the answer, the question's, the system prompt's, the alive visual tokens', or every row. Only rows that the pass
computes count: in a cached pass a row that is not computed does not look. `raters` are the rows of the question that
matter to the picture (`probe.scores.raters`), `raters_answer` chooses them from question and answer slots together. In
an image encoder: the class token (`cls`, where it has one), the patches of a view (`visual`), or both (`all`)."""


Form = Literal["softmax", "head_mean_logits", "full_width"]
"""`softmax`: one distribution per head. `head_mean_logits`: scaled logits averaged over heads, then one softmax.
`full_width`: as if there were one head over the full width, `softmax(q k^T / sqrt(heads * size))`."""


class Fate(IntEnum):
    """What became of one original visual token at one (step, layer): exactly one of these."""

    KEPT = 1
    DROPPED = 2
    MERGED = 3
    WITHDRAWN = 4
    MASKED = 5  # still computed, but no query sees its key
    SKIPPED = 6  # carried around this layer unchanged, back after it
    EVICTED = 7  # not in the layer's cache, by the cache's own choice; back when it is refreshed


class Phase(StrEnum):
    """What a forward pass is for."""

    PREFILL = "prefill"
    DENOISE = "denoise"
    REFRESH = "refresh"
    PROBE = "probe"
    VERIFY = "verify"


@dataclass(frozen=True)
class Clock:
    """The address of one forward pass. The loop owns it; nothing else counts.

    `step` counts denoising steps over the whole generation, `nominal_steps` is how many were asked for
    (an adaptive decoder may run fewer or more), `pass_index` counts forwards, which differ from steps when
    guidance, refreshes or length probes add passes.
    """

    pass_index: int
    step: int
    block: int
    step_in_block: int
    nominal_steps: int
    n_blocks: int
    phase: Phase = Phase.DENOISE
    committed: tuple[float, ...] = ()
    """Per sample: the share of the answer slots that held a token before this pass."""

    @property
    def progress(self) -> float:
        """Steps begun before this one over nominal steps, in [0, 1): the default measure of `start: 50%`."""
        return self.step / self.nominal_steps


def first_step(fraction: float, nominal_steps: int) -> int:
    """The first step at which a fraction of the steps has been run: `ceil(fraction * steps)`.

    `first_step(0.5, 2) == 1`: one complete step, then the intervention.
    """
    return math.ceil(round(fraction * nominal_steps, 9))


class Site(StrEnum):
    """Where a probe can attach: in the image encoder (once per sample), or in one forward pass of the language model.

    In the encoder every view of a picture is a sequence of its own; `layer` counts the encoder's layers there.
    """

    IMAGES = "images"  # a sample's pictures, before they are cut into views
    ENCODER_LAYER_ATTENTION = "encoder.layer.attention"  # the attention rows of an encoder layer
    ENCODER_LAYER_AFTER_ATTENTION = "encoder.layer.after_attention"  # between attention and MLP of an encoder layer
    ENCODER_OUTPUT = "encoder.output"  # patch features of every view, before the projector
    PROJECTOR_OUTPUT = "projector.output"  # projected features of every view, before tiles are joined
    BEFORE_LM = "before_lm"  # the assembled sequence, before layer 0
    PREFIX_CACHE = "prefix_cache"  # stored keys and values, before a pass reads them; `layer`: whose keys are scored
    LAYER_INPUT = "layer.input"  # what enters a layer
    LAYER_ATTENTION = "layer.attention"  # the attention rows of the layer
    LAYER_AFTER_ATTENTION = "layer.after_attention"  # the residual stream between attention and MLP
    LAYER_OUTPUT = "layer.output"  # what leaves a layer
    FINAL = "final"  # after the final norm
    LOGITS = "logits"  # rows of answer slots through the head

    @property
    def has_layers(self) -> bool:
        """Whether the site exists once per layer (and a probe at it must name layers)."""
        return self.value.startswith(("layer.", "encoder.layer.")) or self is Site.PREFIX_CACHE

    @property
    def in_encoder(self) -> bool:
        """Whether the site lies before the language model, where pictures are encoded once, before the first step."""
        return self.value.startswith(("encoder.", "projector.")) or self is Site.IMAGES


EDIT_SITES: tuple[Site, ...] = (
    Site.ENCODER_LAYER_AFTER_ATTENTION,
    Site.ENCODER_OUTPUT,
    Site.PROJECTOR_OUTPUT,
    Site.BEFORE_LM,
    Site.PREFIX_CACHE,
    Site.LAYER_INPUT,
    Site.LAYER_AFTER_ATTENTION,
    Site.LAYER_OUTPUT,
    Site.FINAL,
)
"""Sites at which an intervention may remove visual tokens (`final`: for the steps after this one)."""


@dataclass(frozen=True)
class Choice:
    """What a selection says when it knows more than which tokens stay.

    `kept` is `(k,)` int64, indices into the n alive visual tokens, best first (or in the order in which the selection
    wants them to stand: `order: score`). `into` is `(n,)` int64 or None: the token, of those n, that each one was
    matched to (a kept one to itself, -1: to none). `part` is `(k,)` int64 or None: which of the `parts` of a
    combination chose each kept token (-1: none of them, it is protected).
    """

    kept: torch.Tensor
    into: torch.Tensor | None = None
    part: torch.Tensor | None = None
    parts: int = 0


@dataclass(frozen=True)
class Plan:
    """What an operation decided for one sample, as plain tensors over its n alive visual tokens.

    `kept` is `(k,)` int64, indices into the n alive visual tokens, in the order in which they shall stand; `appended`
    (m) new tokens, which have no original index, stand right behind them. `fate` says what becomes of the others.
    Where tokens are merged, `into` is `(n,)` int64: for every alive token its place 0..k+m-1 among kept and appended
    ones (a kept token's own place, the place of what it was merged into, or -1: gone, which is `Fate.DROPPED` whatever
    `fate` says). `values` is `(k+m, width)`, the new hidden states of kept and appended tokens; None: the kept ones are
    as they were (and m is 0). `size` is `(k+m,)` float32, how many original tokens stand behind each, for a log-size
    attention bias; None: sizes are not carried.
    """

    kept: torch.Tensor
    fate: Fate = Fate.DROPPED
    into: torch.Tensor | None = None
    values: torch.Tensor | None = None
    size: torch.Tensor | None = None
    appended: int = 0


@dataclass(frozen=True)
class Reweight:
    """A change of attention: the logits of keys of the roles `target`, seen from rows of the roles `source`, rise by
    `log factor` before the softmax, so their attention is multiplied by `factor` and every row still sums to 1.
    """

    source: tuple[str, ...]
    target: tuple[str, ...]
    factor: float


@dataclass(frozen=True)
class ModelFacts:
    """The sizes that a recipe is checked against, known without any weight.

    Of the image encoder: `encoder_layers` in use (0: none), `patches` of one view, whether a `class_token` stands
    before them, whether the checkpoint has a `text_tower` that shares a space with it, and the sites that it cannot
    offer, with the reason.
    """

    name: str
    layers: int
    heads: int
    width: int
    vocabulary: int
    encoder_layers: int
    patches: int = 0
    class_token: bool = False
    text_tower: bool = False
    refused: tuple[tuple[Site, str], ...] = ()


def refuse_encoder(why: str) -> tuple[tuple[Site, str], ...]:
    """What `ModelFacts.refused` says of an encoder that no probe acts in."""
    return tuple((site, why) for site in Site if site.in_encoder and site is not Site.IMAGES)
