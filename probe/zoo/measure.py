"""Measures a trained miniature on the reserved pictures, unpruned: ``python -m probe.zoo.measure``.

It runs through the project's own backbone and loop, the ones that every recipe uses, and prints a Markdown table:
mean score by each task's metric with a 95 % interval (Wilson for scores that are 0 or 1, else a bootstrap over
samples), the share of samples that are exactly right, and the same questions about an empty grey picture: what
guessing gives.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from math import sqrt
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import probe.vocabulary  # noqa: F401  (registers the signals that every run records)
from probe.backbones import load
from probe.backbones.base import Backbone
from probe.compile import ProbeTable
from probe.data import METRICS, Sample
from probe.data.tasks import MIXTURES, tasks
from probe.data.tasks import load as samples_of
from probe.generate import generate
from probe.generation import rule_for
from probe.recipe import Recipe
from probe.zoo.world import SIZE


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927)."""
    p = right / count
    middle = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z * sqrt(p * (1 - p) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(scores: np.ndarray, draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of a mean, resampling the samples."""
    picks = np.random.default_rng(seed).integers(0, len(scores), (draws, len(scores)))
    low, high = np.percentile(scores[picks].mean(1), (2.5, 97.5))
    return float(low), float(high)


def _answers(backbone: Backbone, samples: list[Sample], batch: int, cache: str | None) -> Iterator[str]:
    recipe = Recipe.model_validate({"schema": 1, "name": "measure", "generate": {"cache": cache} if cache else {}})
    rule = rule_for(backbone, recipe, samples[0].generate, pictures=True)
    for k in range(0, len(samples), batch):
        prompts = [backbone.encode(s.images, s.question) for s in samples[k : k + batch]]
        yield from (g.text for g in generate(backbone, prompts, rule, ProbeTable(())))


def scores_of(backbone: Backbone, samples: list[Sample], batch: int, cache: str | None = None) -> np.ndarray:
    """float64 (samples, 2): the score by the task's metric, and whether the answer is exactly right.

    ``cache`` is a caching policy (`none`, `prefix`); by default the backbone's own.
    """
    rows = [
        (METRICS[s.metric](text, s.answers), METRICS["exact_match"](text, s.answers))
        for s, text in zip(samples, _answers(backbone, samples, batch, cache), strict=True)
    ]
    return np.asarray(rows, float)


def mean_scores(folder: Path, count: int) -> dict[str, float]:
    """Mean score of each embedded task over ``count`` reserved samples, by its own metric, unpruned."""
    backbone = load(folder)
    names = (t for t in tasks() if t not in MIXTURES)
    return {n: float(scores_of(backbone, list(samples_of(n, count)), 16)[:, 0].mean()) for n in names}


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m probe.zoo.measure", description=__doc__)
    parser.add_argument("--model", default="miniature", help="a backbone's name, or a checkpoint folder")
    parser.add_argument("--cache", help="caching policy, such as none or prefix (default: the backbone's own)")
    parser.add_argument("--count", type=int, default=256, help="reserved samples per task")
    parser.add_argument("--batch", type=int, default=16, help="samples per forward")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    backbone = load(given.model)
    print(f"| task | n | metric | score | 95 % interval | exactly right | empty picture |\n|{'---|' * 7}")
    for name in (t for t in tasks() if t not in MIXTURES):
        samples = list(samples_of(name, given.count))
        scores = scores_of(backbone, samples, given.batch, given.cache)
        short = samples[0].metric == "exact_match"
        low, high = wilson(int(scores[:, 0].sum()), len(scores)) if short else bootstrap(scores[:, 0])
        blank = [replace(s, images=(Image.new("RGB", (SIZE, SIZE), (128, 128, 128)),)) for s in samples[:64]]
        guessed = scores_of(backbone, blank, given.batch, given.cache)[:, 0].mean()
        print(
            f"| `{name}` | {len(scores)} | {samples[0].metric} | {scores[:, 0].mean():.3f} | {low:.3f} to {high:.3f} "
            f"| {scores[:, 1].mean():.3f} | {guessed:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
