"""Denoising loops as one would write them in plain PyTorch: what the engine is compared with.

They call the backbone's decoder and head, and nothing else of this package: no canvas, no layout, no hooks, no
attention function that looks at rows. One sample, one block, the same number of tokens in every step, most confident
first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from probe.backbones.base import Backbone, Prompt
from probe.site import SEGMENTS, Role

Tokens = list[list[int]]
"""The answer after every step."""


@dataclass
class Looked:
    """A loop's tokens and confidence `(step, slot)`, NaN where a slot is not open, and what it recorded beside them:
    `(step, layer, segment)`, `(step, layer, visual)`, `(step, slot)`.
    """

    tokens: Tokens = field(default_factory=list)
    confidence: list[Tensor] = field(default_factory=list)
    mass: list[list[Tensor]] = field(default_factory=list)
    importance: list[list[Tensor]] = field(default_factory=list)
    entropy: list[Tensor] = field(default_factory=list)


def even(slots: int, steps: int) -> list[int]:
    """How many tokens each step commits: the remainder goes to the first ones."""
    return [slots // steps + (i < slots % steps) for i in range(steps)]


class _Answer:
    """The sequence `(1, length, width)` and its answer, which a step writes into."""

    def __init__(self, model: Backbone, prompt: Prompt, slots: int) -> None:
        self.model, self.first = model, prompt.embeds.shape[0]
        device = prompt.embeds.device
        self.mask = model.special.mask
        self.banned = list(model.special.suppressed)
        mask_embed = model.embed(torch.tensor(self.mask, device=device))
        self.embeds = torch.cat([prompt.embeds, mask_embed.expand(slots, -1)])[None]
        self.position = model.position_ids(torch.arange(self.embeds.shape[1], device=device)[None])
        self.tokens = torch.full((slots,), self.mask, device=device)

    def hidden(self, **more: Any) -> Any:
        """The decoder's output."""
        return self.model.lm(
            inputs_embeds=self.embeds, position_ids=self.position, attention_mask=None, use_cache=False, **more
        )

    def open(self) -> Tensor:
        """`(n,)`: the slots that are masked."""
        return (self.tokens == self.mask).nonzero()[:, 0]

    def commit(self, at: Tensor, candidate: Tensor, sure: Tensor, count: int, out: Looked) -> None:
        """Write the `count` most confident candidates of slots `at`, and note the answer as it is then."""
        best = sure.sort(descending=True, stable=True).indices[:count]
        self.tokens[at[best]] = candidate[best]
        self.embeds[0, self.first + at[best]] = self.model.embed(candidate[best])
        out.tokens.append(cast("list[int]", self.tokens.tolist()))
        out.confidence.append(self.everywhere(at, sure))

    def everywhere(self, at: Tensor, values: Tensor) -> Tensor:
        """`(slots,)` float64: values of slots `at`, NaN elsewhere."""
        return values.new_full(self.tokens.shape, torch.nan, dtype=torch.float64).index_copy(0, at, values.double())


@torch.inference_mode()
def minimal(model: Backbone, prompt: Prompt, slots: int, steps: int) -> Looked:
    """The loop and nothing beside it: open rows meet the head, softmax in float64."""
    answer, out = _Answer(model, prompt, slots), Looked()
    for count in even(slots, steps):
        hidden = answer.hidden().last_hidden_state
        at = answer.open()
        logits = model.head(hidden[0, answer.first + at - model.shift])
        logits[:, answer.banned] = -torch.inf
        candidate = logits.argmax(-1)
        sure = logits.double().softmax(-1).gather(1, candidate[:, None])[:, 0]
        answer.commit(at, candidate, sure, count, out)
    return out


@torch.inference_mode()
def published(model: Backbone, prompt: Prompt, slots: int, steps: int) -> Looked:
    """The same as the published loops do it: every row of the sequence through the head, float64 softmax of all."""
    answer, out = _Answer(model, prompt, slots), Looked()
    for count in even(slots, steps):
        hidden = answer.hidden().last_hidden_state
        logits = model.head(hidden)
        logits[..., answer.banned] = -torch.inf
        candidate = logits.argmax(-1)
        sure = logits.double().softmax(-1).gather(-1, candidate[..., None])[0, :, 0]
        at = answer.open()
        rows = answer.first + at - model.shift
        answer.commit(at, candidate[0, rows], sure[rows], count, out)
    return out


