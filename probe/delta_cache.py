"""Layers that keep what they add to every row, and in a pass compute it anew only for some (dLLM-Cache).

After Liu et al. (arXiv 2506.06295). A layer stores, for every row, its key (after rotary) and value, and what attention
and MLP added to the residual stream. The residual stream itself is always the whole sequence's and fresh. Which rows
are computed anew is the pass's plan (`decoding.policy.Delta`); of the answer it may be those whose new value is least
like the stored one, and each layer then chooses for itself.

Rows that an intervention removed are cut from all four. A layer that meets rows which it has not stored, or has at
other positions, computes the whole sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from probe.attend import answer_beside
from probe.backbones.base import LayerModules
from probe.decoding.dllm_cache import least_similar
from probe.decoding.policy import Delta
from probe.parallel import whole
from probe.project import rotated
from probe.surgery import Layout, put_columns, restore, take, take_columns

if TYPE_CHECKING:
    from probe.pass_state import PassState


@dataclass(frozen=True)
class _Held:
    """One layer: `key`, `value (streams * batch, key head, row, size)`; added `(streams * batch, row, width)`."""

    layout: Layout
    key: Tensor
    value: Tensor
    attention: Tensor
    mlp: Tensor


@dataclass(frozen=True)
class _Rows:
    """The same of the rows that a pass computed."""

    key: Tensor
    value: Tensor
    attention: Tensor
    mlp: Tensor


class DeltaStore:
    """What every layer of one batch has stored."""

    def __init__(self, layers: int) -> None:
        self.layers: list[_Held | None] = [None] * layers
        self._found: dict[tuple[int, int], tuple[Layout, Layout, Tensor | None]] = {}

    def at(self, layer: int, layout: Layout, streams: int) -> tuple[_Held, Tensor | None] | None:
        """What a layer stored of the rows of `layout`, in their order, and where that stands; None if it lacks some.

        A place of None stands for the whole.
        """
        held = self.layers[layer]
        if held is None or held.layout is layout:
            return None if held is None else (held, None)
        index = self._where(held.layout, layout)
        if index is None:
            return None
        some = _Held(
            layout,
            take_columns(held.key, index, streams),
            take_columns(held.value, index, streams),
            take(held.attention, index, streams),
            take(held.mlp, index, streams),
        )
        return some, index

    def _where(self, held: Layout, layout: Layout) -> Tensor | None:
        """Where the rows of `layout` stand in `held`; waits for the device, once for all layers that are alike."""
        known = self._found.get((id(held), id(layout)))
        if known is not None and known[0] is held and known[1] is layout:
            return known[2]
        n = max(held.length_at_start, layout.length_at_start)
        now = torch.full((held.batch, n + 1), -1, dtype=torch.int64, device=held.row.device)
        here = torch.arange(held.width, device=held.row.device).expand_as(held.row)
        now.scatter_(1, held.row.where(held.row >= 0, n), here)
        index = now.gather(1, layout.row.clamp(min=0))
        moved = take(held.position, index.clamp(min=0)) != layout.position
        same = ~(moved.any(-1) if moved.dim() > 2 else moved)
        fine = bool(((layout.row < 0) | ((index >= 0) & same)).all())
        found = index.clamp(min=0) if fine else None
        self._found = {k: v for k, v in self._found.items() if v[1] is layout}
        self._found[id(held), id(layout)] = (held, layout, found)
        return found


class _Fresh:
    """What a layer's attention takes for a key-value cache: puts fresh columns among the stored ones."""

    is_compileable = False

    def __init__(self, merge: Any) -> None:
        self._merge = merge

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Fresh keys (after rotary) and values in, all that the rows attend to out."""
        merged: tuple[Tensor, Tensor] = self._merge(key, value)
        return merged

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions are always given explicitly, so nothing is counted from here."""
        return 0


