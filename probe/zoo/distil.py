"""Towers that see as the shipped miniature's does: same features, another class or finer patches.

The contrast miniatures are of other classes than the first one, and these want other towers: LLaVA-NeXT a CLIP with
a class token and a norm before its layers, LaViDa a SigLIP whose patches are pooled two by two behind the projector.
Neither is taught anew. Each starts from the first miniature's layers and learns to give, for every patch, the feature
that the first tower gives for the patch at that place: distillation by a squared error, in units of each dimension's
variance. Patches of half the side learn the feature of the patch that they lie in, so that pooling them gives it back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from probe.zoo.engine import MixedTrainer, schedule
from probe.zoo.tower import Pool, Tower, features, is_block_matrix, normalise


def clip_config(like: SiglipVisionConfig) -> CLIPVisionConfig:
    """A CLIP tower of the same sizes."""
    config = CLIPVisionConfig(
        hidden_size=like.hidden_size, intermediate_size=like.intermediate_size,
        num_hidden_layers=like.num_hidden_layers, num_attention_heads=like.num_attention_heads,
        image_size=like.image_size, patch_size=like.patch_size, hidden_act=like.hidden_act,
        layer_norm_eps=like.layer_norm_eps, attention_dropout=0.0, projection_dim=like.hidden_size,
    )  # fmt: skip
    config._attn_implementation = "eager"
    return config


def fine_config(like: SiglipVisionConfig) -> SiglipVisionConfig:
    """A SigLIP tower of the same sizes with patches of half the side."""
    config = SiglipVisionConfig(**{**like.to_dict(), "patch_size": like.patch_size // 2})
    config._attn_implementation = "eager"
    return config


@torch.no_grad()
def clip_from(teacher: SiglipVisionModel, seed: int) -> CLIPVisionModel:
    """A CLIP tower with the teacher's layers and patches; its class token and first norm begin as nothing much."""
    torch.manual_seed(seed)
    tower = CLIPVisionModel(clip_config(teacher.config))
    tower.encoder.load_state_dict(teacher.encoder.state_dict())
    patches, own = teacher.embeddings, tower.embeddings
    own.patch_embedding.weight.copy_(patches.patch_embedding.weight)
    places = patches.position_embedding.weight + patches.patch_embedding.bias
    own.position_embedding.weight[1:] = places
    own.class_embedding.mul_(0.1)
    noise = torch.randn(64, 3, teacher.config.image_size, teacher.config.image_size)
    tower.pre_layrnorm.weight.fill_(patches(noise).std(-1).mean())
    return tower


@torch.no_grad()
def fine_from(teacher: SiglipVisionModel, seed: int) -> SiglipVisionModel:
    """A SigLIP tower with the teacher's layers; each of its patches begins with the place of the one it lies in."""
    torch.manual_seed(seed)
    tower = SiglipVisionModel(fine_config(teacher.config))
    tower.encoder.load_state_dict(teacher.encoder.state_dict())
    side = teacher.config.image_size // teacher.config.patch_size
    places = teacher.embeddings.position_embedding.weight + teacher.embeddings.patch_embedding.bias
    quarter = torch.randn(2, 2, places.shape[-1]) * places.std()  # which of the four it is
    grid = places.view(side, 1, side, 1, -1) + quarter[None, :, None]
    tower.embeddings.position_embedding.weight.copy_(grid.flatten(0, 3))
    return tower


def spread(target: Tensor, patches: int) -> Tensor:
    """`(n, 36, width)` to `(n, patches, width)`: each finer patch gets what the patch that it lies in has."""
    side = int(target.shape[1] ** 0.5)
    times = int(patches**0.5) // side
    grid = target.unflatten(1, (side, side))
    return grid.repeat_interleave(times, 1).repeat_interleave(times, 2).flatten(1, 2)


@torch.no_grad()
def scale_of(teacher: SiglipVisionModel, pools: list[Pool]) -> Tensor:
    """Standard deviation of each dimension of the teacher's features, float32 `(width,)`."""
    pixels = torch.cat([p.pixels[:64] for p in pools]).flatten(0, 1)
    return features(teacher, normalise(pixels)).float().flatten(0, 1).std(0)


def distil(
    tower: Tower,
    teacher: SiglipVisionModel,
    pools: list[Pool],
    steps: int,
    batch: int,
    generator: torch.Generator,
    compiled: bool,
    muon: float = 2e-3,
) -> Iterator[tuple[int, float]]:
    """Train the tower in place (it ends in bfloat16); yields (step, unexplained share of the variance)."""
    named = [(n, p) for n, p in tower.named_parameters() if "post_layernorm" not in n]
    trainer = MixedTrainer(named, is_block_matrix, muon=muon, adamw=2e-3)
    scale = scale_of(teacher, pools)
    for layer in cast("nn.ModuleList", tower.encoder.layers) if compiled else ():
        layer.compile(dynamic=False)
    for step in range(steps):
        share = batch // len(pools)
        chosen = [torch.randint(len(p.pictures), (share,), generator=generator) for p in pools]
        pixels = normalise(torch.cat([p.pixels[i] for p, i in zip(pools, chosen, strict=True)]).flatten(0, 1))
        with torch.no_grad():
            target = features(teacher, pixels)
        given = features(tower, pixels)
        error = (given.float() - spread(target, given.shape[1]).float()) / scale
        loss = error.square().mean()
        loss.backward()
        trainer.step(schedule(step / steps, step, decay_from=0.3))
        yield step, loss.item()
