"""Fixtures of the recipe tests."""

from __future__ import annotations

import pytest
from recipe_helpers import make_vocabulary

from probe.compile import Vocabulary
from probe.site import ModelFacts


@pytest.fixture
def vocabulary() -> Vocabulary:
    return make_vocabulary()


@pytest.fixture
def facts() -> ModelFacts:
    return ModelFacts(name="miniature", layers=6, heads=4, width=64, vocabulary=100, encoder_layers=4)