@contextmanager
def replaced(state: PassState, delta: Delta) -> Iterator[None]:
    """For the length of one forward, the layers run as described above. Their hooks stay in force."""
    modules = state.kit.backbone.layers
    before = [layer.layer.__dict__.get("forward") for layer in modules]
    try:
        for i, layer in enumerate(modules):
            layer.layer.__dict__["forward"] = partial(_on_its_device, state, delta, i, layer)
        yield
    finally:
        for layer, forward in zip(modules, before, strict=True):
            layer.layer.__dict__.pop("forward", None)
            if forward is not None:
                layer.layer.__dict__["forward"] = forward


def _on_its_device(
    state: PassState, delta: Delta, i: int, modules: LayerModules, hidden_states: Tensor, **kwargs: Any
) -> Tensor:
    """`_forward` with all that it is given on the layer's device, where a model is spread over several."""
    hook: Any = modules.layer.__dict__.get("_hf_hook")
    if hook is None:
        return _forward(state, delta, i, modules, hidden_states, **kwargs)
    (hidden_states,), kwargs = hook.pre_forward(modules.layer, hidden_states, **kwargs)
    done = _forward(state, delta, i, modules, hidden_states, **kwargs)
    return cast(Tensor, hook.post_forward(modules.layer, done))


def _forward(
    state: PassState, delta: Delta, i: int, modules: LayerModules, hidden_states: Tensor, **kwargs: Any
) -> Tensor:
    layout, streams = state.layout, state.streams
    store = state.kit.deltas
    found = None if delta.whole else store.at(i, layout, streams)
    if found is None:
        return _whole(state, i, modules, hidden_states, kwargs)
    held, index = found
    rows = _chosen_rows(state, delta, i, modules, held, hidden_states)
    state.note_rows(i, rows, delta)
    layer = _Layer(state, i, modules, held, hidden_states, kwargs)
    if rows is None:
        layer.without_rows()
        return hidden_states + held.attention + held.mlp
    fresh = layer.with_rows(rows)
    whole = store.layers[i]
    assert whole is not None
    now = _put(held, fresh, rows)
    # rows that are away for this pass only keep what was stored of them
    places = rows if index is None else index.to(rows.device).repeat(streams, 1).gather(1, rows)
    store.layers[i] = now if index is None else _put(whole, fresh, places)
    return hidden_states + now.attention + now.mlp


def _put(held: _Held, fresh: _Rows, places: Tensor) -> _Held:
    """What is held, with fresh rows at these places `(streams * batch, rows)`."""
    key, value = held.key.clone(), held.value.clone()
    put_columns(key, places, fresh.key)
    put_columns(value, places, fresh.value)
    attention, mlp = restore(held.attention, fresh.attention, places), restore(held.mlp, fresh.mlp, places)
    return replace(held, key=key, value=value, attention=attention, mlp=mlp)


