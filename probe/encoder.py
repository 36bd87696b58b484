"""Pictures through the image encoder, with a recipe's probes attached: hooks on its layers and on the projector.

`encode_with_probes` stands where `Backbone.encode_images` would. Without a probe in the encoder it is that call and
nothing else. The encoder runs once per sample, all views in one batch; probes shorten the views inside it (ToMe), after
it (TRIM, VisionZip) or after the projector, and later layers run on what is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from probe.backbones import visual_count
from probe.backbones.base import Backbone, Features, Prompt
from probe.backbones.placement import device_of
from probe.compile import ProbeTable
from probe.encoder_pass import EncoderPass
from probe.encoder_state import ViewState
from probe.errors import ProbeError
from probe.site import Site
from probe.timing import Stopwatch


@dataclass(frozen=True)
class Encoded:
    """A sample's features, the FLOPs that they cost (encoder and projector as executed, probes beside them), and the
    arrays of what was recorded on the way.
    """

    features: Features
    flops: float
    probe_flops: float = 0.0
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    view_picture: np.ndarray | None = None
    """`(view,)`: which picture each view shows, where probes acted in the encoder."""
    unpruned: int | None = None
    """Visual tokens of the pictures as they came, where the encoder was shown smaller ones."""
    nan_scores: dict[str, int] = field(default_factory=dict)
    """How many values of its scores were NaN, by probe; those without one are left out."""

    def assemble(self, backbone: Backbone, question: str, *, think: bool = False) -> Prompt:
        """The sample as the language model meets it; its budget is that of the pictures as they came."""
        prompt = backbone.assemble(question, self.features, think=think)
        return prompt if self.unpruned is None else replace(prompt, unpruned=self.unpruned)


@torch.inference_mode()
def encode_with_probes(
    backbone: Backbone,
    images: Sequence[Image.Image],
    table: ProbeTable,
    *,
    clip: bool = False,
    question: str = "",
    seed: int = 0,
    watch: Stopwatch | None = None,
) -> Encoded:
    """Encode the pictures of one sample, or the frames of a `clip`, under the probes of `table` in the encoder.

    `question` is what scores against a text compare with; `seed` belongs to the sample; time that probes take is
    charged to the `probe` section of `watch`.
    """
    see = backbone.encode_video if clip else backbone.encode_images
    shrunk, whole = resized(images, table, clip=clip), None
    if shrunk is not images:
        sizes = [image.size for image in images]
        images, whole = shrunk, visual_count(backbone.source, sizes, **backbone.load_options)
    if all(p.site is Site.IMAGES for p in table.encoder):
        features = see(images)
        return Encoded(features, backbone.encode_flops(features), unpruned=whole)
    dims, projector = backbone.encoder_cost, backbone.projector
    if dims is None or projector is None:
        raise ProbeError(f"no probe can act in the encoder of {backbone.facts.name}: its adapter does not say how")
    device = device_of(backbone.encoder_layers[0].layer)
    views = backbone.views(images, clip=clip)

    @cache
    def text() -> Tensor:
        state.flops["probe"] += backbone.text_flops(question)
        return backbone.embed_text(question)

    state = EncoderPass(
        backbone=backbone,
        table=table,
        views=views,
        dims=dims,
        watch=watch or Stopwatch(device),
        seed=seed,
        text=text,
        lead=int(backbone.facts.class_token),
        state=ViewState.fresh(views, device),
    )
    with ExitStack() as stack:
        stack.callback(state.release)
        for handle in _attach(backbone, state):
            stack.callback(handle.remove)
        features = see(images)
    if not state.state.pristine:
        features = replace(features, survivors=state.state.survivors())
    arrays = state.arrays if whole is None else state.arrays | {"visual_original": np.array(whole)}
    spent = float(state.flops["encode"]), float(state.flops["probe"])
    doubts = {name: int(count) for name, count in state.doubts.items()}
    said = {name: count for name, count in doubts.items() if count}
    return Encoded(features, *spent, arrays, views.picture.cpu().numpy(), whole, said)


def resized(images: Sequence[Image.Image], table: ProbeTable, *, clip: bool = False) -> Sequence[Image.Image]:
    """The pictures that the encoder is shown: the very ones that came, or made smaller by probes at `images`."""
    probe = next((p for p in table.encoder if p.site is Site.IMAGES and p.edit is not None), None)
    if probe is not None and clip:
        raise ProbeError(f"probe `{probe.name}` ({probe.place}) makes pictures smaller, not the frames of a clip")
    sizes = [table.shown(image.size) for image in images]
    if all(image.size == size for image, size in zip(images, sizes, strict=True)):
        return images
    return [image.resize(size, Image.Resampling.BICUBIC) for image, size in zip(images, sizes, strict=True)]


def _attach(backbone: Backbone, state: EncoderPass) -> list[Any]:
    """Hooks for one run of the encoder. A layer at which nothing acts only passes the mask of shorter views on."""
    handles: list[Any] = []
    for i, modules in enumerate(backbone.encoder_layers):

        def enter(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], i: int = i) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            with state.timed():
                mask = state.enter_layer(i, hidden)
            if mask is None:
                return None
            args, kwargs = args[:1], {**kwargs, "attention_mask": mask}
            return args, kwargs

        handles.append(modules.layer.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(modules.attention.register_forward_hook(lambda m, a, o, i=i: state.leave_attention(i)))
        if state.at(Site.ENCODER_LAYER_AFTER_ATTENTION, i):
            # as in the language model: the MLP runs on short views, its module reports zeros of the long shape, and the
            # layer's exit puts the short sum in place
            def shorten(module: Any, args: tuple[Tensor, ...], i: int = i) -> Any:
                with state.timed():
                    return (state.cut_between(i, args[0]), *args[1:])

            handles.append(modules.pre_mlp_norm.register_forward_pre_hook(shorten))
            handles.append(modules.mlp.register_forward_hook(lambda m, a, output: state.swallow_mlp(output)))

        def leave(module: Any, args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            hidden = state.leave_layer(hidden)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handles.append(modules.layer.register_forward_hook(leave))

    def before_projector(module: Any, args: tuple[Tensor, ...]) -> Any:
        with state.timed():
            return (state.leave_encoder(args[0]), *args[1:])

    def after_projector(module: Any, args: Any, output: Tensor) -> Tensor:
        with state.timed():
            return state.act(Site.PROJECTOR_OUTPUT, None, output, 0)

    projector = backbone.projector
    assert projector is not None
    handles.append(projector.register_forward_pre_hook(before_projector))
    handles.append(projector.register_forward_hook(after_projector))
    return handles
