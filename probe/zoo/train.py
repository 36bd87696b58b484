"""Trains a miniature: ``python -m probe.zoo.train --kind KIND --out FOLDER``.

Three stages: the vision tower (taught patch by patch, or distilled from the first miniature's; then frozen), the cache
of its features, and the language model with projector and newline embedding. ``--kind`` says which (`kinds`):
``from_scratch`` (the default), ``autoregressive``, or ``adapted``, which starts ``--from`` the folder of an
autoregressive one. The command can be stopped at any time and repeats nothing when started again with the same
``--out``; the folder holds a usable checkpoint from the first save on. See docs/miniature.md for what comes out.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import SiglipVisionModel

from probe.zoo import MINIATURE, distil
from probe.zoo import tower as towers
from probe.zoo.batches import Batch, Maker, Prompts, Shelf
from probe.zoo.engine import MixedTrainer, schedule
from probe.zoo.export import TOWER_PREFIX
from probe.zoo.export_contrast import llava_weights
from probe.zoo.kinds import KINDS, SMOKE, Kind, Plan, Size
from probe.zoo.measure import mean_scores
from probe.zoo.model import Miniature, diffusion_loss, draw_masks, draw_seen
from probe.zoo.tokenizer import PICTURE, build
from probe.zoo.world import TRAIN_SEEDS


def _say(text: str) -> None:
    print(text, flush=True)


def _pools(pictures: int) -> dict[str, towers.Pool]:
    start, third = TRAIN_SEEDS.start, pictures // 3
    words = towers.render("words", range(start, start + 2 * third))
    codes = towers.render("codes", range(start, start + third))
    brief_words = towers.render("words", range(start + 10**6, start + 10**6 + third * 2 // 3), (1, 2))
    brief_codes = towers.render("codes", range(start + 10**6, start + 10**6 + third // 3), (1, 2))

    def join(a: towers.Pool, b: towers.Pool) -> towers.Pool:
        return towers.Pool(a.pictures + b.pictures, torch.cat([a.pixels, b.pixels]), torch.cat([a.labels, b.labels]))

    return {
        "scene": towers.render("scene", range(start, start + pictures)),
        "page": join(words, codes),
        "brief": join(brief_words, brief_codes),
        "codes": codes,
    }


def shipped_tower() -> SiglipVisionModel:
    """The first miniature's tower, float32: what the other kinds' towers learn from."""
    weights = load_file(MINIATURE / "model.safetensors")
    tower = SiglipVisionModel(towers.config(Size.tower_width, Size.tower_layers))
    tower.load_state_dict({k.removeprefix(TOWER_PREFIX): v for k, v in weights.items() if k.startswith(TOWER_PREFIX)})
    return tower


def _tower(kind: Kind, size: Size, pools: dict[str, towers.Pool], work: Path, seed: int, device: str) -> towers.Tower:
    """The trained tower in bfloat16: read from the work folder if it is there, else trained and written."""
    torch.manual_seed(seed)

    def fresh() -> towers.Tower:
        if kind.tower is None:
            return _on(SiglipVisionModel(towers.config(size.tower_width, size.tower_layers)), device)
        return _on(kind.tower(shipped_tower(), seed), device)

    model, saved = fresh(), work / "tower.pt"
    if not saved.exists():
        began = time.monotonic()
        generator = torch.Generator().manual_seed(seed)
        steps, batch = size.tower_steps or kind.tower_steps, size.tower_batch or kind.tower_batch
        for step, loss, stats in _teach(kind, model, pools, steps, batch, generator, size.compiled):
            if step % 50 == 0 or step == steps - 1:
                seen = " ".join(f"{k} {v:.3f}" for k, v in stats.items())
                _say(f"tower {step + 1}/{steps} loss {loss:.4f} {seen} {time.monotonic() - began:.0f} s")
        torch.save(model.state_dict(), saved.with_suffix(".partial"))
        os.replace(saved.with_suffix(".partial"), saved)
        model = fresh()
    _on(model, torch.bfloat16).load_state_dict(torch.load(saved, map_location=device, weights_only=True))
    return model.requires_grad_(False)


def _on(model: Any, where: str | torch.dtype) -> Any:
    """A module on a device or in a type; transformers' own `to` is not typed as one."""
    return torch.nn.Module.to(model, where)


