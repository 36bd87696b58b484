"""Trains the embedded miniature from nothing, on the CPU: ``python -m probe.zoo.train --out FOLDER``.

Three stages: the vision tower (taught patch by patch, then frozen), the cache of its features, and the
masked-diffusion language model with projector and newline embedding. The language model first trains with
several question-answer groups packed behind each picture; in the last fifth every sequence is whole and
everything attends to everything, which is what inference does. The command can be stopped at any time and
repeats nothing when started again with the same ``--out``; the folder holds a usable checkpoint from the
first save on. See docs/miniature.md for what comes out.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import SiglipVisionModel

from probe.data.metrics import METRICS
from probe.data.tasks import MIXTURES, load, tasks
from probe.zoo import tower as towers
from probe.zoo.batches import Batch, Maker, Prompts, Shelf
from probe.zoo.engine import MixedTrainer, schedule
from probe.zoo.export import export
from probe.zoo.model import (
    Miniature,
    diffusion_loss,
    draw_masks,
    generate,
    language_config,
)
from probe.zoo.tokenizer import build
from probe.zoo.world import TRAIN_SEEDS

PACKED_UNTIL = 0.8  # the share of the training that packs groups
DESCRIBE_FROM = 0.3  # from here on long answers, and among them descriptions, take most of the steps
CURRICULUM_UNTIL = 0.4  # the share over which one- and two-line pages give way to whole ones


@dataclass(frozen=True)
class Size:
    """How large everything is. ``pictures`` counts the scenes, and the whole pages."""

    pictures: int = 15_000
    tower_width: int = 128
    tower_layers: int = 3
    tower_steps: int = 1_100
    tower_batch: int = 64
    hidden: int = 192
    layers: int = 6
    heads: int = 4
    mlp: int = 512
    images: int = 16
    short_groups: int = 8
    long_groups: int = 3
    compiled: bool = True


SMOKE = Size(
    pictures=24, tower_width=32, tower_layers=1, tower_steps=12, tower_batch=8, hidden=32, layers=2, heads=2,
    mlp=64, images=4, short_groups=2, long_groups=1, compiled=False,
)  # fmt: skip


def _say(text: str) -> None:
    print(text, flush=True)


def _pools(size: Size) -> dict[str, towers.Pool]:
    start, third = TRAIN_SEEDS.start, size.pictures // 3
    words = towers.render("words", range(start, start + 2 * third))
    codes = towers.render("codes", range(start, start + third))
    brief_words = towers.render("words", range(start + 10**6, start + 10**6 + third * 2 // 3), (1, 2))
    brief_codes = towers.render("codes", range(start + 10**6, start + 10**6 + third // 3), (1, 2))

    def join(a: towers.Pool, b: towers.Pool) -> towers.Pool:
        return towers.Pool(a.pictures + b.pictures, torch.cat([a.pixels, b.pixels]), torch.cat([a.labels, b.labels]))

    return {
        "scene": towers.render("scene", range(start, start + size.pictures)),
        "page": join(words, codes),
        "brief": join(brief_words, brief_codes),
        "codes": codes,
    }


def _tower(size: Size, pools: dict[str, towers.Pool], work: Path, seed: int) -> SiglipVisionModel:
    """The trained tower in bfloat16: read from the work folder if it is there, else trained and written."""
    torch.manual_seed(seed)
    model = SiglipVisionModel(towers.config(size.tower_width, size.tower_layers))
    saved = work / "tower.pt"
    if not saved.exists():
        began = time.monotonic()
        generator = torch.Generator().manual_seed(seed)
        taught = [pools["scene"], pools["codes"]]
        for step, loss, stats in towers.train(
            model, taught, size.tower_steps, size.tower_batch, generator, compiled=size.compiled
        ):
            if step % 50 == 0 or step == size.tower_steps - 1:
                seen = " ".join(f"{k} {v:.3f}" for k, v in stats.items())
                spent = time.monotonic() - began
                _say(f"tower {step + 1}/{size.tower_steps} loss {loss:.3f} {seen} {spent:.0f} s")
        torch.save(model.state_dict(), saved.with_suffix(".partial"))
        os.replace(saved.with_suffix(".partial"), saved)
        model = SiglipVisionModel(towers.config(size.tower_width, size.tower_layers))
    torch.nn.Module.to(model, torch.bfloat16).load_state_dict(torch.load(saved, weights_only=True))
    return model.requires_grad_(False)


@dataclass
class Plan:
    """What the next batch is, as a function of the step and of the training's progress in [0, 1]."""

    packed: bool
    long: bool
    images: int
    groups: int
    scenes: float
    brief: float

    @staticmethod
    def at(step: int, progress: float, size: Size) -> Plan:
        """The plan of one step."""
        packed = progress < PACKED_UNTIL
        # Colours, shapes and pages are learned first, descriptions last: half long steps, later three quarters.
        early = progress < DESCRIBE_FROM
        long = step % 2 == 1 if early else step % 4 != 0
        groups = (size.long_groups if long else size.short_groups) if packed else 1
        brief = max(0.1, 0.9 - 0.8 * progress / CURRICULUM_UNTIL)
        scenes = 0.7 if long and not early else 0.5
        return Plan(packed, long, size.images if packed else 2 * size.images, groups, scenes, brief)


