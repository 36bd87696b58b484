"""The sequence that is being denoised: prompt embeddings, answer slots, an optional fixed suffix.

Rows are addressed by their number at the start (`uid`); the layout says where they stand now. Nothing here knows the
model or the loop's rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from probe.backbones.base import Prompt
from probe.site import Plan, Role
from probe.surgery import Layout, Positions, hide, make_layout, narrow, put_values, resize, take


@dataclass(frozen=True)
class Canvas:
    """`embeds (batch, length, width)` and its layout; per sample (host): roles and prompt length at the start.

    `roles[b] (P + gen_length + suffix,)` int8 on the host; answer slots of sample b start at `prompt_length[b]`;
    `pictures[b] (V,)`, `boxes[b] (V, 4)`, `views[b] (V,)` say what every visual token sees;
    `originals[b]` is what a share of the visual tokens is a share of, `fates[b]` what became of each before the
    language model, if anything did (`Prompt`).
    """

    embeds: Tensor
    layout: Layout
    roles: tuple[Tensor, ...]
    prompt_length: tuple[int, ...]
    gen_length: int
    suffix_length: int
    n_visual_at_start: tuple[int, ...]
    pictures: tuple[Tensor, ...] = ()
    boxes: tuple[Tensor, ...] = ()
    views: tuple[Tensor, ...] = ()
    originals: tuple[int, ...] = ()
    fates: tuple[Tensor | None, ...] = ()

    @property
    def answer_rows(self) -> list[list[int]]:
        """Rows (at the start) of each sample's generated slots."""
        return [list(range(p, p + self.gen_length)) for p in self.prompt_length]

    def rows_of(self, role: Role, sample: int) -> list[int]:
        """Rows (at the start) of one role."""
        return (self.roles[sample] == int(role)).nonzero()[:, 0].tolist()

    def narrowed(self, plans: Sequence[Plan | None], *, positions: Positions) -> Canvas:
        """The canvas after the plans: without the visual tokens that they do not keep, with what they merged."""
        layout, index = narrow(self.layout, plans, positions=positions)
        embeds = put_values(take(self.embeds, index), layout, plans)
        return replace(self, embeds=embeds, layout=layout)

    def hidden(self, plans: Sequence[Plan | None]) -> Canvas:
        """The canvas with the keys of those tokens hidden, for good."""
        return replace(self, layout=hide(self.layout, plans))

    def resized(self, source: np.ndarray, fresh: np.ndarray, mask_embed: Tensor) -> Canvas:
        """Answer slots come and go (a batch of one): `source (slots,)` old slots, -1 for new masked ones.

        New slots get the row numbers `fresh`; the suffix stays behind them.
        """
        old_gen = self.layout.tail[0] - self.suffix_length
        tail = np.concatenate([source, old_gen + np.arange(self.suffix_length)])
        layout, index = resize(self.layout, tail, fresh)
        embeds = take(self.embeds, index)
        new = torch.from_numpy(np.flatnonzero(source < 0)).to(embeds.device)
        embeds[0, layout.length[0] - len(tail) + new] = mask_embed.to(embeds.dtype)
        return replace(self, embeds=embeds, layout=layout, gen_length=len(source))

    def write(self, rows: Tensor, embeds: Tensor, where: Tensor) -> None:
        """In place: rows `(batch, r)` (at the start) take `embeds (batch, r, width)` where `where (batch, r)`."""
        now = self.layout.locate(rows)[..., None].expand(-1, -1, self.embeds.shape[-1])
        old = self.embeds.gather(1, now)
        self.embeds.scatter_(1, now, torch.where(where[..., None], embeds.to(old.dtype), old))

    def unconditional(self, mask_embed: Tensor) -> Tensor:
        """Embeddings of the unguided stream: every prompt row, visual ones too, becomes the mask embedding."""
        prompt = (self.layout.role != int(Role.ANSWER)) & (self.layout.role != int(Role.PAD))
        return torch.where(prompt[..., None], mask_embed, self.embeds)


def make_canvas(prompts: Sequence[Prompt], mask_embed: Tensor, gen_length: int, suffix: Tensor | None = None) -> Canvas:
    """Prompts, then `gen_length` mask embeddings, then the suffix embeddings `(s, width)`; padded on the right."""
    tail = mask_embed.expand(gen_length, -1)
    if suffix is not None:
        tail = torch.cat([tail, suffix.to(tail.dtype)])
    answer = torch.full((tail.shape[0],), int(Role.ANSWER), dtype=torch.int8)
    nothing = torch.full((tail.shape[0],), -1, dtype=torch.int64)
    roles = tuple(torch.cat([p.role.cpu(), answer]) for p in prompts)
    visuals = [torch.cat([p.visual.cpu(), nothing]) for p in prompts]
    layout = make_layout(roles, visuals, mask_embed.device, _positions(prompts, tail.shape[0]), tail.shape[0])
    embeds = torch.nn.utils.rnn.pad_sequence([torch.cat([p.embeds, tail]) for p in prompts], batch_first=True)
    return Canvas(
        embeds=embeds,
        layout=layout,
        roles=roles,
        prompt_length=tuple(p.embeds.shape[0] for p in prompts),
        gen_length=gen_length,
        suffix_length=tail.shape[0] - gen_length,
        n_visual_at_start=tuple(p.n_visual for p in prompts),
        pictures=tuple(p.picture for p in prompts),
        boxes=tuple(p.box for p in prompts),
        views=tuple(p.view for p in prompts),
        originals=tuple(p.n_original for p in prompts),
        fates=tuple(p.fate for p in prompts),
    )


def _positions(prompts: Sequence[Prompt], tail: int) -> list[Tensor] | None:
    """`(P + tail[, axes])` of each sample; None where every prompt counts from 0."""
    if all(p.position is None and p.next_position is None for p in prompts):
        return None
    out = []
    for p in prompts:
        given = torch.arange(p.embeds.shape[0]) if p.position is None else p.position.cpu()
        behind = torch.arange(tail) + (int(given.max()) + 1 if p.next_position is None else p.next_position)
        out.append(torch.cat([given, behind.reshape(-1, *[1] * (given.dim() - 1)).expand(-1, *given.shape[1:])]))
    return out