def _teach(
    kind: Kind, model: towers.Tower, pools: dict[str, towers.Pool], steps: int, batch: int,
    generator: torch.Generator, compiled: bool,
) -> Iterator[tuple[int, float, dict[str, float]]]:  # fmt: skip
    """Train a tower in place: by labels, or by the first miniature's features."""
    if kind.tower is None:
        taught = [pools["scene"], pools["codes"]]
        yield from towers.train(cast(SiglipVisionModel, model), taught, steps, batch, generator, compiled)
        return
    teacher = _on(_on(shipped_tower(), torch.bfloat16), str(model.device)).requires_grad_(False)
    shown = [pools["scene"], pools["page"], pools["codes"]]
    for step, loss in distil.distil(model, teacher, shown, steps, batch, generator, compiled, kind.tower_muon):
        yield step, loss, {}


def _learn(
    model: Miniature, prompts: Prompts, batch: Batch, plan: Plan, generator: torch.Generator, occluded: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One forward: the loss, and per sample the mask ratio and the accuracy on predicted content."""
    images, groups, answer = batch.wanted.shape
    device = batch.features.device
    wanted, weight = batch.wanted.flatten(0, 1), batch.weight.flatten(0, 1)
    if plan.causal:  # every token is predicted from those before it
        t, masked, visible = torch.ones(images * groups), torch.ones_like(wanted, dtype=torch.bool), batch.wanted
    else:
        t, masked = draw_masks(images * groups, answer, generator)
        masked = masked.to(device)
        visible = torch.where(masked, prompts.mask, wanted).view(images, groups, answer)
    prefix, rows = model.prefix(batch.features, prompts.opening), torch.cat([batch.questions, visible], -1)
    if plan.apart:
        prefix, rows = torch.cat([prefix, model.lm.embed_tokens(batch.questions[:, 0])], 1), visible
    seen = None
    if occluded:
        picture = draw_seen(images, occluded, generator).to(device)
        opening = prompts.opening.shape[0]
        behind = prefix.shape[1] - opening - picture.shape[1]
        seen = F.pad(F.pad(picture, (opening, 0), value=True), (0, behind), value=True)
    logits = model.logits(prefix, rows, answer, plan.packed, plan.causal, seen)
    loss, right = diffusion_loss(logits.flatten(0, 1), wanted, masked, weight)
    return loss, t, right


class Run:
    """A training of the language model that can be saved and taken up again."""

    def __init__(
        self, kind: Kind, size: Size, out: Path, work: Path, seed: int, start: Path | None = None,
        occluded: float = 0.0, device: str = "cpu",
    ) -> None:  # fmt: skip
        self.kind, self.size, self.out, self.work = kind, size, out, work
        self.occluded, self.device = occluded, device
        build(work, kind.spelling)
        self.prompts = Prompts(str(work), kind.spelling)
        self.prompts.opening = self.prompts.opening.to(device)
        pools = {name: pool.to(device) for name, pool in _pools(size.pictures or kind.pictures).items()}
        _say(f"rendered {sum(len(p.pictures) for k, p in pools.items() if k != 'codes')} pictures")
        self.tower = _tower(kind, size, pools, work, seed, device)
        shelves = {k: Shelf(p.pictures, towers.encode(self.tower, p.pixels)) for k, p in pools.items() if k != "codes"}
        del pools
        _say("cached the tower's features")
        torch.manual_seed(seed + 1)
        self.generator = torch.Generator().manual_seed(seed + 2)
        self.config = kind.config(len(self.prompts.tokenizer), size.hidden, size.layers, size.heads, size.mlp)
        self.model = Miniature(self.config, self.tower.config.hidden_size)
        if start is not None:
            self.model.load_state_dict(llava_weights(start, list(self.model.state_dict())))
        self.model.to(device)
        self.trainer = MixedTrainer(
            self.model.named_parameters(), lambda name, p: p.dim() == 2 and ".layers." in name, kind.muon, kind.adamw
        )
        self.maker = Maker(self.prompts, shelves, self.generator)
        self.step, self.seconds = 0, 0.0
        if (work / "state.pt").exists():
            self._load(torch.load(work / "state.pt", map_location=device, weights_only=True))
        if size.compiled:
            self.model.compile_layers()

    def _load(self, state: dict[str, Any]) -> None:
        self.trainer.load_state_dict(state["trainer"])
        self.generator.set_state(state["generator"])
        self.step, self.seconds = state["step"], state["seconds"]
        _say(f"taken up at step {self.step}")

    def save(self) -> None:
        """Write the state to go on from, and the checkpoint folder as it would be shipped."""
        state = {
            "trainer": self.trainer.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
            "seconds": self.seconds,
        }
        torch.save(state, self.work / "state.partial")
        os.replace(self.work / "state.partial", self.work / "state.pt")
        names = [n for n, _ in self.model.named_parameters()]
        prompts = self.prompts
        ids = {"bos": prompts.bos, "eos": prompts.eos, "mask": prompts.mask, "end": prompts.end}
        ids["picture"] = prompts.id(PICTURE) if PICTURE in prompts.spelling.special else -1
        self.kind.export(
            self.out, dict(zip(names, (m.cpu() for m in self.trainer.masters), strict=True)),
            {name: value.cpu() for name, value in self.tower.state_dict().items()},
            self.config, self.tower.config, ids, self.work,
        )  # fmt: skip

    def train(self, steps: int, minutes: float, save_every: float) -> None:
        """Go on to step ``steps``, or until ``minutes`` of training have passed in all."""
        began, saved = time.monotonic() - self.seconds, time.monotonic()
        window: dict[str, list[float]] = defaultdict(list)
        while True:
            self.seconds = time.monotonic() - began
            progress = max(self.step / steps, self.seconds / 60 / minutes)
            if progress >= 1:
                break
            plan = self.kind.plan(self.step, progress, self.size)
            batch = self.maker.draw(plan.images, plan.groups, plan.long, plan.scenes, plan.brief).to(self.device)
            loss, t, right = _learn(self.model, self.prompts, batch, plan, self.generator, self.occluded)
            right = right.cpu()
            loss.backward()
            self.trainer.step(schedule(progress, self.step))
            self.step += 1
            split = round(plan.images * plan.scenes) * plan.groups  # scenes come first in a batch
            hard = (t > 0.7) & right.isfinite() if plan.long else right.isfinite()
            for name, part in (("scene", slice(None, split)), ("page", slice(split, None))):
                window[f"{'long' if plan.long else 'short'} {name}"] += right[part][hard[part]].tolist()
            window["loss"].append(loss.item())
            if self.step % 50 == 0 or self.step == steps:
                seen = " ".join(f"{k} {sum(v) / max(1, len(v)):.3f}" for k, v in sorted(window.items()))
                _say(f"step {self.step}/{steps} {100 * progress:.1f} % {self.seconds:.0f} s {seen}")
                with (self.work / "log.jsonl").open("a") as log:
                    means = {k: sum(v) / max(1, len(v)) for k, v in window.items()}
                    log.write(json.dumps({"step": self.step, "seconds": round(self.seconds, 1), **means}) + "\n")
                window.clear()
            if time.monotonic() - saved > 60 * save_every:
                self.save()
                saved = time.monotonic()
        self.save()


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m probe.zoo.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--kind", choices=list(KINDS), default="from_scratch", help="which miniature")
    parser.add_argument("--from", dest="start", type=Path, help="the autoregressive folder to adapt")
    parser.add_argument("--work", type=Path, help="folder of the state to go on from (default: OUT.training)")
    parser.add_argument("--steps", type=int, help="steps of the language model (default: the kind's)")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop the language model after so many minutes")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, batches and masks")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (one is fastest on a busy machine)")
    parser.add_argument("--save-every", type=float, default=4, help="minutes between checkpoints")
    parser.add_argument("--evaluate", type=int, default=64, help="reserved pictures per task in the last report")
    parser.add_argument(
        "--occluded", type=float, default=0.0, metavar="SHARE",
        help="of this share of the pictures hide up to four fifths of the visual tokens (default: none)",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="where to train: cpu or cuda")
    parser.add_argument("--eager", action="store_true", help="do not compile the layers")
    parser.add_argument("--smoke", action="store_true", help="a tiny model for a few steps: does the command work?")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    if (given.start is None) == (given.kind == "adapted"):
        parser.error("--from FOLDER belongs to --kind adapted, which starts from an autoregressive miniature")
    if not 0 <= given.occluded <= 1:
        parser.error(f"--occluded {given.occluded}: a share of the pictures, 0 to 1")
    if given.occluded and given.kind == "autoregressive":
        parser.error("--occluded belongs to training by denoising; the autoregressive kind has no such variant")
    kind, size = KINDS[given.kind], SMOKE if given.smoke else Size()
    if given.eager:
        size = replace(size, compiled=False)
    work = given.work or given.out.with_name(given.out.name + ".training")
    work.mkdir(parents=True, exist_ok=True)
    run = Run(kind, size, given.out, work, given.seed, given.start, given.occluded, given.device)
    run.train(given.steps or (40 if given.smoke else kind.steps), given.minutes, given.save_every)
    scores = mean_scores(given.out, 2 if given.smoke else given.evaluate)
    _say("reserved pictures: " + " ".join(f"{k} {v:.3f}" for k, v in scores.items()))


if __name__ == "__main__":
    main()
