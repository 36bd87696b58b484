"""What is said of the built-in adapters without importing them is what they say themselves."""

from __future__ import annotations

import pytest

from probe.backbones import backbones
from probe.backbones.traits import TRAITS, said_by


@pytest.mark.parametrize("name", [e.name for e in backbones])
def test_an_adapters_traits_are_its_class(name: str) -> None:
    said = said_by(backbones[name].function())
    assert TRAITS[name] == said
