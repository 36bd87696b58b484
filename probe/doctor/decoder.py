"""Checks of a decoder behind the adapter contract, without the engine: hooks, masks, positions, stored keys, rows.

The first line of each docstring is the text that is printed for it.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from probe import vocabulary as _registered  # noqa: F401  (the built-in policies must be known)
from probe.attend import RowRequest, ask, forget
from probe.doctor.patient import KeptKeys, NotHere, Patient, expect, modules_of, part

PASSED = ("position_embeddings", "attention_mask", "position_ids")
"""What a layer is given by keyword."""


def sites(patient: Patient) -> str:
    """Every layer's modules run once, in order, and their values add up to the layer's."""
    model, told = patient.backbone, patient.one
    ran: list[tuple[int, str]] = []
    values: dict[tuple[int, str], Any] = {}
    given: list[set[str]] = []
    with ExitStack() as stack:
        for i, layer in enumerate(model.layers):
            for name, module in modules_of(layer).items():

                def note(m: Any, args: Any, out: Any, at: tuple[int, str] = (i, name)) -> None:
                    ran.append(at)
                    values[at] = args[0] if at[1] == "pre_mlp_norm" else out

                stack.callback(module.register_forward_hook(note).remove)

            def enter(m: Any, args: Any, kwargs: dict[str, Any]) -> None:
                given.append({k for k in PASSED if k in kwargs})

            stack.callback(layer.layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
        last: list[Tensor] = []
        stack.callback(model.final_norm.register_forward_hook(lambda m, a, out: last.append(out)).remove)
        states = patient.whole(told)
    wanted = [(i, name) for i, layer in enumerate(model.layers) for name in modules_of(layer)]
    expect(ran == wanted, f"modules ran as {ran[:6]}..., the contract says {wanted[:6]}...")
    expect(len(last) == 1 and bool((last[0] == states).all()), "the states are not what the final norm gave, once")
    lacking = set(PASSED) - set[str].intersection(*given)
    expect(not lacking, f"layers are not given {sorted(lacking)} by keyword, so hooks cannot replace them")
    ids = model.row_ids(told.rows)
    for i, layer in enumerate(model.layers):
        out = values[i, "layer"]
        out = out[0] if isinstance(out, tuple) else out
        joined = layer.join(values[i, "pre_mlp_norm"], values[i, "mlp"], ids)
        patient.expect_close(joined, out, f"layer {i}: `join` of residual and MLP, and the layer's output")
    return f"{len(wanted)} modules of {len(model.layers)} layers; residual and MLP joined are each layer's output"


def mask(patient: Patient) -> str:
    """A row depends on exactly the rows that `sees` lets it see; padding is unseen."""
    model, told = patient.backbone, patient.one
    masks = model.sees(told.rows, told.rows)
    states, n = patient.whole(told), told.length
    written = [m[0, 0] for m in patient.written(masks, told)]
    reach = torch.eye(n, device=patient.device)
    for layer in model.layers:
        reach = ((written[layer.kind].float() @ reach + reach) > 0).float()
    first_slot, last = told.canvas.prompt_length[0], n - 1
    looked = sorted({0, 1, n // 2, first_slot - 1, first_slot, last})
    for j in looked:
        changed = told.embeds.clone()
        changed[0, j] += changed[0, j].roll(1) + 1
        other = patient.states(changed, told.rows, masks)[0]
        moved, depends = (other != states[0]).any(-1), reach[:, j] > 0
        blind = (depends & ~moved).nonzero().flatten().tolist()
        expect(not blind, f"row {blind[:1]} does not see row {j}, which `sees` lets it see")
        if not bool(depends.all()):
            patient.expect_close(
                other[~depends], states[0][~depends], f"rows that must not see row {j}, when it changes"
            )
    mutual = bool(reach[first_slot, last] > 0)
    expect(mutual != model.causal, f"causal is {model.causal}, but the first slot sees the last: {mutual}")
    ones = torch.ones(1, n, dtype=torch.bool, device=patient.device)
    for what, given in {
        "none": None,
        "a `(batch, key)` one": ones,
        "written out": patient.written(masks, told),
    }.items():
        spelled = patient.states(told.embeds, told.rows, given)
        patient.expect_close(spelled, states, f"states under the mask of `sees`, and under {what}")
    _padding(patient)
    pairs = f"{int(reach.sum())} of {n * n} pairs of rows depend" if reach.min() == 0 else "all rows see all"
    return f"{pairs}; rows {', '.join(map(str, looked))} of {n} changed one by one; padding unseen"


def _padding(patient: Patient) -> None:
    """Padded rows are changed, and real ones must not care; also where the mask is a list of keys."""
    both = patient.told(patient.prompts[:2])
    real = both.rows.real
    if real is None:
        raise NotHere("both samples have the same length")
    masks = patient.backbone.sees(both.rows, both.rows)
    runs = []
    for noise in (0.0, 3.0):
        embeds = torch.where(real[..., None], both.embeds, both.embeds + noise)
        runs.append(patient.states(embeds, both.rows, masks)[real])
    patient.expect_close(runs[1], runs[0], "real rows, when what stands in padding changes")
    keys_only = patient.states(both.embeds, both.rows, real)[real]
    patient.expect_close(keys_only, runs[0], "a `(batch, key)` mask, and the one of `sees`")


def rotary(patient: Patient) -> str:
    """Layers get `rotary()`, gaps and axes honoured; moving all positions is nothing."""
    model, told = patient.backbone, patient.one
    tables: list[tuple[Tensor, Tensor]] = []

    def note(m: Any, args: Any, kwargs: dict[str, Any]) -> None:
        tables.append(kwargs["position_embeddings"])

    def run(rows: Any) -> Tensor:
        tables.clear()
        with ExitStack() as stack:
            for layer in model.layers:
                stack.callback(layer.layer.register_forward_pre_hook(note, with_kwargs=True).remove)
            states = patient.states(told.embeds, rows, model.sees(rows, rows))
        wanted = model.rotary(told.embeds, rows.position)
        for i, layer in enumerate(model.layers):
            held, size = wanted[0][..., layer.tables].shape[-1], model.costs.at(i).head_size
            expect(held == size, f"layer {i} takes {held} columns of the rotary tables; its heads have {size}")
        for i, pair in enumerate(tables):
            for name, got, want in zip(("cos", "sin"), pair, wanted, strict=True):
                what = f"layer {i}: `{name}` as given, and `rotary()`"
                patient.expect_close(got.expand_as(want), want, what)
        return states

    position = told.rows.position
    plain = run(told.rows)
    moved = run(replace(told.rows, position=position + 5))
    patient.expect_close(moved, plain, "all positions moved by 5, and not moved")
    half = position.shape[1] // 2
    gap = torch.arange(position.shape[1], device=position.device) >= half
    far = gap.reshape(1, -1, *[1] * (position.dim() - 2)) * 7
    gapped = run(replace(told.rows, position=position + far))
    expect(bool((gapped != plain).any()), "a gap of 7 in the positions changes nothing")
    axes = position.shape[2] if position.dim() == 3 else 1
    for axis in range(axes if axes > 1 else 0):
        by = torch.zeros_like(position)
        by[:, half:, axis] = 7
        one = run(replace(told.rows, position=position + by))
        expect(bool((one != plain).any()), f"positions on axis {axis} are not looked at")
    share, much = patient.apart(moved, plain), patient.apart(gapped, plain)
    return f"{axes} {'axes' if axes > 1 else 'axis'}; moving by 5 changes {share:.0e}, a gap {much:.0e}"


def prefix(patient: Patient) -> str:
    """Rows behind stored keys of a prefix come out as in one pass over everything."""
    model, told = patient.backbone, patient.one
    n, p = told.length, told.canvas.prompt_length[0]
    before, behind = part(told.rows, slice(0, p)), part(told.rows, slice(p, n))
    whole = [m.clone() for m in patient.written(model.sees(told.rows, told.rows), told)]
    for m in whole:
        m[:, :, :p, p:] = False
    wanted = patient.states(told.embeds, told.rows, tuple(whole))
    store = KeptKeys()
    first = patient.states(told.embeds[:, :p], before, model.sees(before, before), store)
    patient.expect_close(first, wanted[:, :p], "rows of the prefix")
    store.frozen = True
    masks = model.sees(behind, told.rows)
    second = patient.states(told.embeds[:, p:], behind, masks, store)
    gap = patient.expect_close(second, wanted[:, p:], "rows behind stored keys, and in one pass")
    expect(store.get_seq_length() == p, "a pass over stored keys changed what is stored")
    return f"{n - p} rows over {p} stored ones differ by {gap:.0e}"


def _keep(into: list[Tensor], weights: Tensor, first: int) -> None:
    into.append(weights)


def rows(patient: Patient) -> str:
    """Attention rows beside the kernel, and states, are those of eager attention."""
    model, told = patient.backbone, patient.one
    looking = torch.tensor([0, told.canvas.prompt_length[0] - 1, told.length - 1], device=patient.device)

    def look() -> tuple[Tensor, list[list[Tensor]]]:
        beside: list[list[Tensor]] = [[] for _ in model.layers]
        with ExitStack() as stack:
            for layer, got in zip(model.layers, beside, strict=True):
                ask(layer.attention, [RowRequest(looking[None], "softmax", partial(_keep, got))])
                stack.callback(forget, layer.attention)
            return patient.whole(told), beside

    states, beside = look()
    maps: list[Tensor] = []
    with patient.eager(), ExitStack() as stack:
        for layer in model.layers:
            stack.callback(layer.attention.register_forward_hook(lambda m, a, out: maps.append(out[1])).remove)
        plain, beside_eager = look()
    patient.expect_close(plain, states, "states with the eager kernel, and with the model's")
    gap = 0.0
    for i, square in enumerate(maps):
        expect(len(beside[i]) == 1, f"layer {i} answers {len(beside[i])} times; does it go through `probe.attend`?")
        expect(square is not None, f"layer {i}: attention does not hand on its weights as the second value")
        wanted = square[:, :, looking].float()
        for what, got in {"the kernel": beside[i], "eager attention": beside_eager[i]}.items():
            if patient.precise or got is beside_eager[i]:  # else rounding of layers before adds up
                gap = max(gap, patient.expect_close(got[0], wanted, f"layer {i}: rows beside {what}, and eager ones"))
    return f"3 rows of {len(maps)} layers differ by {gap:.0e}"


CHECKS = (sites, mask, rotary, prefix, rows)
