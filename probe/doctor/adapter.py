"""Checks of what an adapter says: its tensors' names, its sizes, its sequences, its encoder.

The first line of each docstring is the text that is printed for it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from probe import vocabulary as _registered  # noqa: F401  (the built-in policies must be known)
from probe.backbones import facts_of, visual_count
from probe.backbones.base import Prompt
from probe.backbones.checkpoint import INDEX, Checkpoint
from probe.doctor.patient import PICTURES, NotHere, Patient, expect
from probe.errors import ProbeError
from probe.registry import cachings, unmaskings
from probe.site import Role

SMALL = 64 << 20
"""Bytes of weights up to which copies of a checkpoint are made to try wrong names on."""


def keys(patient: Patient) -> str:
    """Weights are read by published names; a missing, extra or misshapen one is refused."""
    model, checkpoint = patient.backbone, patient.checkpoint
    held = [*model.named_parameters(), *model.named_buffers()]
    empty = [name for name, value in held if value.is_meta]
    expect(not empty, f"{len(empty)} tensors were never filled, first {empty[:1]}")
    wild = [name for name, value in held if value.is_floating_point() and not value.isfinite().all()]
    expect(not wild, f"{len(wild)} tensors have numbers that are not finite, first {wild[:1]}")
    if checkpoint is None:
        return f"{len(held)} tensors filled; no checkpoint to try names on"
    with checkpoint.tensors() as tensors:
        shapes = dict(tensors.shapes)
    size = sum(path.stat().st_size for path in checkpoint.files)
    if size > SMALL:
        return f"{len(shapes)} stored tensors read; wrong names are tried on --random-weights"
    name = max((n for n, shape in shapes.items() if len(shape) == 2), key=lambda n: (n.count("."), n))
    for what, change in WRONG.items():
        with _changed(checkpoint, name, change) as wrong:
            try:
                type(model).from_checkpoint(wrong, **patient.options)  # type: ignore[attr-defined]
            except ProbeError as error:
                said = "doctor.extra" if what == "extra" else name
                expect(_names(str(error), said), f"a {what} tensor is refused, but the message does not name {said}")
            else:
                expect(False, f"a checkpoint with a {what} tensor ({name}) was loaded")
    return f"{len(shapes)} stored tensors read; {', '.join(WRONG)} ones are refused by name"


def _names(message: str, name: str) -> bool:
    """Whether a message names a tensor, whatever the module before it is called today."""
    return ".".join(name.split(".")[-4:]) in message


WRONG: dict[str, Any] = {
    "missing": lambda weights, name: weights.pop(name),
    "extra": lambda weights, name: weights.update({"doctor.extra": torch.zeros(2)}),
    "misshapen": lambda weights, name: weights.update({name: weights[name][:, 1:].contiguous()}),
}


@contextmanager
def _changed(checkpoint: Checkpoint, name: str, change: Any) -> Iterator[Checkpoint]:
    """A copy of a checkpoint, as one file, with something done to one of its tensors."""
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "checkpoint"
        kept = [p for p in checkpoint.folder.iterdir() if p.suffix != ".safetensors" and p.name != INDEX]
        folder.mkdir()
        for path in (p for p in kept if p.is_file()):
            shutil.copyfile(path, folder / path.name)
        with checkpoint.tensors() as tensors:
            weights = {key: tensors.read(key).clone() for key in tensors.shapes}
        change(weights, name)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        yield Checkpoint(folder, checkpoint.source)


def facts(patient: Patient) -> str:
    """Sizes, special ids and defaults are those of the modules and registries."""
    model, said = patient.backbone, patient.backbone.facts
    found = {
        "layers": len(model.layers),
        "encoder_layers": len(model.encoder_layers),
        "width": patient.mask_embed.shape[-1],
    }
    logits = model.head(patient.whole(patient.one)[:, -1:])
    found["vocabulary"] = logits.shape[-1]
    for name, number in found.items():
        expect(getattr(said, name) == number, f"facts.{name} is {getattr(said, name)}, the model has {number}")
    expect(logits.dtype == torch.float32, f"the head gives {logits.dtype}; the contract says float32")
    expect(model.costs.layers == said.layers, f"costs.layers is {model.costs.layers} of {said.layers} layers")
    special = model.special
    for i in (special.mask, special.eos, special.stop, *special.suppressed):
        expect(0 <= i < said.vocabulary, f"special id {i} is outside of the {said.vocabulary} rows of the head")
    expect(not model.training, "the model is in training mode; call eval()")
    expect(not any(p.requires_grad for p in model.parameters()), "parameters ask for gradients")
    for registry, given in ((unmaskings, model.defaults.unmask), (cachings, model.defaults.cache)):
        ((name, settings),) = given.items()
        expect(name in registry, f"the default {registry.kind} policy `{name}` is not registered")
        registry[name].function(**settings)
    if patient.checkpoint is not None:
        small = facts_of(patient.checkpoint.folder)
        told = replace(small, name=said.name)
        expect(told == said, f"without weights the sizes are {told}, with them {said}")
    decodes = ", ".join(f"{n}" for g in (model.defaults.unmask, model.defaults.cache) for n in g)
    return f"{said.layers} layers of width {said.width}, {said.vocabulary} tokens; decodes by {decodes}"


def roles(patient: Patient) -> str:
    """Every position has a role; visual tokens stand in order and are counted rightly."""
    model = patient.backbone
    counts = []
    for prompt in patient.prompts:
        _roles_of(prompt)
        text = prompt.visual < 0
        if patient.speaks:
            same = model.embed(prompt.ids[text])
            expect(bool((prompt.embeds[text] == same).all()), "text rows are not the embeddings of their ids")
        counts.append(prompt.n_visual)
    if not patient.speaks:
        return "no tokenizer: only the layout of a random sample was looked at"
    alone = model.encode([], "What is it?")
    _roles_of(alone)
    expect(alone.n_visual == 0, f"a question without pictures has {alone.n_visual} visual tokens")
    expect(bool((alone.role == int(Role.SYSTEM)).any()), "a question without pictures has no system rows")
    expect(isinstance(model.decode(model.tokenize("red")), str), "decode gives no text")
    if not patient.sees_pictures:
        return "text alone: it takes no pictures"
    expect(min(counts) > 0, "a picture has no visual tokens")
    if patient.checkpoint is not None:
        sizes = [patient.picture(size).size for size in PICTURES]
        for size, count in zip(sizes, counts, strict=True):
            told = visual_count(patient.checkpoint.folder, [size])
            expect(told == count, f"a picture of {size}: {told} tokens are promised without weights, {count} made")
    seen = ", ".join(map(str, counts))
    return f"{seen} visual tokens of pictures {', '.join(f'{w}x{h}' for w, h in PICTURES)}"


def _roles_of(prompt: Prompt) -> None:
    """Raise `Unwell` where the parts of a prompt do not agree."""
    n, count = prompt.embeds.shape[0], prompt.n_visual
    for name in ("ids", "role", "visual"):
        expect(getattr(prompt, name).shape == (n,), f"`{name}` has the shape {tuple(getattr(prompt, name).shape)}")
    for name in ("view", "picture"):
        expect(getattr(prompt, name).shape == (count,), f"`{name}` is not there for each of {count} visual tokens")
    known = [int(r) for r in (Role.SYSTEM, Role.VISUAL, Role.NEWLINE, Role.QUESTION)]
    strange = set(prompt.role.tolist()) - set(known)
    expect(not strange, f"positions have the roles {sorted(strange)}, which a prompt cannot have")
    seen = (prompt.role == int(Role.VISUAL)) | (prompt.role == int(Role.NEWLINE))
    expect(bool((seen == (prompt.visual >= 0)).all()), "`visual` does not number exactly the visual positions")
    order = prompt.visual[prompt.visual >= 0].tolist()
    expect(order == list(range(count)), "visual tokens are not numbered 0..V-1 in the order in which they stand")
    expect(bool(((prompt.ids < 0) == seen).all()), "`ids` is negative elsewhere than at visual positions")
    bare = prompt.role[seen] == int(Role.NEWLINE)
    expect(bool((prompt.box.isnan().all(-1) == bare).all()), "`box` is not missing exactly at newlines")
    box = prompt.box[~bare]
    inside = (box >= 0).all() & (box <= 1 + 1e-6).all() & (box[:, 0] < box[:, 2]).all() & (box[:, 1] < box[:, 3]).all()
    expect(bool(inside), "a `box` is empty or lies outside of its picture")
    expect(bool((prompt.picture.diff() >= 0).all()), "`picture` does not count upwards")
    if prompt.position is not None:
        expect(prompt.position.shape[0] == n, f"`position` has {prompt.position.shape[0]} rows of {n}")


def encoder(patient: Patient) -> str:
    """Encoder and projector run once for all views; FLOPs are those of torch's counter."""
    from torch.utils.flop_counter import FlopCounterMode

    model, images = patient.backbone, [patient.picture(PICTURES[0])]
    if not patient.sees_pictures:
        raise NotHere("it takes no pictures")
    ran: list[int] = []
    with patient.eager(), ExitStack() as stack:
        modules = [*(layer.layer for layer in model.encoder_layers), *([model.projector] if model.projector else [])]
        for i, module in enumerate(modules):
            stack.callback(module.register_forward_hook(lambda m, a, o, i=i: ran.append(i)).remove)  # type: ignore[misc]
        with FlopCounterMode(display=False) as counter:
            features = model.encode_images(images)
    expect(ran == list(range(len(modules))), f"layers (and the projector) ran as {ran}")
    told, counted = model.encode_flops(features), counter.get_total_flops()
    expect(told == counted, f"encode_flops says {told:.0f}, torch's counter {counted}")
    said = f"{len(model.encoder_layers)} layers, {counted / 1e6:.2f} MFLOPs"
    if model.projector is None:
        return f"{said}; no probe acts in it"
    cut, shape = model.views(images), features.projected.shape[:2]
    expect(
        cut.box.shape[:2] == shape, f"`views` tells of {tuple(cut.box.shape[:2])} views and patches of {tuple(shape)}"
    )
    expect(model.encoder_cost is not None, "there is a projector for probes to act around, but no `encoder_cost`")
    if patient.speaks:
        count, promised = model.encode(images, "What is it?").n_visual, sum(cut.tokens)
        expect(count == promised, f"`views` promises {promised} visual tokens, {count} were made")
    return f"{said}, {shape[0]} views of {shape[1]} patches"


CHECKS = (keys, facts, roles, encoder)