def _learn(
    model: Miniature,
    opening: torch.Tensor,
    prompts: Prompts,
    batch: Batch,
    plan: Plan,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One forward: the loss, and per sample the mask ratio and the accuracy on masked content."""
    images, groups, answer = batch.wanted.shape
    wanted, weight = batch.wanted.flatten(0, 1), batch.weight.flatten(0, 1)
    t, masked = draw_masks(images * groups, answer, generator)
    visible = torch.where(masked, prompts.mask, wanted).view(images, groups, answer)
    prefix = model.prefix(batch.features, opening)
    logits = model.logits(prefix, torch.cat([batch.questions, visible], -1), answer, plan.packed)
    loss, right = diffusion_loss(logits.flatten(0, 1), wanted, masked, weight)
    return loss, t, right


def evaluate(model: Miniature, tower: SiglipVisionModel, prompts: Prompts, count: int) -> dict[str, float]:
    """Mean score of each embedded task over ``count`` reserved samples, by its own metric, unpruned."""
    scores = {}
    for name in (t for t in tasks() if t not in MIXTURES):
        samples = list(load(name, count))
        total = 0.0
        for k in range(0, count, 32):
            part = samples[k : k + 32]
            pixels = torch.stack([torch.from_numpy(towers.views(np.asarray(s.images[0]))) for s in part])
            questions = torch.tensor([prompts.question(s.question) for s in part])
            length, steps = part[0].generate["gen_length"], part[0].generate["steps"]
            answers = generate(
                model, towers.encode(tower, pixels), prompts.opening, questions, length, steps,
                prompts.mask, prompts.eot, prompts.suppressed,
            )  # fmt: skip
            for ids, sample in zip(answers.tolist(), part, strict=True):
                total += METRICS[sample.metric](prompts.text(ids), sample.answers)
        scores[name] = total / count
    return scores


class Run:
    """A training of the language model that can be saved and taken up again."""

    def __init__(self, size: Size, out: Path, work: Path, seed: int) -> None:
        self.size, self.out, self.work = size, out, work
        build(work)
        self.prompts = Prompts(str(work))
        pools = _pools(size)
        _say(f"rendered {sum(len(p.pictures) for k, p in pools.items() if k != 'codes')} pictures")
        self.tower = _tower(size, pools, work, seed)
        shelves = {k: Shelf(p.pictures, towers.encode(self.tower, p.pixels)) for k, p in pools.items() if k != "codes"}
        _say("cached the tower's features")
        torch.manual_seed(seed + 1)
        self.generator = torch.Generator().manual_seed(seed + 2)
        self.config = language_config(len(self.prompts.tokenizer), size.hidden, size.layers, size.heads, size.mlp)
        self.model = Miniature(self.config, size.tower_width)
        self.trainer = MixedTrainer(self.model.named_parameters(), lambda name, p: p.dim() == 2 and ".layers." in name)
        self.maker = Maker(self.prompts, shelves, self.generator)
        self.step, self.seconds = 0, 0.0
        if (work / "state.pt").exists():
            self._load(torch.load(work / "state.pt", weights_only=True))
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
        ids = {"bos": self.prompts.bos, "eos": self.prompts.eos, "mask": self.prompts.mask}
        export(
            self.out, dict(zip(names, self.trainer.masters, strict=True)), self.tower.state_dict(),
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
            plan = Plan.at(self.step, progress, self.size)
            batch = self.maker.draw(plan.images, plan.groups, plan.long, plan.scenes, plan.brief)
            loss, t, right = _learn(self.model, self.prompts.opening, self.prompts, batch, plan, self.generator)
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
    parser.add_argument("--work", type=Path, help="folder of the state to go on from (default: OUT.training)")
    parser.add_argument("--steps", type=int, help="steps of the language model (default 3100)")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop the language model after so many minutes")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, batches and masks")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (one is fastest on a busy machine)")
    parser.add_argument("--save-every", type=float, default=4, help="minutes between checkpoints")
    parser.add_argument("--evaluate", type=int, default=64, help="reserved pictures per task in the last report")
    parser.add_argument("--smoke", action="store_true", help="a tiny model for a few steps: does the command work?")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    size = SMOKE if given.smoke else Size()
    work = given.work or given.out.with_name(given.out.name + ".training")
    work.mkdir(parents=True, exist_ok=True)
    run = Run(size, given.out, work, given.seed)
    run.train(given.steps or (40 if given.smoke else 3_100), given.minutes, given.save_every)
    scores = evaluate(run.model, run.tower, run.prompts, 2 if given.smoke else given.evaluate)
    _say("reserved pictures: " + " ".join(f"{k} {v:.3f}" for k, v in scores.items()))


if __name__ == "__main__":
    main()