def _whole(state: PassState, i: int, modules: LayerModules, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """The layer as it always runs, and what it added is stored."""
    seen: list[Tensor] = []

    def keep(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        seen.extend((key, value))
        return key, value

    layout = state.layout
    assert modules.pre_attention_norm is not None
    normed = modules.pre_attention_norm(hidden)
    added = modules.attention(hidden_states=normed, **{**kwargs, "past_key_values": _Fresh(keep)})[0]
    between = hidden + added
    mlp = modules.mlp(modules.pre_mlp_norm(between))
    state.kit.deltas.layers[i] = _Held(layout, seen[0], seen[1], added, mlp)
    state.note_rows(i, None, None)
    return between + mlp


def _chosen_rows(
    state: PassState, delta: Delta, i: int, modules: LayerModules, held: _Held, hidden: Tensor
) -> Tensor | None:
    """`(streams * batch, rows)`: where the rows stand that this layer computes; None: there are none."""
    layout, streams = held.layout, state.streams
    device, tail = hidden.device, layout.tail[0]
    starts = [n - t for n, t in zip(layout.length, layout.tail, strict=True)]
    start = torch.tensor(starts * streams, device=device)[:, None]
    parts = []
    if delta.prompt and max(starts):
        places = torch.arange(max(starts), device=device)
        parts.append(torch.where(places < start, places, start - 1))
    answer = start + torch.arange(tail, device=device)
    if delta.answer:
        parts.append(answer)
    elif int(tail * delta.ratio):
        assert modules.pre_attention_norm is not None
        own = answer[:, :, None].expand(-1, -1, hidden.shape[-1])
        new = cast(Any, modules.attention).v_proj(modules.pre_attention_norm(hidden.gather(1, own)))
        at = answer[:, None, :, None].expand(-1, held.value.shape[1], -1, held.value.shape[3])
        old = held.value.gather(2, at).transpose(1, 2).flatten(2)
        old, new = whole(modules.attention, old, -1), whole(modules.attention, new, -1)
        parts.append(start + least_similar(old, new, delta.ratio))
        state.note_values(i, tail)
    return torch.cat(parts, 1) if parts else None


class _Layer:
    """One layer in a pass that computes some of its rows."""

    def __init__(
        self, state: PassState, i: int, modules: LayerModules, held: _Held, hidden: Tensor, kwargs: dict[str, Any]
    ) -> None:
        self.state, self.i, self.modules, self.held, self.hidden, self.kwargs = state, i, modules, held, hidden, kwargs
        self.mask: Tensor | None = kwargs.get("attention_mask")

    def without_rows(self) -> None:
        """Nothing is computed; probes that look from some rows still do."""
        self._answer(self.held.key)
        self.state.leave_attention(self.i)

    def with_rows(self, rows: Tensor) -> _Rows:
        """These rows through attention, against all columns, and through the MLP."""
        held, modules = self.held, self.modules
        seen: list[Tensor] = []

        def put(fresh_key: Tensor, fresh_value: Tensor) -> tuple[Tensor, Tensor]:
            seen.extend((fresh_key, fresh_value))
            key, value = held.key.clone(), held.value.clone()
            put_columns(key, rows, fresh_key)
            put_columns(value, rows, fresh_value)
            self._answer(key)
            return key, value

        assert modules.pre_attention_norm is not None
        short = take(self.hidden, rows)
        cos, sin = self.kwargs["position_embeddings"]
        ids = self.kwargs.get("position_ids")
        given = {
            **self.kwargs,
            "attention_mask": _mask_of(self.mask, rows),
            "position_embeddings": (take(cos, rows), take(sin, rows)),
            "position_ids": ids if ids is None or ids.dim() != 2 else take(ids, rows),
            "past_key_values": _Fresh(put),
        }
        added = modules.attention(hidden_states=modules.pre_attention_norm(short), **given)[0]
        return _Rows(seen[0], seen[1], added, modules.mlp(modules.pre_mlp_norm(short + added)))

    def _answer(self, key: Tensor) -> None:
        """What probes asked of the layer's attention, from rows that it may not compute: their queries beside it."""
        attention: Any = self.modules.attention
        cos, sin = self.kwargs["position_embeddings"]
        norm = self.modules.pre_attention_norm
        assert norm is not None

        def queries(rows: Tensor) -> Tensor:
            normed, c, s = norm(take(self.hidden, rows)), take(cos, rows), take(sin, rows)
            c, s = c.expand(len(rows), -1, -1), s.expand(len(rows), -1, -1)
            size = c.shape[-1]
            parts = zip(normed, c, s, strict=True)
            return torch.stack([rotated(attention, "q", x, a, b, size) for x, a, b in parts])

        n = answer_beside(attention, queries, key, self.mask)
        self.state.note_queries(self.i, n)


def _mask_of(mask: Tensor | None, rows: Tensor) -> Tensor | None:
    """The mask `(batch, 1 or head, row, key)` of some rows."""
    if mask is None or mask.shape[2] == 1:
        return mask
    full = mask.expand(rows.shape[0], *mask.shape[1:])
    return full.gather(2, rows[:, None, :, None].expand(-1, full.shape[1], -1, full.shape[3]))
