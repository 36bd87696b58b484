"""A backbone with random weights that every test can afford, and pictures to show it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from probe.backbones.llada_v import LladaV

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the LLaDA-V class with random weights: 4 layers, 4 heads, width 32, the miniature's tokenizer."""
    from transformers import SiglipVisionModel

    from probe.zoo.export import export
    from probe.zoo.model import Miniature, language_config
    from probe.zoo.tokenizer import BOS, EOS, EOT, MASK, build, vocabulary
    from probe.zoo.tower import config as tower_config

    folder = tmp_path_factory.mktemp("tiny")
    build(folder)
    words = vocabulary()
    torch.manual_seed(7)
    vision = tower_config(32, 2)
    config = language_config(len(words), hidden=32, layers=4, heads=4, mlp=64)
    model, tower = Miniature(config, 32), SiglipVisionModel(vision)
    for parameter in [*model.parameters(), *tower.parameters()]:
        if parameter.dim() > 1:  # sharper than an initialisation, so that answers depend on what they see
            torch.nn.init.normal_(parameter, std=0.25)
    special = {"mask": words.index(MASK), "bos": words.index(BOS), "eos": words.index(EOS), "eot": words.index(EOT)}
    export(folder, model.state_dict(), tower.state_dict(), config, vision, special, folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> LladaV:
    """The random backbone, attention rows beside the SDPA kernel, float32."""
    from probe.backbones import load

    model = load(tiny_folder)
    return model  # type: ignore[return-value]


@pytest.fixture(scope="session")
def tiny_eager(tiny_folder: Path) -> LladaV:
    """The same weights with eager attention."""
    from probe.backbones import load

    return load(tiny_folder, attention="eager")  # type: ignore[return-value]