@torch.inference_mode()
def eager(model: Backbone, prompt: Prompt, slots: int, steps: int) -> Looked:
    """The loop with `output_attentions=True`: every layer's square map, reduced once the forward is over.

    Records the attention mass and visual importance of the answer's rows in every layer, confidence and entropy.
    """
    answer, out = _Answer(model, prompt, slots), Looked()
    tail = prompt.role.new_full((slots,), int(Role.ANSWER))
    segment = torch.cat([prompt.role, tail]).long()
    segments = torch.nn.functional.one_hot(segment, len(SEGMENTS) + 1)[:, : len(SEGMENTS)].float()
    visual = prompt.visual.argsort(stable=True)[-prompt.n_visual :]
    with kernel(model, "eager"):
        for count in even(slots, steps):
            result = answer.hidden(output_attentions=True)
            received = [m[0, :, answer.first :].float().mean((0, 1)) for m in result.attentions]
            out.mass.append([r @ segments for r in received])
            out.importance.append([r[visual] for r in received])
            at = answer.open()
            logits = model.head(result.last_hidden_state[0, answer.first + at - model.shift])
            logits[:, answer.banned] = -torch.inf
            candidate = logits.argmax(-1)
            sure = logits.double().softmax(-1).gather(1, candidate[:, None])[:, 0]
            log_p = logits.log_softmax(-1)
            out.entropy.append(answer.everywhere(at, -(log_p.exp() * log_p.where(log_p > -torch.inf, 0)).sum(-1)))
            answer.commit(at, candidate, sure, count, out)
    return out


@torch.inference_mode()
def without(model: Backbone, prompt: Prompt, slots: int, steps: int, there: Tensor, *, compact: bool) -> Looked:
    """The loop on a sequence that visual tokens are cut out of by hand, layer by layer.

    `there (step, layer, visual)` bool says which tokens each layer computes. A row that leaves is gone for the rest of
    its forward; `compact` numbers the positions anew where rows are missing from the first layer on.
    """
    answer, out, device = _Answer(model, prompt, slots), Looked(), prompt.embeds.device
    index = torch.cat([prompt.visual, prompt.visual.new_full((slots,), -1)])
    for step, count in enumerate(even(slots, steps)):
        seen = [(index < 0) | there[step, i].to(device)[index.clamp(min=0)] for i in range(there.shape[1])]
        rows = seen[0].nonzero()[:, 0]
        hidden = answer.embeds[:, rows]
        position = torch.arange(rows.shape[0], device=device) if compact else rows
        ids = model.position_ids(position[None])
        cos, sin = model.rotary(hidden, position[None])
        for modules, alive in zip(model.layers, seen, strict=True):
            stays = alive[rows]
            if not bool(stays.all()):
                rows, hidden = rows[stays], hidden[:, stays]
                cos, sin, ids = cos[:, stays], sin[:, stays], ids[:, stays]
            hidden = modules.layer(hidden, attention_mask=None, position_ids=ids, position_embeddings=(cos, sin))
        hidden = model.final_norm(hidden)
        place = torch.zeros_like(index).index_copy(0, rows, torch.arange(rows.shape[0], device=device))
        at = answer.open()
        logits = model.head(hidden[0, place[answer.first + at - model.shift]])
        logits[:, answer.banned] = -torch.inf
        candidate = logits.argmax(-1)
        sure = logits.double().softmax(-1).gather(1, candidate[:, None])[:, 0]
        answer.commit(at, candidate, sure, count, out)
    return out


@contextmanager
def kernel(model: Backbone, name: str) -> Iterator[None]:
    """The decoder with another attention implementation of transformers'."""
    config = cast(Any, model.lm).config
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
