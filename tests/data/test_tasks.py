"""Embedded tasks: reserved seeds, stable ids, right answers, no heavy imports."""

from __future__ import annotations

import subprocess
import sys
from itertools import islice

import numpy as np
import pytest

from probe.data import METRICS, load, tasks
from probe.errors import ProbeError
from probe.zoo.world import EVAL_SEEDS, draw


def test_names() -> None:
    assert tasks() == [
        "world/colour", "world/shape", "world/letter", "world/read_words", "world/read_codes", "world/describe",
        "world/mixed", "world/short", "world/long",
    ]  # fmt: skip


@pytest.mark.parametrize("name", tasks())
def test_samples_are_reserved_repeatable_and_scored_full_for_their_own_answer(name: str) -> None:
    first, again = list(load(name, 12)), list(load(name, 12))
    assert len(first) == 12
    assert len({s.id for s in first}) == 12
    for a, b in zip(first, again, strict=True):
        assert (a.id, a.question, a.answers) == (b.id, b.question, b.answers)
        assert np.array_equal(np.asarray(a.images[0]), np.asarray(b.images[0]))
        assert a.images[0].size == (96, 96)
        assert int(a.id.rsplit("/", 1)[1]) in EVAL_SEEDS
        assert METRICS[a.metric](a.answers[0], a.answers) == 1
        assert a.generate["gen_length"] % a.generate["block_length"] == 0


def test_an_offset_continues_where_a_limit_stopped() -> None:
    whole = [s.id for s in load("world/colour", 6)]
    assert [s.id for s in load("world/colour", 2, seed_offset=4)] == whole[4:]


def test_a_mixture_takes_its_tasks_in_turn() -> None:
    order = [s.task for s in load("world/mixed", 12)]
    assert order == tasks()[:6] * 2
    assert [s.task for s in load("world/long", 3)] == tasks()[3:6]


def test_answers_are_those_of_the_picture() -> None:
    for sample in load("world/colour", 20):
        seed = int(sample.id.rsplit("/", 1)[1])
        row, column = (int(w.strip("?,")) for w in sample.question.split() if w.strip("?,").isdigit())
        assert draw("scene", seed).at(row - 1, column - 1).names[0] == sample.answers[0]
    for sample in load("world/read_codes", 5):
        assert sample.answers == (draw("codes", int(sample.id.rsplit("/", 1)[1])).transcript,)


def test_a_misspelt_task_gets_a_suggestion() -> None:
    with pytest.raises(ProbeError, match="did you mean `world/colour`"):
        load("world/color", 1)


def test_more_samples_than_are_reserved_are_refused() -> None:
    with pytest.raises(ProbeError, match="there are 0 to 1000000"):
        load("world/colour", 2, seed_offset=len(EVAL_SEEDS) - 1)


def test_samples_are_drawn_one_by_one() -> None:
    assert len(list(islice(load("world/mixed", 900_000), 2))) == 2


def test_importing_the_package_imports_no_framework() -> None:
    code = "import sys, probe.data; sys.exit(bool({'torch', 'transformers', 'h5py'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
