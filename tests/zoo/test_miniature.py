"""The shipped checkpoint: published format, the sequence it was trained on, and that it sees."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from probe.backbones import load
from probe.backbones.base import Backbone
from probe.data import Sample
from probe.data import load as samples_of
from probe.zoo import MINIATURE
from probe.zoo import tower as towers
from probe.zoo.batches import Prompts
from probe.zoo.export import TOWER_PREFIX, published_names
from probe.zoo.measure import bootstrap, scores_of, wilson
from probe.zoo.model import Miniature, language_config
from probe.zoo.train import Size


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load("miniature")


def test_the_folder_is_small_and_stored_in_sixteen_bit() -> None:
    weights = MINIATURE / "model.safetensors"
    assert weights.stat().st_size < 10_000_000
    with safe_open(weights, "pt") as file:
        assert {str(file.get_slice(k).get_dtype()) for k in file.keys()} == {"F16"}  # noqa: SIM118  (no mapping)
        stored = {k for k in file.keys() if k.startswith(TOWER_PREFIX + "encoder.layers.")}  # noqa: SIM118
    layers = {int(k.removeprefix(TOWER_PREFIX + "encoder.layers.").split(".")[0]) for k in stored}
    vision = json.loads((MINIATURE / "vision_config.json").read_text())
    assert len(layers) == vision["num_hidden_layers"] - 1  # the published class drops the last layer


def test_the_prompt_is_the_sequence_of_the_training(backbone: Backbone) -> None:
    """Adapter and training module build the same embeddings: prompt, base view, raster with newlines, question."""
    weights = load_file(MINIATURE / "model.safetensors")
    prompts, size = Prompts(str(MINIATURE)), Size()
    model = Miniature(language_config(len(prompts.tokenizer)), size.tower_width)
    names = {next(iter(published_names({k: torch.empty(0)}, {}))): k for k in model.state_dict()}
    model.load_state_dict({names[k]: v.float() for k, v in weights.items() if k in names})
    tower = towers.SiglipVisionModel(towers.config(size.tower_width, size.tower_layers))
    tower.load_state_dict({k.removeprefix(TOWER_PREFIX): v.float() for k, v in weights.items() if k not in names})
    sample = next(samples_of("world/read_words", 1))
    pixels = torch.from_numpy(towers.views(np.asarray(sample.images[0]))).movedim(-1, -3).float() / 127.5 - 1
    with torch.no_grad():
        prefix = model.prefix(towers.features(tower, pixels)[None], prompts.opening)[0]
        expected = torch.cat([prefix, model.lm.embed_tokens(torch.tensor(prompts.question(sample.question)))])
    torch.testing.assert_close(backbone.encode(sample.images, sample.question).embeds, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("task", "least"),
    [
        ("world/colour", 0.95),
        ("world/shape", 0.95),
        ("world/letter", 0.95),
        ("world/read_words", 0.98),
        ("world/read_codes", 0.95),
        ("world/describe", 0.95),
    ],
)
def test_it_answers_reserved_questions(backbone: Backbone, task: str, least: float) -> None:
    """Floors well under the measured means (docs/miniature.md), so that a broken path shows and chance does not."""
    count = 24 if task in ("world/colour", "world/shape", "world/letter") else 6
    samples: list[Sample] = list(samples_of(task, count))
    assert scores_of(backbone, samples, batch=6)[:, 0].mean() >= least


def test_intervals_by_known_values() -> None:
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)  # Wilson 1927, as commonly tabulated
    assert wilson(64, 64)[1] == 1.0
    assert bootstrap(np.full(10, 0.7)) == pytest.approx((0.7, 0.7))
    low, high = bootstrap(np.repeat([0.0, 1.0], 200))
    assert low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.01)
    assert high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.01)
