"""The embedded tasks: questions about pictures of the synthetic world that no training has seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from probe.data.sample import Sample
from probe.errors import ProbeError
from probe.registry import nearest
from probe.zoo.world import EVAL_SEEDS, Kind, ask, draw

_SHORT = {"gen_length": 2, "steps": 2, "block_length": 2}
_LONG = {"gen_length": 48, "steps": 24, "block_length": 48}


@dataclass(frozen=True)
class _Task:
    question: str  # what world.ask is asked for
    kind: Callable[[int], Kind]  # of the picture, by seed
    metric: str
    generate: Mapping[str, int]
    about_one_item: bool


_TASKS: Mapping[str, _Task] = {
    "world/colour": _Task("colour", lambda seed: "scene", "exact_match", _SHORT, True),
    "world/shape": _Task("shape", lambda seed: "scene", "exact_match", _SHORT, True),
    "world/letter": _Task("letter", lambda seed: "codes" if seed % 2 else "words", "exact_match", _SHORT, True),
    "world/read_words": _Task("read", lambda seed: "words", "token_accuracy", _LONG, False),
    "world/read_codes": _Task("read", lambda seed: "codes", "token_accuracy", _LONG, False),
    "world/describe": _Task("describe", lambda seed: "scene", "edit_similarity", _LONG, False),
}
MIXTURES: Mapping[str, tuple[str, ...]] = {
    "world/mixed": tuple(_TASKS),
    "world/short": ("world/colour", "world/shape", "world/letter"),
    "world/long": ("world/read_words", "world/read_codes", "world/describe"),
}


def tasks() -> list[str]:
    """Names of all embedded tasks, mixtures last."""
    return [*_TASKS, *MIXTURES]


def load(name: str, limit: int, seed_offset: int = 0) -> Iterator[Sample]:
    """The first ``limit`` samples of a task, drawn from the reserved evaluation seeds.

    The pictures are those of the seeds ``EVAL_SEEDS[seed_offset]`` and following. A mixture takes its tasks
    in turn, so sample i of ``world/mixed`` belongs to task i modulo 6; each of its tasks sees the seeds in
    order.
    """
    if name not in _TASKS and name not in MIXTURES:
        raise ProbeError(f"no task is called `{name}`; {nearest(name, tasks())}")
    if limit < 0 or seed_offset < 0 or seed_offset + limit > len(EVAL_SEEDS):
        raise ProbeError(
            f"{name}: samples {seed_offset} to {seed_offset + limit} were asked for; there are 0 to {len(EVAL_SEEDS)}"
        )
    parts = MIXTURES.get(name, (name,))
    return (_sample(parts[i % len(parts)], EVAL_SEEDS[seed_offset + i // len(parts)]) for i in range(limit))


def _sample(name: str, seed: int) -> Sample:
    task = _TASKS[name]
    picture = draw(task.kind(seed), seed)
    rng = np.random.default_rng([97, seed])  # a stream of its own, beside those of the pictures' kinds
    item = picture.items[rng.integers(len(picture.items))]
    question = ask(picture, task.question, item if task.about_one_item else None)
    return Sample(
        id=f"{name}/{seed}",
        images=(picture.image,),
        question=question.text,
        answers=(question.answer,),
        metric=task.metric,
        task=name,
        generate=task.generate,
    )
